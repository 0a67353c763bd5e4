"""Bits that are held of random strings: memorised bits, their plateau, and what that is per parameter.

Source: Morris et al., "How much do language models memorize?" (arXiv:2505.24832), sections 2.4 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tui.studies.intervals import interval

REFERENCE_LINES = {"bfloat16": 3.51, "float32": 3.83}
"""Bits per parameter that arXiv:2505.24832 found for GPT-2 shapes, mean of its table, by dtype."""


@dataclass(frozen=True)
class Memorised:
    """What a network holds of its strings, bits.

    Attributes:
        strict: of the ``length - 1`` tokens that follow another: N (S - 1) log₂ V less their code length.
        paper: N S (log₂ V - mean code length of those tokens), which counts the first token as the others; all that is
            printed in arXiv:2505.24832 fits this.
    """

    strict: float
    paper: float


def memorised_bits(losses: np.ndarray, vocabulary: int, length: int) -> Memorised:
    """What is held of strings drawn uniformly from ``vocabulary`` tokens.

    Args:
        losses: ``[sequences]``, negative log-likelihood summed over a string's ``length - 1`` predicted tokens, nats.
    """
    code = float(losses.sum()) / math.log(2)
    strict = len(losses) * (length - 1) * math.log2(vocabulary) - code
    return Memorised(strict, strict * length / (length - 1))


def data_bits(sequences: int, length: int, vocabulary: int) -> float:
    """H(X) = N S log₂ V of uniform strings."""
    return sequences * length * math.log2(vocabulary)


@dataclass(frozen=True)
class Plateau:
    """The most bits that a network of one shape was found to hold: a lower bound of its capacity at this budget.

    Attributes:
        sequences: the size of the data set that gave it.
        bits: mean over seeds.
        half: half the width of its 95 % interval; None for a single seed.
    """

    sequences: int
    bits: float
    half: float | None


def plateau(sizes: Sequence[int], bits: Sequence[float]) -> Plateau:
    """The maximum over data sets of the mean over seeds (definition 5: capacity is a maximum over X).

    Args:
        sizes: of the data set of each cell.
        bits: what each cell holds.
    """
    found = [summary(size, [b for s, b in zip(sizes, bits, strict=True) if s == size]) for size in sorted(set(sizes))]
    return max(found, key=lambda each: each.bits)


def summary(size: int, bits: Sequence[float]) -> Plateau:
    """Mean and interval over the seeds of one data-set size."""
    mean, half = interval(np.array(bits))
    return Plateau(size, float(mean), float(half) if len(bits) > 1 else None)


def expected_bits(sequences: int, length: int, vocabulary: int, parameters: int, alpha: float) -> float:
    """min(α P, H(X)): what arXiv:2505.24832 predicts that a network holds."""
    return min(alpha * parameters, data_bits(sequences, length, vocabulary))
