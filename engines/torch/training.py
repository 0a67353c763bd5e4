"""Loss, gradients and optimizer steps in torch. The file mirrors ``engines/mlx/training.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import IGNORED, Batch, StepResult, TrainingSettings
from engines.torch.adapters import add_lora
from engines.torch.model import Gemma3

LOGITS_BYTES = 128 << 20
"""Logits are made for as many positions at a time as fit in this; for all of them they would be gigabytes."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed negative log-likelihood of a linear head, never holding all logits.

    The gradients of the hidden states, and of the head where it is trained, are made in the same pass as the loss,
    since the logits are at hand then and would have to be computed again later.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """``hidden [n, d]``, ``weight [vocabulary, d]``, ``labels [n]`` to a float32 scalar, nats."""
        total = torch.zeros((), device=hidden.device)
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        rows = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], labels[start : start + rows, None]
            scores = F.log_softmax(F.linear(part, head).float(), dim=-1)
            total -= scores.gather(1, target).sum()
            if grad_hidden is None:
                continue
            error = scores.exp_()
            error.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=error.dtype))
            error = error.to(hidden.dtype)
            torch.mm(error, head, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += error.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the gradients made on the way forward."""
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = outputs[0]
        scaled = None if grad_weight is None else grad_weight.mul_(scale)
        return None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype), scaled, None


def summed_loss(model: Gemma3, batch: Batch) -> Tensor:
    """Negative log-likelihood summed over the supervised tokens of a batch, nats."""
    weight = model.model.embed_tokens.weight
    tokens = torch.from_numpy(batch.tokens).to(weight.device, torch.long)
    labels = torch.from_numpy(batch.labels).to(weight.device, torch.long).flatten()
    supervised = (labels != IGNORED).nonzero().squeeze(1)
    hidden = model(tokens).flatten(0, 1)
    return ChunkedCrossEntropy.apply(hidden[supervised], weight, labels[supervised])


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
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=settings.betas, eps=settings.epsilon)


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
