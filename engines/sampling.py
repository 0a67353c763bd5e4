"""Choosing the next token from logits, in numpy, so that both engines draw alike."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from engines.base import Sampling


def choose(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator, seen: Collection[int] = ()) -> int:
    """Draw a token id from float32 logits ``[vocabulary]``.

    The penalty of ``seen`` ids first, then temperature, then the ``top_k`` most probable, then the nucleus: the fewest
    most probable tokens whose probabilities sum to at least ``top_p`` (Holtzman et al., arXiv:1904.09751), of which
    those below ``min_p`` of the first are left out. Temperature 0 is the arg-max.
    """
    if sampling.repetition_penalty != 1 and seen:
        logits, ids = logits.copy(), list(seen)
        old = logits[ids]
        logits[ids] = np.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / sampling.temperature
    kept = np.arange(scores.size)
    if 0 < sampling.top_k < scores.size:
        kept = np.argpartition(scores, -sampling.top_k)[-sampling.top_k :]
    weights = np.exp(scores[kept] - scores[kept].max())
    weights /= weights.sum()
    if sampling.top_p < 1:
        # What lies under (1 - top_p) / n sums to less than 1 - top_p, so it is not in the nucleus: it is not sorted.
        plausible = weights >= (1 - sampling.top_p) / weights.size
        kept, weights = kept[plausible], weights[plausible]
        order = np.argsort(-weights, kind="stable")
        kept, weights = kept[order], weights[order]
        nucleus = int(np.searchsorted(weights.cumsum(), sampling.top_p)) + 1
        kept, weights = kept[:nucleus], weights[:nucleus]
    if sampling.min_p > 0:
        probable = weights >= sampling.min_p * weights.max()
        kept, weights = kept[probable], weights[probable]
    position = np.searchsorted(weights.cumsum(), generator.random() * weights.sum(), side="right")
    return int(kept[min(int(position), kept.size - 1)])
