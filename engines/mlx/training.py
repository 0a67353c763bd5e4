"""Loss, gradients and optimizer steps in MLX. The file mirrors ``engines/torch/training.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx import optimizers
from mlx.utils import tree_map

from engines.base import IGNORED, Batch, StepResult, TrainingSettings
from engines.mlx.adapters import add_lora
from engines.mlx.model import Gemma3
from engines.packing import document_positions

LOGITS_BYTES = 8 << 20
"""Logits are made for as many tokens of the vocabulary at a time as fit in this; all of them would be gigabytes."""


def chunked_cross_entropy(hidden: mx.array, weight: mx.array, labels: mx.array, train_weight: bool) -> mx.array:
    """Summed negative log-likelihood of a linear head, a tile of the vocabulary at a time.

    The gradient of a hidden state is the mean row of the head under the model's prediction, less the row of the label:
    softmax attention with the head as keys and values. So the running maximum and sum of flash attention
    (arXiv:2205.14135, algorithm 1) give it in the pass that makes the loss, and no logit is computed twice. Only where
    the head itself is trained does its gradient take a second pass, for which the sums must be known.

    Args:
        hidden: ``[n, d]``.
        weight: ``[vocabulary, d]``.
        labels: ``[n]``.

    Returns:
        A float32 scalar, nats.
    """

    @mx.custom_function
    def loss_and_gradients(hidden: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        count = hidden.shape[0]
        size = max(1, LOGITS_BYTES // (4 * max(1, count)))
        tiles: Any = mx.split(weight, list(range(size, weight.shape[0], size)))
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
        target = weight[labels].astype(hidden.dtype)
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
    embedding = model.model.embed_tokens
    labels = batch.labels.reshape(-1)
    supervised = mx.array(np.flatnonzero(labels != IGNORED))
    hidden = model(mx.array(batch.tokens), None, *_documents(batch)).reshape(-1, model.config.hidden_size)
    train_weight = "weight" in embedding.trainable_parameters()
    weight = embedding.weight if train_weight else mx.stop_gradient(embedding.weight)
    return chunked_cross_entropy(hidden[supervised], weight, mx.array(labels)[supervised], train_weight)


def _documents(batch: Batch) -> tuple[mx.array | None, mx.array | None]:
    """Positions and segments of a packed batch; None for one whose rows are documents."""
    if batch.segments is None:
        return None, None
    return mx.array(document_positions(batch.segments)), mx.array(batch.segments)


def start_training(model: Gemma3, settings: TrainingSettings) -> optimizers.MultiOptimizer:
    """Choose what is trained, keep it in float32, and make its optimizer."""
    mx.random.seed(settings.seed)
    if settings.lora is not None:
        add_lora(model, settings.lora, settings.seed)
    else:
        model.set_dtype(mx.float32)
        model.unfreeze()
    model.checkpoint_activations = settings.checkpoint_activations
    terms = {
        "learning_rate": 0.0,
        "betas": list(settings.optimizer.betas),
        "eps": settings.optimizer.epsilon,
        "bias_correction": True,
    }
    # Norm gains are not matrices: pulling them to zero would pull the gain 1 + w to one for no reason.
    matrices = optimizers.AdamW(weight_decay=settings.optimizer.weight_decay, **terms)
    gains = optimizers.AdamW(weight_decay=0.0, **terms)
    return optimizers.MultiOptimizer([matrices, gains], [lambda path, value: value.ndim > 1])


def train_step(
    model: Gemma3, optimizer: optimizers.MultiOptimizer, batches: Sequence[Batch], learning_rate: float, clip: float
) -> StepResult:
    """One optimizer step; every supervised token of all micro-batches weighs the same."""
    model.train()
    tokens = sum(batch.supervised for batch in batches)
    loss, gradients = 0.0, None
    for batch in batches:
        share, gradient = nn.value_and_grad(model, lambda batch: summed_loss(model, batch) / tokens)(batch)
        gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
        # What is not evaluated keeps its graph, and with it the activations of every micro-batch.
        mx.eval(share, gradients)
        loss += share.item()
    gradients, norm = optimizers.clip_grad_norm(gradients, clip or math.inf)
    applied = math.isfinite(norm.item()) and math.isfinite(loss)
    if applied:
        optimizer.learning_rate = learning_rate
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    return StepResult(loss, tokens, norm.item(), applied)
