"""What the model makes of each token of a text, in torch. The file mirrors ``engines/mlx/scoring.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engines.base import Sampling, TokenScores
from engines.torch.model import Gemma3

ROWS = 64
"""Positions whose logits are there at a time; those of all would be gigabytes."""


@torch.inference_mode()
def log_probs(model: Gemma3, tokens: np.ndarray) -> np.ndarray:
    """``ln p`` of each next token, float32 ``[batch, length - 1]``."""
    parts = [_log_softmax(logits).gather(1, targets)[:, 0] for logits, targets in _rows(model, tokens)]
    return _whole(parts, tokens)


@torch.inference_mode()
def token_scores(model: Gemma3, tokens: np.ndarray, sampling: Sampling | None) -> TokenScores:
    """All of ``TokenScores``, so many positions at a time."""
    parts = [_scores(logits, targets, sampling) for logits, targets in _rows(model, tokens)]
    found = [_whole(list(kind), tokens) for kind in zip(*parts, strict=True)]
    if not found:
        found = [_whole([], tokens)] * (4 if sampling is None else 5)
    return TokenScores(found[0], found[1], found[2], found[3].astype(bool), None if sampling is None else found[4])


def _rows(model: Gemma3, tokens: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits ``[rows, vocabulary]`` in the model's dtype, and the next tokens ``[rows, 1]``."""
    ids = torch.from_numpy(tokens).to(model.model.embed_tokens.weight.device, torch.long)
    hidden, targets = model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].reshape(-1, 1)
    for start in range(0, len(hidden), ROWS):
        yield model.logits(hidden[start : start + ROWS]), targets[start : start + ROWS]


def _scores(logits: Tensor, targets: Tensor, sampling: Sampling | None) -> list[Tensor]:
    best = logits.argmax(-1, keepdim=True) == targets  # of the logits themselves: rounding may make ties of the rest
    scores = _log_softmax(logits)
    p = scores.exp()
    means = (p * scores).sum(-1, keepdim=True)
    deviations = (p * (scores - means).square()).sum(-1, keepdim=True).sqrt()
    found = [scores.gather(1, targets), means, deviations, best]
    if sampling is not None:
        found.append(_sampled(logits.float(), targets, best, sampling))
    return [part[:, 0].float() for part in found]


def _sampled(logits: Tensor, targets: Tensor, best: Tensor, sampling: Sampling) -> Tensor:
    """``ln p`` of the targets under the scheme, ``[rows, 1]``."""
    if sampling.temperature == 0:
        return torch.where(best, 0.0, -math.inf)
    # Less the largest before the division, which would make the rounding of large logits larger.
    scores = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    wanted = scores.gather(1, targets)
    if not 0 < sampling.top_k < scores.shape[1]:
        return wanted - scores.logsumexp(-1, keepdim=True)
    ids = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > wanted) | ((scores == wanted) & (ids < targets))
    kept = scores.topk(sampling.top_k, sorted=False).values.logsumexp(-1, keepdim=True)
    return torch.where(ahead.sum(-1, keepdim=True) < sampling.top_k, wanted - kept, -math.inf)


def _log_softmax(logits: Tensor) -> Tensor:
    """Float32; torch's own adds up a large vocabulary with ten times the error."""
    scores = logits.float()
    return scores - scores.logsumexp(-1, keepdim=True)


def _whole(parts: list[Tensor], tokens: np.ndarray) -> np.ndarray:
    batch, length = tokens.shape
    flat = torch.cat(parts).cpu().numpy() if parts else np.zeros(0, np.float32)
    return flat.reshape(batch, length - 1)
