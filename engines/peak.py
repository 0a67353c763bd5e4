"""How fast a device computes and moves data at best: the two numbers of a roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SIDE = {"cpu": 1024}
"""Rows of the square matrices that are multiplied; ``LARGE_SIDE`` where it is not named."""
LARGE_SIDE = 4096

COPIED = 128 << 20
"""Bytes that are copied: more than a cache holds."""

REPEATS, SECONDS = 3, 0.5
"""A probe is repeated so often, and as long, whichever takes longer."""


@dataclass(frozen=True)
class Peak:
    """What was seen.

    Attributes:
        flops: floating-point operations a second, of a product of two square matrices.
        bandwidth: bytes a second, of a copy, what is read and what is written together.
    """

    flops: float
    bandwidth: float


def side_of(kind: str) -> int:
    """Rows of the matrices for a kind of device."""
    return SIDE.get(kind, LARGE_SIDE)


def peak(side: int, product: Callable[[], None], copy: Callable[[], None]) -> Peak:
    """Time a product of matrices ``[side, side]`` and a copy of ``COPIED`` bytes, each of which waits for its end."""
    return Peak(2 * side**3 / _fastest(product), 2 * COPIED / _fastest(copy))


def _fastest(run: Callable[[], None]) -> float:
    """Seconds of the fastest repetition; others lose time to what else the machine does."""
    run()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
