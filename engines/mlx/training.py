"""Loss, gradients and optimizer steps in MLX. The file mirrors ``engines/torch/training.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from engines.blocks import Noise
from engines.mlx import merging, optimizers
from engines.mlx.adapters import add_lora, lora_layers
from engines.mlx.attention import Layout, doubled, packed
from engines.mlx.device import number
from engines.mlx.model import Embedding, Gemma3
from engines.mlx.observing import observed
from engines.mlx.rank1 import draw, put_rank1, rank1_layers
from engines.packing import document_positions
from engines.training import IGNORED, Batch, StepResult, TrainingSettings, vocabulary_tile


def chunked_cross_entropy(
    hidden: mx.array, weight: mx.array, labels: mx.array, train_weight: bool, packed: Embedding | None = None
) -> mx.array:
    """Summed negative log-likelihood of a linear head, a tile of the vocabulary at a time.

    The gradient of a hidden state is the mean row of the head under the model's prediction, less the row of the label:
    softmax attention with the head as keys and values. So the running maximum and sum of flash attention
    (arXiv:2205.14135, algorithm 1) give it in the pass that makes the loss, and no logit is computed twice. Only where
    the head itself is trained does its gradient take a second pass, for which the sums must be known.

    Args:
        hidden: ``[n, d]``.
        weight: ``[vocabulary, d]``.
        labels: ``[n]``.
        packed: the head in place of ``weight``, where that holds packed numbers; a tile of it is unpacked at a time.

    Returns:
        A float32 scalar, nats.
    """

    @mx.custom_function
    def loss_and_gradients(hidden: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        count = hidden.shape[0]
        size = vocabulary_tile(count)
        starts = range(0, weight.shape[0], size)
        rows_of: Any = weight.__getitem__ if packed is None else packed.rows
        tiles = [rows_of(slice(start, start + size)) for start in starts]
        top = mx.full((count, 1), -math.inf)
        mass = mx.zeros((count, 1))
        mean_row = mx.zeros(hidden.shape)
        for tile in tiles:
            rows = tile.astype(hidden.dtype)
            scores = (hidden @ rows.T).astype(mx.float32)
            peak = mx.maximum(top, scores.max(axis=1, keepdims=True))
            kept = mx.exp(top - peak)
            scores = mx.exp(scores - peak)
            mass = mass * kept + scores.sum(axis=1, keepdims=True)
            mean_row = mean_row * kept + scores.astype(rows.dtype) @ rows
            top = peak
        target = rows_of(labels).astype(hidden.dtype)
        label_score = (hidden.astype(mx.float32) * target.astype(mx.float32)).sum(axis=1, keepdims=True)
        partition = top + mx.log(mass)
        grad_hidden = (mean_row / mass - target).astype(hidden.dtype)
        grad_weight = _head_gradient(hidden, tiles, labels, partition) if train_weight else mx.zeros((1,))
        loss = (partition - label_score.astype(hidden.dtype).astype(mx.float32)).sum()
        return loss, grad_hidden, grad_weight

    @loss_and_gradients.vjp
    def scaled(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
        """Scale the gradients made on the way forward."""
        hidden, weight = primals
        _, grad_hidden, grad_weight = outputs
        scale = cotangents[0]
        head = scale * grad_weight if train_weight else mx.zeros_like(weight)
        return (scale * grad_hidden).astype(hidden.dtype), head.astype(weight.dtype)

    outputs: Any = loss_and_gradients(hidden, weight)
    return outputs[0]


def _head_gradient(hidden: mx.array, tiles: Sequence[mx.array], labels: mx.array, partition: mx.array) -> mx.array:
    """``(softmax - onehot)ᵀ hidden``, float32 ``[vocabulary, d]``; ``partition [n, 1]`` is the log of the sum."""
    parts = []
    for tile in tiles:
        probabilities = mx.exp((hidden @ tile.astype(hidden.dtype).T).astype(mx.float32) - partition)
        parts.append((probabilities.astype(hidden.dtype).T @ hidden).astype(mx.float32))
    return mx.concatenate(parts).at[labels].add(-hidden.astype(mx.float32))


def summed_loss(model: Gemma3, batch: Batch) -> mx.array:
    """Negative log-likelihood summed over the supervised tokens of a batch, nats."""
    return _cross_entropy(model, model(mx.array(batch.tokens), None, _documents(batch, model)), batch.labels)


def summed_losses(model: Gemma3, batch: Batch, noise: Noise) -> tuple[mx.array, mx.array]:
    """The same, and that of the masked tokens, which the copy beside the text predicts at their own places, nats."""
    length, copied = batch.tokens.shape[1], noise.tokens.shape[1]
    tokens = mx.array(np.concatenate((batch.tokens, noise.tokens), axis=1))
    hidden = model(tokens, None, doubled(length, copied, noise.block, model.config.sliding_window))
    text, copy = hidden[:, :length], hidden[:, length:]
    return _cross_entropy(model, text, batch.labels), _cross_entropy(model, copy, noise.labels)


def _cross_entropy(model: Gemma3, hidden: mx.array, labels: np.ndarray) -> mx.array:
    embedding, targets = model.model.embed_tokens, labels.reshape(-1)
    supervised = mx.array(np.flatnonzero(targets != IGNORED))
    train_weight = "weight" in embedding.trainable_parameters()
    weight = embedding.weight if train_weight else mx.stop_gradient(embedding.weight)
    chosen = hidden.reshape(-1, hidden.shape[-1])[supervised]
    packed = embedding if embedding.packing is not None else None
    return chunked_cross_entropy(chosen, weight, mx.array(targets)[supervised], train_weight, packed)


def _documents(batch: Batch, model: Gemma3) -> Layout | None:
    """Where the tokens of a packed batch stand; None for one whose rows are documents."""
    if batch.segments is None:
        return None
    positions = mx.array(document_positions(batch.segments))
    return packed(positions, mx.array(batch.segments), model.config.sliding_window)


def objective(model: Gemma3, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """What is made smaller, summed over a batch, and the losses of the text and of its masked tokens, nats."""
    noise = batch.noise
    if noise is None or not batch.masked:
        loss = summed_loss(model, batch)
        return loss if noise is None else loss * noise.next_token_weight, loss, mx.array(0.0)
    loss, masked = summed_losses(model, batch, noise)
    return noise.next_token_weight * loss + noise.masked_weight * masked, loss, masked


@dataclass
class Training:
    """What training holds beside the model.

    Attributes:
        trained: what the optimizer updates, by Hugging Face's names.
        step: optimizer steps taken, those that were left out too.
        seen: for each observed matrix its leading singular vectors u and v.
    """

    settings: TrainingSettings
    trained: frozenset[str]
    optimizer: Optimizer
    step: int = 0
    seen: dict[str, tuple[mx.array, mx.array]] = field(default_factory=dict)


def start_training(model: Gemma3, settings: TrainingSettings) -> Training:
    """Choose what is trained, keep it in float32, and make its optimizer."""
    mx.random.seed(settings.seed)
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
    trained = frozenset(name for name, _ in tree_flatten(model.trainable_parameters()))
    for layer in rank1_layers(model).values():
        layer.form_gradient(False)
    return Training(settings, trained, optimizers.make_optimizer(settings.optimizer))


def _train_rest(model: Gemma3) -> None:
    """Train every parameter that no adapter stands for."""
    taken = {id(module) for module in (lora_layers(model) | rank1_layers(model)).values()}
    for module in model.modules():
        if id(module) not in taken and "weight" in module:
            module.weight = module.weight.astype(mx.float32)
            module.unfreeze(recurse=False, keys=["weight"])


def train_step(
    model: Gemma3, training: Training, batches: Sequence[Batch], learning_rate: float, observe: bool
) -> StepResult:
    """One optimizer step; every supervised token of all micro-batches weighs the same."""
    settings, merged = training.settings, rank1_layers(model)
    model.train()
    training.step += 1
    if settings.rank1 is not None:
        formed = settings.rank1.buffered or len(batches) > 1
        for layer in merged.values():
            layer.form_gradient(formed)
        if settings.rank1.mode == "sketch":
            draw(merged, settings.seed, training.step)

    tokens, masked_tokens = sum(b.supervised for b in batches), sum(b.masked for b in batches)
    loss, masked, facts = 0.0, 0.0, None
    gradients: dict[str, mx.array] = {}
    for batch in batches:
        with observed(model, training.seen, observe and facts is None) as found:
            (_, text, copy), tree = nn.value_and_grad(model, lambda batch: _shares(model, batch, tokens))(batch)
            flat = dict(tree_flatten(tree))
            gradients = {name: gradients[name] + g if name in gradients else g for name, g in flat.items()}
            # What is not evaluated keeps its graph, and with it the activations of every micro-batch.
            mx.eval(text, copy, gradients)
        facts = facts or found
        loss, masked = loss + number(text / tokens), masked + number(copy / max(1, masked_tokens))

    # Clipping comes before a buffer: after it, a buffer would either lose what was clipped or grow without bound.
    buffered = {f"{name}.weight" for name, layer in merged.items() if layer.buffer is not None}
    pairs = {} if buffered else {name: layer.found(gradients, name) for name, layer in merged.items()}
    gradients = {name: g for name, g in gradients.items() if name in training.trained or name in buffered}
    squares = [g.square().sum() for g in (*gradients.values(), *(p for _, p in pairs.values()))]
    norm = number(mx.sqrt(mx.stack(squares).sum()))
    applied = math.isfinite(norm) and math.isfinite(loss + masked)
    predicted = None
    if applied:
        scale = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
        parameters = dict(tree_flatten(model.trainable_parameters()))
        own = {name: g for name, g in gradients.items() if name in training.trained}
        before = {name: parameters[name] for name in own} if observe else {}
        clipped = {name: g * scale for name, g in gradients.items()} if scale < 1 else gradients
        optimizers.step(
            training.optimizer, model, {n: clipped[n] for n in own}, learning_rate, settings.optimizer.weight_decay
        )
        stride, decay = _stride(settings, learning_rate, scale), learning_rate * settings.optimizer.weight_decay
        pairs = pairs or {name: layer.found(clipped, name) for name, layer in merged.items()}
        if observe:
            descent = sum(number(merged[name].descent(v, p)) for name, (v, p) in pairs.items())
            predicted = _predicted(model, own, before) + stride * descent / (scale if buffered else 1.0)
        for name, (v, p) in pairs.items():
            merged[name].update(v, p, stride, decay, clipped.get(f"{name}.weight"))
        mx.eval(model.parameters(), [layer.buffer for layer in merged.values() if layer.buffer is not None])
    return StepResult(loss, tokens, norm, applied, facts or None, predicted, masked if masked_tokens else None)


def _shares(model: Gemma3, batch: Batch, tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    total, text, copy = objective(model, batch)
    return total / tokens, text, copy


def _stride(settings: TrainingSettings, learning_rate: float, scale: float) -> float:
    """The learning rate of rank-1 updates, shortened where clipping has not scaled the gradient itself.

    A step of fixed length has nothing that could be shortened.
    """
    if settings.rank1 is None:
        return 0.0
    whole = settings.rank1.normalised or settings.rank1.buffered
    return learning_rate * settings.rank1.rate * (1.0 if whole else scale)


def _predicted(model: Gemma3, gradients: Mapping[str, mx.array], before: Mapping[str, mx.array]) -> float:
    """``-<g, p - p_before>`` over what the optimizer changed."""
    after = dict(tree_flatten(model.trainable_parameters()))
    return -sum(number((g * (after[name] - before[name])).sum()) for name, g in gradients.items())
