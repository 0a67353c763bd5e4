"""Progress of work that is made of several parts."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")


def part(steps: Generator[float, None, Result], number: int, count: int) -> Generator[float, None, Result]:
    """Steps that yield the share done, as part ``number``, from 0 on, of ``count`` equal ones."""
    while True:
        try:
            share = next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield (number + share) / count
