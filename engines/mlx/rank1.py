"""A fresh rank-1 update per matrix and step, in MLX. The file mirrors ``engines/torch/rank1.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engines.adapters import target_modules
from engines.initialisation import unit_vector
from engines.mlx.model import Gemma3, Linear
from engines.mlx.observing import unit, watched
from engines.training import LINEARS, Rank1Settings

Times = Callable[[mx.array], mx.array]


class Rank1Linear(Linear):
    """``x Wᵀ + x v bᵀ``: a float32 weight and the update ``b vᵀ`` that is not merged yet.

    The gradient G of the weight is never formed where one micro-batch makes a step: G v = Δᵀ (X v) and
    Gᵀ u = Xᵀ (Δ u), from the inputs X and the gradients Δ of the outputs. ``lora_A [1, in]`` is v, ``lora_B [out, 1]``
    is b; the way back gives the v and the G v of this step as their gradients. With several micro-batches, error
    feedback or momentum the gradient is formed as the weight's own.

    Attributes:
        pending: whether b is not zero. Then v stays until the next merge, and only b goes on.
        buffer: ``[out, in]`` of error feedback and momentum, if there are any.
    """

    def __init__(self, base: Linear, settings: Rank1Settings, v: mx.array) -> None:
        nn.Module.__init__(self)
        self.weight = base.weight.astype(mx.float32)
        self.lora_A = v[None]
        self.lora_B = mx.zeros((self.weight.shape[0], 1))
        self.settings = settings
        self.pending = False
        self.buffer = mx.zeros(self.weight.shape) if settings.buffered else None
        self.scale = 1.0
        self.freeze(recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.weight.astype(x.dtype).T
        if self.pending:
            a, b = mx.stop_gradient(self.lora_A).astype(x.dtype), mx.stop_gradient(self.lora_B).astype(x.dtype)
            y = mx.addmm(y, rows @ a.T, b.T)
        if "lora_A" in self.trainable_parameters():
            y = watched(self._see, rows, y, self.lora_A, self.lora_B)
        return y.reshape(*x.shape[:-1], -1)

    def form_gradient(self, formed: bool) -> None:
        """Choose between the gradient itself and its products with two vectors."""
        self.freeze(recurse=False)
        self.unfreeze(recurse=False, keys=["weight"] if formed else ["lora_A", "lora_B"])

    def found(self, gradients: Mapping[str, mx.array], name: str) -> tuple[mx.array, mx.array]:
        """After the way back: v of unit length ``[in]`` and ``G v [out]``; G is what the buffer holds as well."""
        gradient = gradients.get(f"{name}.weight")
        if gradient is None:
            return gradients[f"{name}.lora_A"][0], gradients[f"{name}.lora_B"][:, 0]
        whole = gradient if self.buffer is None else self.buffer + gradient
        return self._search(lambda v: whole @ v, lambda u: whole.T @ u)

    def update(self, v: mx.array, p: mx.array, learning_rate: float, decay: float, gradient: mx.array | None) -> None:
        """Move b against ``p``, along ``v``; the buffer keeps what its rule leaves of G.

        Args:
            decay: the share of the weight, and of what is not merged yet, that is taken off before.
        """
        if decay:
            self.weight = self.weight * (1 - decay)
            self.lora_B = self.lora_B * (1 - decay)
        self.lora_A = v[None]
        self.lora_B = self.lora_B - learning_rate * unit(p)[:, None] * self.length(p)
        if self.buffer is not None and gradient is not None:
            whole = self.buffer + gradient
            if self.settings.error_feedback:
                # With momentum, the rule of Dion (arXiv:2504.05295, algorithm 1).
                self.buffer = whole - (1 - self.settings.momentum) * p[:, None] * v[None]
            else:
                self.buffer = whole * self.settings.momentum
        self.pending = True

    def descent(self, v: mx.array, p: mx.array) -> mx.array:
        """``<G, f u vᵀ>``, before ``update``: what a step at a rate of one takes off the loss, to first order.

        G is this step's gradient alone, although the step goes along what the buffer holds as well.
        """
        own = p if self.buffer is None else p - self.buffer @ v
        return self.length(p) * (unit(p) * own).sum()

    def length(self, p: mx.array) -> mx.array:
        """How long the step is at a learning rate of one: ``‖G v‖``, or √(out / in) where it is normalised."""
        out, inner = self.weight.shape
        return mx.array(math.sqrt(out / inner)) if self.settings.normalised else mx.linalg.norm(p)

    def merged(self) -> mx.array:
        """The weight with the update added, in float32."""
        return self.weight + self.lora_B @ self.lora_A

    def _see(self, x: mx.array, delta: mx.array) -> tuple[mx.array, mx.array]:
        v, p = self._search(
            lambda v: (delta.T @ (x @ v.astype(x.dtype))).astype(mx.float32),
            lambda u: (x.T @ (delta @ u.astype(x.dtype))).astype(mx.float32),
        )
        return v[None], p[:, None]

    def _search(self, times: Times, transposed: Times) -> tuple[mx.array, mx.array]:
        v = mx.stop_gradient(self.lora_A)[0]
        if self.settings.mode == "power" and not self.pending:
            for _ in range(self.settings.iterations):
                v = unit(transposed(unit(times(v))))
        return v, times(v)


def put_rank1(model: Gemma3, settings: Rank1Settings, seed: int) -> None:
    """Freeze the model and let its targets find rank-1 updates."""
    model.freeze()
    generator = np.random.default_rng(seed)
    for name, (_, inner) in target_modules(model.config, settings.targets, settings.layers).items():
        _, _, layer, block, leaf = name.split(".")
        parent = model.model.layers[int(layer)][block]
        parent[leaf] = Rank1Linear(parent[leaf], settings, mx.array(unit_vector(inner, generator)))


def rank1_layers(model: Gemma3) -> dict[str, Rank1Linear]:
    """Linears that find rank-1 updates, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Rank1Linear)}
    return {name: found[name] for name in target_modules(model.config, LINEARS) if name in found}


def draw(layers: dict[str, Rank1Linear], seed: int, step: int) -> None:
    """New random directions for a sketch; those whose update is not merged yet keep theirs."""
    generator = np.random.default_rng([seed, step])
    for layer in layers.values():
        v = unit_vector(layer.weight.shape[1], generator)
        if not layer.pending:
            layer.lora_A = mx.array(v)[None]
