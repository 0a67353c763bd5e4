"""Loss, gradients and optimizer steps in torch. The file mirrors ``engines/mlx/training.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.blocks import Noise
from engines.packing import document_positions
from engines.torch import merging, optimizers
from engines.torch.adapters import add_lora, lora_layers
from engines.torch.attention import Layout, doubled, packed
from engines.torch.model import Gemma3
from engines.torch.observing import observed
from engines.torch.rank1 import draw, put_rank1, rank1_layers
from engines.training import IGNORED, Batch, StepResult, TrainingSettings, vocabulary_tile


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
        tiles = weight.split(vocabulary_tile(count))
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
    tokens = _tensor(batch.tokens, model)
    return _cross_entropy(model, model(tokens, None, _documents(batch, model)), batch.labels)


def summed_losses(model: Gemma3, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
    """The same, and that of the masked tokens, which the copy beside the text predicts at their own places, nats."""
    length, copied = batch.tokens.shape[1], noise.tokens.shape[1]
    tokens = _tensor(np.concatenate((batch.tokens, noise.tokens), axis=1), model)
    hidden = model(tokens, None, doubled(length, copied, noise.block, model.config.sliding_window, tokens.device))
    text, copy = hidden.split((length, copied), dim=1)
    return _cross_entropy(model, text, batch.labels), _cross_entropy(model, copy, noise.labels)


def _cross_entropy(model: Gemma3, hidden: Tensor, labels: np.ndarray) -> Tensor:
    targets = _tensor(labels, model).flatten()
    supervised = (targets != IGNORED).nonzero().squeeze(1)
    weight = model.model.embed_tokens.weight
    return ChunkedCrossEntropy.apply(hidden.flatten(0, 1)[supervised], weight, targets[supervised])


def _tensor(ids: np.ndarray, model: Gemma3) -> Tensor:
    return torch.from_numpy(ids).to(model.model.embed_tokens.weight.device, torch.long)


def _documents(batch: Batch, model: Gemma3) -> Layout | None:
    """Where the tokens of a packed batch stand; None for one whose rows are documents."""
    if batch.segments is None:
        return None
    positions = _tensor(document_positions(batch.segments), model)
    return packed(positions, _tensor(batch.segments, model), model.config.sliding_window)


def objective(model: Gemma3, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What is made smaller, summed over a batch, and the losses of the text and of its masked tokens, nats."""
    noise = batch.noise
    if noise is None or not batch.masked:
        loss = summed_loss(model, batch)
        return loss if noise is None else loss * noise.next_token_weight, loss, torch.zeros(())
    loss, masked = summed_losses(model, batch, noise)
    return noise.next_token_weight * loss + noise.masked_weight * masked, loss, masked


@dataclass
class Training:
    """What training holds beside the model.

    Attributes:
        trained: what the optimizers update, by Hugging Face's names.
        step: optimizer steps taken, those that were left out too.
        seen: for each observed matrix its leading singular vectors u and v.
    """

    settings: TrainingSettings
    trained: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def start_training(model: Gemma3, settings: TrainingSettings) -> Training:
    """Choose what is trained, keep it in float32, and make its optimizer."""
    torch.manual_seed(settings.seed)
    merging.fold(model)
    if settings.lora is not None:
        add_lora(model, settings.lora, settings.seed)
        if settings.merging:
            merging.keep_masters(model)
    elif settings.rank1 is not None:
        put_rank1(model, settings.rank1, settings.seed)
    if settings.rest or (settings.lora is None and settings.rank1 is None):
        _train_rest(model)
    model.checkpoint_activations = settings.checkpoint_activations
    slots = {id(p) for layer in rank1_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in slots}
    return Training(settings, trained, optimizers.make_optimizers(trained, settings.optimizer))


def _train_rest(model: Gemma3) -> None:
    """Train every parameter that no adapter stands for."""
    taken = {id(p) for m in (lora_layers(model) | rank1_layers(model)).values() for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in taken:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def train_step(
    model: Gemma3, training: Training, batches: Sequence[Batch], learning_rate: float, observe: bool
) -> StepResult:
    """One optimizer step; every supervised token of all micro-batches weighs the same."""
    settings, merged = training.settings, rank1_layers(model)
    model.train()
    model.zero_grad(set_to_none=True)  # a step that ran out of memory may have left some
    training.step += 1
    if settings.rank1 is not None:
        formed = settings.rank1.buffered or len(batches) > 1
        for layer in merged.values():
            layer.form_gradient(formed)
        if settings.rank1.mode == "sketch":
            draw(merged, settings.seed, training.step)

    tokens, masked_tokens = sum(b.supervised for b in batches), sum(b.masked for b in batches)
    loss, masked, facts = 0.0, 0.0, None
    for batch in batches:
        with observed(model, training.seen, observe and facts is None) as found:
            total, text, copy = objective(model, batch)
            (total / tokens).backward()
        facts = facts or found
        loss, masked = loss + (text / tokens).item(), masked + (copy / max(1, masked_tokens)).item()

    # Clipping comes before a buffer: after it, a buffer would either lose what was clipped or grow without bound.
    buffered = [layer.weight for layer in merged.values() if layer.buffer is not None]
    gradients = [p.grad for p in (*training.trained.values(), *buffered) if p.grad is not None]
    pairs = {} if buffered else {name: layer.found() for name, layer in merged.items()}
    squares = [g.square().sum() for g in (*gradients, *(p for _, p in pairs.values()))]
    norm = float(torch.stack(squares).sum().sqrt())
    applied = math.isfinite(norm) and math.isfinite(loss + masked)
    predicted = None
    if applied:
        scale = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
        before = {n: p.detach().clone() for n, p in training.trained.items()} if observe else {}
        for gradient in gradients if scale < 1 else []:
            gradient.mul_(scale)
        optimizers.step(training.optimizers, training.trained, learning_rate, settings.optimizer.weight_decay)
        stride, decay = _stride(settings, learning_rate, scale), learning_rate * settings.optimizer.weight_decay
        pairs = pairs or {name: layer.found() for name, layer in merged.items()}
        if observe:
            descent = sum(float(merged[name].descent(v, p)) for name, (v, p) in pairs.items())
            predicted = _predicted(training.trained, before, scale) + stride * descent / (scale if buffered else 1.0)
        for name, (v, p) in pairs.items():
            merged[name].update(v, p, stride, decay)
    model.zero_grad(set_to_none=True)
    return StepResult(loss, tokens, norm, applied, facts or None, predicted, masked if masked_tokens else None)


def _stride(settings: TrainingSettings, learning_rate: float, scale: float) -> float:
    """The learning rate of rank-1 updates, shortened where clipping has not scaled the gradient itself.

    A step of fixed length has nothing that could be shortened.
    """
    if settings.rank1 is None:
        return 0.0
    whole = settings.rank1.normalised or settings.rank1.buffered
    return learning_rate * settings.rank1.rate * (1.0 if whole else scale)


def _predicted(trained: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], scale: float) -> float:
    """``-<g, p - p_before>`` over what the optimizers changed; the gradients were scaled."""
    return -sum(
        float((parameter.grad / scale * (parameter.detach() - before[name])).sum())
        for name, parameter in trained.items()
        if parameter.grad is not None
    )
