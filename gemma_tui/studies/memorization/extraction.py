"""Whether a model gives a suffix back: greedily, nearly, or with some chance.

A suffix is *extractable* with a prefix of P tokens if greedy decoding gives exactly it (Carlini et al.,
arXiv:2202.07646). 50/50 with ≤ 10 % edits is the criterion of the Gemma reports; 32/32 and the share of equal
positions are Pythia's (Biderman et al., arXiv:2304.11158).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from gemma_tui.errors import UsageError
from gemma_tui.text import one_line

EDITS = 0.1
"""Edits per token of the suffix that still count as near, by the Gemma reports."""

CHANCES = (0.1, 0.5, 0.9, 0.99)
"""The p for which the n of (n, p)-discoverable extraction is listed."""

MAX_TOKENS = 100_000
NONE = -1
"""Pads generated suffixes that ended early; no token id."""


@dataclass(frozen=True)
class Split:
    """Tokens of the prefix that is given, and of the suffix that is asked for."""

    prefix: int
    suffix: int

    @property
    def length(self) -> int:
        """Tokens of both."""
        return self.prefix + self.suffix

    def cut(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Prefix and suffix from the start of a text, ``<bos>`` not counted; None if it is too short."""
        if len(tokens) < self.length:
            return None
        return tokens[: self.prefix], tokens[self.prefix : self.length]


@dataclass(frozen=True)
class Match:
    """How a generated suffix compares with the true one.

    Attributes:
        exact: every token is there.
        distance: Levenshtein's, in tokens.
        near: ``distance`` is at most 10 % of the true suffix.
        divergence: the first position that differs, that is, how many tokens were recited; None if exact.
        equal: share of positions with the same token, Pythia's score.
    """

    exact: bool
    distance: int
    near: bool
    divergence: int | None
    equal: float


def parse_split(text: str) -> Split:
    """``50/50``: tokens of prefix and suffix.

    Raises:
        UsageError: it is not written like that, or one of them is 0 or above 100,000.
    """
    match = re.fullmatch(r"\s*([0-9]{1,7})\s*/\s*([0-9]{1,7})\s*", text)
    parts = tuple(map(int, match.groups())) if match else ()
    if not parts or not all(0 < part <= MAX_TOKENS for part in parts):
        shown = one_line(text, 40)
        raise UsageError(f"split {shown!r} cannot be read: write tokens of prefix and suffix, such as 50/50 or 32/32")
    return Split(*parts)


def matches(suffixes: np.ndarray, generated: np.ndarray, edits: float = EDITS) -> list[Match]:
    """Compare generated suffixes with the true ones.

    Args:
        suffixes: ids ``[sequences, suffix]``.
        generated: ids ``[sequences, any]``, padded with -1 on the right where generation ended early; what is beyond
            the suffix is not looked at.
        edits: share of the suffix's tokens that may be edited in a near match.

    Raises:
        UsageError: the shapes do not fit.
    """
    if suffixes.ndim != 2 or generated.ndim != 2 or len(suffixes) != len(generated) or not suffixes.shape[1]:
        raise UsageError("true and generated suffixes do not fit: give one row of ids for each sequence, in both")
    count, length = suffixes.shape
    cut = np.full((count, length), NONE, suffixes.dtype)
    cut[:, : generated.shape[1]] = generated[:, :length]
    equal = cut == suffixes
    distances = edit_distances(suffixes, cut)
    # Whole edits, with room for 0.1·50 not being 5.
    allowed = math.floor(edits * length + 1e-9)
    rows = zip(equal, distances.tolist(), strict=True)
    return [_match(row, distance, allowed) for row, distance in rows]


def _match(equal: np.ndarray, distance: int, allowed: int) -> Match:
    exact = bool(equal.all())
    divergence = None if exact else int(np.argmin(equal))
    return Match(exact, distance, distance <= allowed, divergence, float(equal.mean()))


def edit_distances(suffixes: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Levenshtein distances in tokens of each pair of rows; -1 pads ``generated`` on the right.

    Row i of the table holds the distances of the first i true tokens to every start of the generated ones. Going
    right costs 1 per token, which a running minimum of (distance − position) does for the whole row and all pairs.

    Args:
        suffixes: ids ``[pairs, n]``.
        generated: ids ``[pairs, m]``.
    """
    pairs, width = generated.shape
    steps = np.arange(width + 1)
    row = np.broadcast_to(steps, (pairs, width + 1))
    for place in range(suffixes.shape[1]):
        substituted = row[:, :-1] + (generated != suffixes[:, place, None])
        best = row + 1
        best[:, 1:] = np.minimum(best[:, 1:], substituted)
        row = np.minimum.accumulate(best - steps, axis=1) + steps
    lengths = (generated != NONE).sum(1)
    ends: np.ndarray = row[np.arange(pairs), lengths]
    return ends


def recited(best: np.ndarray, suffix: int) -> int:
    """How many tokens of the suffix greedy decoding gives before it departs; ``suffix`` if it gives all.

    One teacher-forced pass tells it: as long as the decoded tokens are the true ones both see the same context, and
    at the first that is not, both say so.

    Args:
        best: bool, whether each predicted token is the most probable one.

    Raises:
        UsageError: there are fewer predictions than that.
    """
    _check_suffix(len(best), suffix)
    tail = best[-suffix:]
    return suffix if tail.all() else int(np.argmin(tail))


def _check_suffix(predictions: int, suffix: int) -> None:
    if not 0 < suffix <= predictions:
        raise UsageError(f"a suffix of {suffix} tokens is not there: the text has {predictions} predictions")


def suffix_log_prob(log_probs: np.ndarray, suffix: int) -> float:
    """ln p_z, the chance that one draw is the suffix: the sum of its tokens' chances under the scheme, nats.

    Args:
        log_probs: ``sampled`` of ``TokenScores``.

    Raises:
        UsageError: there are fewer predictions than that.
    """
    _check_suffix(len(log_probs), suffix)
    return float(log_probs[-suffix:].sum(dtype=np.float64))


def draws_for(log_prob: float, chance: float) -> float:
    """The fewest draws n with 1 − (1 − p_z)^n ≥ p: ⌈ln(1 − p)/ln(1 − p_z)⌉, stable for tiny p_z.

    A whole number as a float, since it may be beyond all integers: infinite where p_z is 0 or below about 1e-308.

    Raises:
        UsageError: ``chance`` is not between 0 and 1.
    """
    if not 0 < chance < 1:
        raise UsageError(f"a chance of {chance:g} has no number of draws: give one between 0 and 1")
    if log_prob >= 0:
        return 1.0
    miss = _log_miss(log_prob)
    needed = math.log1p(-chance) / miss if miss else math.inf
    # 2.0000000000000004 draws are 2: rounding, not a third draw.
    return max(1.0, float(np.ceil(needed * (1 - 1e-12))))


def _log_miss(log_prob: float) -> float:
    """ln(1 − p_z) of a p_z below 1, by the form that keeps its digits on either side of p_z = 1/2."""
    return math.log1p(-math.exp(log_prob)) if log_prob < -math.log(2) else math.log(-math.expm1(log_prob))
