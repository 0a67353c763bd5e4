"""Grids of attention weights for tests and benchmarks: made by a closed form, no model needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_tui.pair_grid import PairGrid

WORDS = ("the", " sea", " is", " blue", "\n", " and", " 漢字", " wide")


def dense(size: int, window: int | None = None) -> np.ndarray:
    """float32 ``[size, size]``: a sink, a diagonal and noise, causal and within the window; rows sum to one."""
    random = np.random.default_rng(size)
    query, key = np.arange(size)[:, None], np.arange(size)[None, :]
    scores = random.normal(size=(size, size)) + 5.0 * (key == 0) + 4.0 * (query - key == 1)
    seen = (key <= query) & (query - key < (window or size))
    weights = np.where(seen, np.exp(scores), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.where(seen, weights, np.nan).astype(np.float32)


def grid(weights: Any, labels: Sequence[str] | None = None, window: int | None = None, **facts: Any) -> PairGrid:
    """Each cell one query and one key."""
    array = np.asarray(weights, np.float32)
    words = labels or [WORDS[i % len(WORDS)] for i in range(max(array.shape))]
    rows, columns = array.shape
    return PairGrid(array, np.arange(rows + 1), np.arange(columns + 1), words, words, window, "max", **facts)


def pooled(size: int, cell: int, window: int | None = None) -> PairGrid:
    """Cells of ``cell`` queries and keys, the largest weight of each."""
    weights = dense(size, window)
    edges = np.append(np.arange(0, size, cell), size)
    starts = edges[:-1]
    raised = np.where(np.isnan(weights), -1, weights)
    cells = np.maximum.reduceat(np.maximum.reduceat(raised, starts, axis=0), starts, axis=1)
    words = [WORDS[i % len(WORDS)] for i in range(size)]
    return PairGrid(np.where(cells < 0, np.nan, cells).astype(np.float32), edges, edges, words, words, window, "max")
