"""Loss, gradients and optimizer steps in torch. The file mirrors ``engines/mlx/training.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import IGNORED, Batch, StepResult, TrainingSettings
from engines.packing import document_positions
from engines.torch.adapters import add_lora
from engines.torch.model import Gemma3

LOGITS_BYTES = 8 << 20
"""Logits are made for as many tokens of the vocabulary at a time as fit in this; all of them would be gigabytes."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed negative log-likelihood of a linear head, a tile of the vocabulary at a time.

    The gradient of a hidden state is the mean row of the head under the model's prediction, less the row of the label:
    softmax attention with the head as keys and values. So the running maximum and sum of flash attention
    (arXiv:2205.14135, algorithm 1) give it in the pass that makes the loss, and no logit is computed twice. Only where
    the head itself is trained does its gradient take a second pass, for which the sums must be known.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """``hidden [n, d]``, ``weight [vocabulary, d]``, ``labels [n]`` to a float32 scalar, nats."""
        count = hidden.shape[0]
        tiles = weight.split(max(1, LOGITS_BYTES // (4 * max(1, count))))
        top = torch.full((count, 1), -math.inf, device=hidden.device)
        mass = torch.zeros_like(top)
        mean_row = torch.zeros_like(hidden, dtype=torch.float32)
        for tile in tiles:
            rows = tile.to(hidden.dtype)
            scores = F.linear(hidden, rows).float()
            peak = torch.maximum(top, scores.amax(dim=1, keepdim=True))
            kept = (top - peak).exp_()
            scores.sub_(peak).exp_()
            mass = mass * kept + scores.sum(dim=1, keepdim=True)
            if ctx.needs_input_grad[0]:
                mean_row.mul_(kept).add_(scores.to(rows.dtype) @ rows)
            top = peak
        target = weight[labels].to(hidden.dtype)
        label_score = (hidden.float() * target.float()).sum(dim=1, keepdim=True).to(hidden.dtype).float()
        partition = top + mass.log()
        grad_hidden = (mean_row / mass - target).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _head_gradient(hidden, tiles, labels, partition) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (partition - label_score).sum()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the gradients made on the way forward."""
        scaled = [None if g is None else g.mul_(outputs[0].to(g.dtype)) for g in ctx.saved_tensors]
        return scaled[0], scaled[1], None


def _head_gradient(hidden: Tensor, tiles: Sequence[Tensor], labels: Tensor, partition: Tensor) -> Tensor:
    """``(softmax - onehot)ᵀ hidden``, float32 ``[vocabulary, d]``; ``partition [n, 1]`` is the log of the sum."""
    parts = []
    for tile in tiles:
        probabilities = (F.linear(hidden, tile.to(hidden.dtype)).float() - partition).exp_()
        parts.append((probabilities.to(hidden.dtype).T @ hidden).float())
    return torch.cat(parts).index_add_(0, labels, hidden.float(), alpha=-1)


def summed_loss(model: Gemma3, batch: Batch) -> Tensor:
    """Negative log-likelihood summed over the supervised tokens of a batch, nats."""
    weight = model.model.embed_tokens.weight
    tokens = torch.from_numpy(batch.tokens).to(weight.device, torch.long)
    labels = torch.from_numpy(batch.labels).to(weight.device, torch.long).flatten()
    supervised = (labels != IGNORED).nonzero().squeeze(1)
    hidden = model(tokens, None, *_documents(batch, weight.device)).flatten(0, 1)
    return ChunkedCrossEntropy.apply(hidden[supervised], weight, labels[supervised])


def _documents(batch: Batch, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Positions and segments of a packed batch; None for one whose rows are documents."""
    if batch.segments is None:
        return None, None
    positions = torch.from_numpy(document_positions(batch.segments)).to(device)
    return positions, torch.from_numpy(batch.segments).to(device)


def start_training(model: Gemma3, settings: TrainingSettings) -> torch.optim.AdamW:
    """Choose what is trained, keep it in float32, and make its optimizer."""
    torch.manual_seed(settings.seed)
    if settings.lora is not None:
        add_lora(model, settings.lora, settings.seed)
    else:
        model.float()
        model.requires_grad_(True)
    model.checkpoint_activations = settings.checkpoint_activations
    trained = [p for p in model.parameters() if p.requires_grad]
    # Norm gains are not matrices: pulling them to zero would pull the gain 1 + w to one for no reason.
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.optimizer.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=0.0, betas=settings.optimizer.betas, eps=settings.optimizer.epsilon
    )


def train_step(
    model: Gemma3, optimizer: torch.optim.AdamW, batches: Sequence[Batch], learning_rate: float, clip: float
) -> StepResult:
    """One optimizer step; every supervised token of all micro-batches weighs the same."""
    model.train()
    tokens = sum(batch.supervised for batch in batches)
    loss = 0.0
    for batch in batches:
        share = summed_loss(model, batch) / tokens
        share.backward()
        loss += share.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf))
    applied = math.isfinite(norm) and math.isfinite(loss)
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, tokens, norm, applied)
