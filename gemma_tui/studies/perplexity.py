"""The perplexity of a text: how many tokens a model hesitates between, on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.base import Engine, Progress

WINDOW = 512
"""Tokens that are read together, each window after a ``<bos>`` of its own."""

TOKENS = 1024
"""Of a longer text its beginning is read: a CPU takes a minute for it with the 270M on MLX."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) over so many predicted tokens."""

    value: float
    tokens: int


def perplexity(engine: Engine, ids: Sequence[int], bos: int, progress: Progress) -> Perplexity:
    """That of the loaded model.

    Args:
        ids: of the text, without ``<bos>``; at least one.
        progress: called with the share that is done after each window.
    """
    info = engine.model()
    size = min(WINDOW, info.config.max_position_embeddings - 1) if info else WINDOW
    read, total = ids[:TOKENS], 0.0
    for start in range(0, len(read), size):
        part = read[start : start + size]
        total -= float(engine.log_probs(np.array([[bos, *part]], np.int32)).sum(dtype=np.float64))
        progress(min(1.0, (start + size) / len(read)), "reading the text")
    return Perplexity(math.exp(min(total / len(read), 700)), len(read))
