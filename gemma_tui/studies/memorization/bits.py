"""Bits that a model holds of sequences, from log-likelihoods: Morris et al., arXiv:2505.24832, section 2.

A sequence x takes -log2 p(x) bits to write down with a model's help. What the trained model (the target) saves over a
reference is what it has memorised of x and the reference would not have known. Likelihoods are of whole sequences;
log-likelihoods come in nats, results are bits, all float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LN2 = math.log(2)


@dataclass(frozen=True, eq=False)
class Bits:
    """What the target saves on each sequence.

    Attributes:
        signed: log2 p_t(x) - log2 p_r(x); less than 0 where the reference knows better.
        clipped: max(0, signed), the paper's: of two codes the shorter is taken.
        mixture: log2(½ p_t + ½ p_r) - log2 p_r. Unlike the larger of two likelihoods the mean of two is a distribution,
            so that this is a code that can be written; it takes at most one bit a sequence more.
    """

    signed: np.ndarray
    clipped: np.ndarray
    mixture: np.ndarray


@dataclass(frozen=True)
class Totals:
    """Bits of a set of sequences, summed; by the paper's proposition 1 a lower bound of what is held of the set."""

    signed: float
    clipped: float
    mixture: float


@dataclass(frozen=True)
class Parameters:
    """What bits are divided by.

    Attributes:
        trainable: what training could change; None if that is not known.
        without_embeddings: all but the embedding table.
    """

    every: int
    without_embeddings: int
    trainable: int | None = None


def sequence_bits(target: np.ndarray, reference: np.ndarray) -> Bits:
    """Bits from log-likelihoods of whole sequences, nats, any float of one shape."""
    gained = np.asarray(target, np.float64) - np.asarray(reference, np.float64)
    signed = gained / LN2
    return Bits(signed, np.maximum(0.0, signed), np.logaddexp(gained, 0.0) / LN2 - 1)


def token_bits(target: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """What the target saves on each token of a sequence; they sum to the signed bits of the sequence.

    Clipped one by one they would sum to more than the sequence's clipped bits.
    """
    return (np.asarray(target, np.float64) - np.asarray(reference, np.float64)) / LN2


def uniform(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Log-likelihoods, nats, of sequences of so many tokens under the code that knows nothing: log2 V bits a token."""
    return -np.asarray(tokens, np.float64) * math.log(vocabulary)


def totals(bits: Bits) -> Totals:
    """Sums over sequences."""
    return Totals(float(bits.signed.sum()), float(bits.clipped.sum()), float(bits.mixture.sum()))


def per_parameter(total: float, parameters: Parameters) -> dict[str, float | None]:
    """Bits per parameter: of all, of those that were trained, and of all but the embeddings."""
    trainable = parameters.trainable
    return {
        "per_parameter": total / parameters.every,
        "per_trainable_parameter": total / trainable if trainable else None,
        "per_parameter_without_embeddings": total / parameters.without_embeddings,
    }
