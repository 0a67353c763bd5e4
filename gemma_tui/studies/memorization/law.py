"""The membership scaling law of Morris et al., arXiv:2505.24832, in a decoded form.

Printed is F1 = (1 + c₁·σ(c₂(capacity/|D| + c₃)))/2 with c₁ = 1.34, c₂ = −0.034, c₃ = −33.14, which rises with |D| to
1.006 and so contradicts the limit of 1/2 that is claimed. All six printed predictions come out if the ratio is turned
over and taken as r = |D|·(S − 1)·log₂V / P, the bits of the data at a uniform code length per parameter.
"""

from __future__ import annotations

import math

from gemma_tui.errors import UsageError

DECODED = (
    "decoded from the printed predictions of arXiv:2505.24832, not as printed there; observed F1 was up to 9.3 points "
    "from it, on GPT-2 shapes trained for 10^6 steps: no prediction for other models or budgets"
)
"""To be shown wherever the law is."""

AMPLITUDE, SLOPE, MIDDLE = 1.34, -0.03371, -33.14
"""c₁, c₂ and c₃; c₂ is printed as −0.034, and the predictions need its next digits."""

TOKENS, VOCABULARY = 64, 50_257
"""Of the paper's sequences of text, in GPT-2's vocabulary."""


def data_bits_per_parameter(
    parameters: int, sequences: float, tokens: int = TOKENS, vocabulary: int = VOCABULARY
) -> float:
    """r = |D|·(S − 1)·log₂V / P: the first token of a sequence is not predicted.

    Raises:
        UsageError: something is not positive.
    """
    if parameters < 1 or sequences < 0 or tokens < 2 or vocabulary < 2:
        raise UsageError("the law needs parameters, sequences of at least 2 tokens, and a vocabulary")
    return sequences * (tokens - 1) * math.log2(vocabulary) / parameters


def membership_f1(ratio: float) -> float:
    """F1 of the loss attack at r data bits per parameter: 1 for little data (1.005, cut), 1/2 for much. ``DECODED``."""
    steepness = SLOPE * (ratio + MIDDLE)
    # σ by the branch that does not overflow.
    small = math.exp(-abs(steepness))
    sigmoid = (1.0 if steepness >= 0 else small) / (1.0 + small)
    return min(1.0, (1.0 + AMPLITUDE * sigmoid) / 2)


def sequences_at(f1: float, parameters: int, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> float:
    """The |D| at which the law gives this F1. ``DECODED``.

    Raises:
        UsageError: the law does not reach it, or something is not positive.
    """
    highest = membership_f1(0.0)
    sigmoid = (2 * f1 - 1) / AMPLITUDE
    if not 0.5 < f1 < highest:
        raise UsageError(f"the law never gives an F1 of {f1:g}: give one between 0.5 and {highest:g}")
    ratio = math.log(sigmoid / (1 - sigmoid)) / SLOPE - MIDDLE
    return max(0.0, ratio) / data_bits_per_parameter(parameters, 1, tokens, vocabulary)
