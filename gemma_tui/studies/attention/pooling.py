"""Large matrices in few cells, without the matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engines.inspection import Span

POOLINGS = ("max", "mean")


def cells(span: Span, most: int) -> np.ndarray:
    """Where cells begin, and the end of the last."""
    length = span[1] - span[0]
    count = min(most, length)
    return span[0] + np.arange(count + 1) * length // count


@dataclass
class Pool:
    """Weights that come tile by tile, reduced to cells at once.

    Attributes:
        queries, keys: where cells begin, and the end of the last.
        pooling: one of ``POOLINGS``, over the visible weights of a cell.
    """

    queries: np.ndarray
    keys: np.ndarray
    pooling: str
    sums: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Make room for the cells."""
        shape = len(self.queries) - 1, len(self.keys) - 1
        self.sums, self.counts = np.zeros(shape), np.zeros(shape, int)

    def add(self, start: int, weights: np.ndarray) -> None:
        """Rows from query ``start`` on, over the keys of the map; NaN is not visible. Weights are never negative."""
        first = self.keys[:-1] - self.keys[0]
        seen = np.isfinite(weights)
        rows = np.searchsorted(self.queries, np.arange(start, start + len(weights)), "right") - 1
        reduce, gather = (np.maximum, np.maximum.at) if self.pooling == "max" else (np.add, np.add.at)
        gather(self.sums, rows, reduce.reduceat(np.where(seen, weights, 0.0), first, axis=1))
        np.add.at(self.counts, rows, np.add.reduceat(seen, first, axis=1, dtype=int))

    def result(self) -> np.ndarray:
        """The pooled weights."""
        divisor = np.maximum(self.counts, 1) if self.pooling == "mean" else 1
        return np.where(self.counts > 0, self.sums / divisor, np.nan)
