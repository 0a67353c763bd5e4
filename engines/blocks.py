"""Set block decoding (Gat et al., arXiv:2509.04185): what a model is trained on, and how a block is decided.

A block is a run of places right after a text. A model sees the text causally and all places of the block at once,
some of which hold the mask token; what it makes of such a place is a prediction of the token *at* it, not after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engines.errors import UnsupportedError

MASK = 4
"""The id of Gemma's ``<mask>``, which no text holds."""

ORDERS = ("entropy", "confidence", "margin")
"""What may come first: the lowest entropy, the most probable token, or the one furthest above its runner-up."""


@dataclass(frozen=True)
class BlockDecoding:
    """How a block is decided: the entropy-bounded sampler (Ben-Hamu et al., arXiv:2505.24857).

    Attributes:
        block: places decided together; 1 is next-token decoding.
        gamma: bound in nats on the entropy of what one pass decides, its largest left out; 0 decides one place a pass,
            and those of no entropy. Infinity decides a block in one pass.
        order: what comes first, one of ``ORDERS``.
        mask: the token that stands for a place which is not decided.
    """

    block: int = 16
    gamma: float = 0.1
    order: str = "entropy"
    mask: int = MASK

    def check(self) -> None:
        """Whether it can be done.

        Raises:
            UnsupportedError: it cannot.
        """
        if self.block < 1:
            raise UnsupportedError(f"a block of {self.block} tokens holds nothing: give 1 or more")
        if math.isnan(self.gamma) or self.gamma < 0:
            raise UnsupportedError(f"gamma {self.gamma} bounds no entropy: give 0 or more")
        if self.order not in ORDERS:
            raise UnsupportedError(f"order {self.order[:40]!r} is not there: choose {', '.join(ORDERS)}")


@dataclass(frozen=True, eq=False)
class Noise:
    """The masked copy of a batch, whose blocks are predicted from the text before them (equation 14).

    Attributes:
        tokens: int32 ``[batch, blocks * block]``: the batch's own from the first on, some replaced by the mask token.
        labels: int32, as ``tokens``: the token that was replaced, at its own place; else ``IGNORED``.
        block: tokens in a block.
        next_token_weight, masked_weight: what a token counts in the objective, on either side.
    """

    tokens: np.ndarray
    labels: np.ndarray
    block: int
    next_token_weight: float = 1.0
    masked_weight: float = 1.0


@dataclass(frozen=True, eq=False)
class DecodingPass:
    """What one forward pass said of the places that were not decided before it; arrays have one entry for each.

    Attributes:
        rows: int32, the prompt a place belongs to.
        places: int32, where it stands in what is written after that prompt, from 0 on.
        tokens: int32, what was chosen there, or would have been.
        entropies: float32, of the model's own distribution (temperature 1, nothing cut off), nats.
        probabilities: float32, of the token under it.
        decided: bool, whether the token stays.
        width: tokens a row put through the model.
    """

    rows: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    entropies: np.ndarray
    probabilities: np.ndarray
    decided: np.ndarray
    width: int


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of some places, one entry for each.

    Attributes:
        best: int32, the most probable token; of equals the lowest id.
        entropies: float32, nats.
        tops, seconds: float32, the two largest probabilities.
        logits: float32 ``[places, vocabulary]``, where they were asked for.
    """

    best: np.ndarray
    entropies: np.ndarray
    tops: np.ndarray
    seconds: np.ndarray
    logits: np.ndarray | None = None

    def at(self, some: np.ndarray) -> Predictions:
        """Those of some places, without logits."""
        return Predictions(self.best[some], self.entropies[some], self.tops[some], self.seconds[some])


def sure(predictions: Predictions, gamma: float, order: str) -> np.ndarray:
    """Which places of one block a pass decides: bool, as the predictions.

    The longest run from the first in the order for which the sum of the entropies less their largest is at most
    ``gamma`` (arXiv:2509.04185, equations 8 and 18): never none.
    """
    proxies = {
        "entropy": predictions.entropies,
        "confidence": -predictions.tops,
        "margin": predictions.seconds - predictions.tops,
    }
    ranks = np.argsort(proxies[order], kind="stable")
    entropies = predictions.entropies[ranks].astype(np.float64)
    spread = entropies.cumsum() - np.maximum.accumulate(entropies)
    found = np.zeros(len(ranks), bool)
    found[ranks[: max(1, int((spread <= gamma).sum()))]] = True
    return found
