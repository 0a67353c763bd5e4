"""What the model makes of each token of a text, in MLX. The file mirrors ``engines/torch/scoring.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from engines.base import Sampling, TokenScores
from engines.mlx.model import Gemma3

ROWS = 64
"""Positions whose logits are there at a time; those of all would be gigabytes."""

TILE = 512
"""Terms of a sum that are added up first: one long float32 sum over a large vocabulary is off by 1e-3."""


def log_probs(model: Gemma3, tokens: np.ndarray) -> np.ndarray:
    """``ln p`` of each next token, float32 ``[batch, length - 1]``."""
    parts = []
    for logits, targets in _rows(model, tokens):
        parts.append(mx.take_along_axis(_log_softmax(logits), targets, axis=1)[:, 0])
        mx.eval(parts[-1])
    return _whole(parts, tokens)


def token_scores(model: Gemma3, tokens: np.ndarray, sampling: Sampling | None) -> TokenScores:
    """All of ``TokenScores``, so many positions at a time."""
    parts = []
    for logits, targets in _rows(model, tokens):
        parts.append(_scores(logits, targets, sampling))
        mx.eval(parts[-1])
    found = [_whole(list(kind), tokens) for kind in zip(*parts, strict=True)]
    if not found:
        found = [_whole([], tokens)] * (4 if sampling is None else 5)
    return TokenScores(found[0], found[1], found[2], found[3].astype(bool), None if sampling is None else found[4])


def _rows(model: Gemma3, tokens: np.ndarray) -> Iterator[tuple[mx.array, mx.array]]:
    """Logits ``[rows, vocabulary]`` in the model's dtype, and the next tokens ``[rows, 1]``."""
    hidden = model(mx.array(tokens))[:, :-1].reshape(-1, model.config.hidden_size)
    targets = mx.array(tokens[:, 1:].reshape(-1, 1))
    for start in range(0, hidden.shape[0], ROWS):
        yield model.logits(hidden[start : start + ROWS]), targets[start : start + ROWS]


def _scores(logits: mx.array, targets: mx.array, sampling: Sampling | None) -> list[mx.array]:
    best = logits.argmax(-1, keepdims=True) == targets  # of the logits themselves: rounding may make ties of the rest
    scores = _log_softmax(logits)
    p = mx.exp(scores)
    means = _total(p * scores)
    deviations = mx.sqrt(_total(p * mx.square(scores - means)))
    found = [mx.take_along_axis(scores, targets, axis=1), means, deviations, best]
    if sampling is not None:
        found.append(_sampled(logits.astype(mx.float32), targets, best, sampling))
    return [part[:, 0].astype(mx.float32) for part in found]


def _sampled(logits: mx.array, targets: mx.array, best: mx.array, sampling: Sampling) -> mx.array:
    """``ln p`` of the targets under the scheme, ``[rows, 1]``."""
    if sampling.temperature == 0:
        return mx.where(best, 0.0, -math.inf)
    # Less the largest before the division, which would make the rounding of large logits larger.
    scores = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    wanted = mx.take_along_axis(scores, targets, axis=1)
    if not 0 < sampling.top_k < scores.shape[1]:
        return wanted - mx.log(_total(mx.exp(scores)))
    ids = mx.arange(scores.shape[1])
    ahead = (scores > wanted) | ((scores == wanted) & (ids < targets))
    kept = mx.log(_total(mx.exp(mx.topk(scores, sampling.top_k, axis=-1))))
    return mx.where(ahead.sum(-1, keepdims=True) < sampling.top_k, wanted - kept, -math.inf)


def _log_softmax(logits: mx.array) -> mx.array:
    """Float32."""
    scores = logits.astype(mx.float32)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - mx.log(_total(mx.exp(scores)))


def _total(values: mx.array) -> mx.array:
    """The sum of each row, ``[rows, 1]``."""
    rows, count = values.shape
    even = count // TILE * TILE
    whole = values[:, :even].reshape(rows, -1, TILE).sum(-1).sum(-1, keepdims=True)
    return whole + values[:, even:].sum(-1, keepdims=True)


def _whole(parts: list[mx.array], tokens: np.ndarray) -> np.ndarray:
    batch, length = tokens.shape
    flat = np.array(mx.concatenate(parts)) if parts else np.zeros(0, np.float32)
    return flat.reshape(batch, length - 1)
