"""Passes of block decoding for tests, written down by hand or decided by the rule itself on given entropies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.blocks import DecodingPass, Predictions, sure

Place = tuple[int, int, float, bool]
"""Place, token, entropy and whether it stays."""


def said(*places: Place, width: int = 0) -> DecodingPass:
    """One pass over the places of one prompt; the probability of a token is ``exp(-entropy)``."""
    at, tokens, entropies, decided = (np.array(column) for column in zip(*places, strict=True))
    return DecodingPass(
        np.zeros(len(places), np.int32), at.astype(np.int32), tokens.astype(np.int32), entropies.astype(np.float32),
        np.exp(-entropies).astype(np.float32), decided.astype(bool), width or len(places),
    )  # fmt: skip


def one_by_one(tokens: Sequence[int], entropies: Sequence[float]) -> list[DecodingPass]:
    """Next-token decoding."""
    return [said((place, token, h, True)) for place, (token, h) in enumerate(zip(tokens, entropies, strict=True))]


def in_blocks(tokens: Sequence[int], entropies: Sequence[float], block: int, gamma: float) -> list[DecodingPass]:
    """Block decoding of a model whose entropies do not change; what is not decided would be the token before it."""
    passes = []
    for start in range(0, len(tokens), block):
        left = list(range(start, min(start + block, len(tokens))))
        while left:
            h = np.array([entropies[place] for place in left], np.float32)
            stays = sure(Predictions(np.zeros(len(left), np.int32), h, np.exp(-h), np.zeros_like(h)), gamma, "entropy")
            chosen = [
                (p, tokens[p] if s else tokens[p] - 1, entropies[p], bool(s)) for p, s in zip(left, stays, strict=True)
            ]
            passes.append(said(*chosen))
            left = [p for p, s in zip(left, stays, strict=True) if not s]
    return passes
