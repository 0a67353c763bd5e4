"""Large matrices in few cells, without the matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engines.edits import Span

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
        rows = np.searchsorted(self.queries, np.arange(start, start + len(weights)), "right") - 1
        begin = np.flatnonzero(np.diff(rows, prepend=-1))
        into, first = rows[begin], self.keys[:-1] - self.keys[0]
        seen = np.isfinite(weights)
        reduce = np.maximum if self.pooling == "max" else np.add
        self.sums[into] = reduce(self.sums[into], _reduced(reduce, np.where(seen, weights, 0.0), begin, first))
        self.counts[into] += _reduced(np.add, seen.astype(np.int32), begin, first)

    def result(self) -> np.ndarray:
        """The pooled weights."""
        divisor = np.maximum(self.counts, 1) if self.pooling == "mean" else 1
        return np.where(self.counts > 0, self.sums / divisor, np.nan)


def _reduced(reduce: np.ufunc, values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values reduced to the cells that begin at these rows and columns; cells of one need no work."""
    if len(columns) < values.shape[1]:
        values = reduce.reduceat(values, columns, axis=1)
    return reduce.reduceat(values, rows, axis=0) if len(rows) < len(values) else values
