"""How well a score separates members from others: AUC, its interval, and the rates at few false alarms.

A score is higher for members, and a text is called a member when its score is at least a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_tui.errors import UsageError

FALSE_ALARMS = (0.001, 0.01)
"""The false-positive rates of Carlini et al., arXiv:2112.03570: what an attack is worth is seen at few false alarms."""

SUPPORT = 10
"""A false-positive rate is only stated where at least this many non-members may be mistaken."""

CELLS = 1 << 20
"""Resampled counts that are held at a time."""


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval, ends included."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The ROC curve, from (0, 0) to (1, 1), a point for each distinct score.

    Attributes:
        thresholds: falling, the first infinite.
        false_positives: share of the non-members at or above each threshold.
        true_positives: share of the members.
    """

    thresholds: np.ndarray
    false_positives: np.ndarray
    true_positives: np.ndarray


@dataclass(frozen=True)
class Rate:
    """The true-positive rate at a false-positive rate, or why it cannot be stated.

    Attributes:
        false_positives: at most this share of the non-members is mistaken.
        value: None where there are too few non-members.
        reason: empty where there is a value.
    """

    false_positives: float
    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Best:
    """The threshold at which a measure is highest, and the measure there.

    It was chosen on these very texts, so it is optimistic; calling every text a member already gives a balanced
    accuracy of 1/2, and an F1 of 2m/(2m + o) with m members and o others.
    """

    threshold: float
    value: float


@dataclass(frozen=True)
class Separation:
    """All that is said of one score."""

    members: int
    others: int
    auc: Interval
    rates: tuple[Rate, ...]
    balanced_accuracy: Best
    f1: Best
    curve: Curve


def separation(members: np.ndarray, others: np.ndarray, resamples: int = 1000, seed: int = 0) -> Separation:
    """AUC with its interval, the rates at few false alarms, and the best thresholds.

    Args:
        members, others: scores ``[n]`` and ``[m]``, higher = member.
        resamples, seed: of the bootstrap.

    Raises:
        UsageError: one of them is empty, or has a NaN.
    """
    curve = roc_curve(members, others)
    rates = tuple(true_positives_at(curve, len(others), rate) for rate in FALSE_ALARMS)
    interval = auc_interval(members, others, resamples, seed)
    balanced, f1 = best_balanced_accuracy(curve), best_f1(curve, len(members), len(others))
    return Separation(len(members), len(others), interval, rates, balanced, f1, curve)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member scores above another text, ties counting half: Mann-Whitney's U / (n·m).

    Raises:
        UsageError: see ``separation``.
    """
    mine, theirs = _counts(members, others)
    return float(_auc(mine[None], theirs[None])[0])


def auc_interval(
    members: np.ndarray, others: np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """AUC with its percentile bootstrap interval (Efron); members and others are resampled apart.

    Drawing n texts with replacement is drawing multinomial counts of the distinct scores, which is what is done here.

    Raises:
        UsageError: see ``separation``.
    """
    mine, theirs = _counts(members, others)
    generator = np.random.default_rng(seed)
    step = max(1, CELLS // len(mine))
    values = [
        _auc(_resampled(generator, mine, count), _resampled(generator, theirs, count))
        for count in (min(step, resamples - start) for start in range(0, resamples, step))
    ]
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(auc(members, others), float(low), float(high))


def roc_curve(members: np.ndarray, others: np.ndarray) -> Curve:
    """Both rates at every threshold that makes a difference.

    Raises:
        UsageError: see ``separation``.
    """
    mine, theirs = _counts(members, others)
    thresholds = np.unique(np.concatenate([members, others]))[::-1].astype(np.float64)
    true, false = (np.concatenate([[0.0], counts[::-1].cumsum() / counts.sum()]) for counts in (mine, theirs))
    return Curve(np.concatenate([[np.inf], thresholds]), false, true)


def true_positives_at(curve: Curve, others: int, rate: float) -> Rate:
    """The highest true-positive rate with at most ``rate`` false positives; a point of the curve, not between two.

    Args:
        others: number of non-members; fewer than 10/rate cannot support the claim.
    """
    needed = round(SUPPORT / rate)
    if others < needed:
        reason = f"not supported: {others:,} non-members, {needed:,} are needed for {100 * rate:g} % false positives"
        return Rate(rate, None, reason)
    return Rate(rate, float(curve.true_positives[curve.false_positives <= rate].max()))


def best_balanced_accuracy(curve: Curve) -> Best:
    """The highest (TPR + 1 − FPR)/2, at the highest threshold that gives it."""
    return _best(curve, (curve.true_positives + 1 - curve.false_positives) / 2)


def best_f1(curve: Curve, members: int, others: int) -> Best:
    """The highest 2TP/(2TP + FP + FN), at the highest threshold that gives it."""
    found = curve.true_positives * members
    return _best(curve, 2 * found / (found + curve.false_positives * others + members))


def _best(curve: Curve, values: np.ndarray) -> Best:
    at = int(np.argmax(values))
    return Best(float(curve.thresholds[at]), float(values[at]))


def _counts(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often members and others have each distinct score, scores rising."""
    for name, scores in (("members", members), ("non-members", others)):
        if scores.ndim != 1 or not len(scores):
            raise UsageError(f"there are no scores of {name}: give at least one text of each kind")
        if np.isnan(scores).any():
            raise UsageError(f"scores of {name} are not numbers: leave those texts out")
    _, places = np.unique(np.concatenate([members, others]), return_inverse=True)
    size = int(places.max()) + 1
    mine = np.bincount(places[: len(members)], minlength=size)
    return mine, np.bincount(places[len(members) :], minlength=size)


def _auc(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """AUC of each row of counts."""
    below = theirs.cumsum(1) - theirs
    pairs = (mine * (below + theirs / 2)).sum(1)
    share: np.ndarray = pairs / (mine.sum(1) * theirs.sum(1))
    return share


def _resampled(generator: np.random.Generator, counts: np.ndarray, resamples: int) -> np.ndarray:
    """Counts of as many texts drawn with replacement, ``[resamples, scores]``."""
    total = int(counts.sum())
    return generator.multinomial(total, counts / total, size=resamples)
