"""Means with their confidence intervals."""

from __future__ import annotations

import numpy as np

CONFIDENCE = 1.96
"""Standard errors on each side of a mean that hold 95 % of a normal distribution."""


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, and half the width of its 95 % confidence interval; NaN where a metric is missing.

    Normal approximation: 1.96 · s / √n, s with n - 1.
    """
    known = np.isfinite(values)
    n = known.sum(0)
    total = np.where(known, values, 0.0).sum(0)
    mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    squares = np.where(known, (values - mean) ** 2, 0.0).sum(0)
    deviation = np.sqrt(np.where(n > 1, squares / np.maximum(n - 1, 1), np.nan))
    return mean, CONFIDENCE * deviation / np.sqrt(np.maximum(n, 1))
