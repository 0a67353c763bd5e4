"""Means with their confidence intervals."""

from __future__ import annotations

import numpy as np

T95 = np.array([
    np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
])  # fmt: skip
"""Student's t by degrees of freedom: the standard errors on each side of a mean that hold 95 %."""


def t95(degrees: np.ndarray) -> np.ndarray:
    """Two-sided 95 % quantiles of Student's t; NaN below one degree of freedom.

    From 31 degrees on by their expansion about the normal quantile (Abramowitz and Stegun, 26.7.5, to the second term).
    """
    beyond = np.maximum(degrees, len(T95))
    far = 1.95996 + 2.37227 / beyond + 2.8225 / beyond**2
    return np.where(degrees < len(T95), T95[np.clip(degrees, 0, len(T95) - 1)], far)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, and half the width of its 95 % confidence interval; NaN where a metric is missing.

    Student's t with n - 1 degrees of freedom: t · s / √n, s with n - 1.
    """
    known = np.isfinite(values)
    n = known.sum(0)
    total = np.where(known, values, 0.0).sum(0)
    mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    squares = np.where(known, (values - mean) ** 2, 0.0).sum(0)
    deviation = np.sqrt(squares / np.maximum(n - 1, 1))
    return mean, t95(n - 1) * deviation / np.sqrt(np.maximum(n, 1))
