"""A fresh rank-1 update per matrix and step, in torch. The file mirrors ``engines/mlx/rank1.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.adapters import target_modules
from engines.initialisation import unit_vector
from engines.torch.model import Gemma3, Linear
from engines.torch.observing import unit, watched
from engines.training import Rank1Settings

Times = Callable[[Tensor], Tensor]


class Rank1Linear(Linear):
    """``x Wᵀ + x v bᵀ``: a float32 weight and the update ``b vᵀ`` that is not merged yet.

    The gradient G of the weight is never formed where one micro-batch makes a step: G v = Δᵀ (X v) and
    Gᵀ u = Xᵀ (Δ u), from the inputs X and the gradients Δ of the outputs. ``lora_A [1, in]`` is v, ``lora_B [out, 1]``
    is b; after the way back their ``grad`` hold the v and the G v of this step. With several micro-batches, error
    feedback or momentum the gradient is formed as the weight's own.

    Attributes:
        pending: whether b is not zero. Then v stays until the next merge, and only b goes on.
        buffer: ``[out, in]`` of error feedback and momentum, if there are any.
    """

    def __init__(self, base: Linear, settings: Rank1Settings, v: Tensor) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(base.weight.detach().float(), requires_grad=False)
        self.lora_A = nn.Parameter(v[None])
        self.lora_B = nn.Parameter(v.new_zeros(self.weight.shape[0], 1))
        self.settings = settings
        self.pending = False
        self.buffer = torch.zeros_like(self.weight) if settings.buffered else None
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = F.linear(rows, self.weight.to(x.dtype))
        if self.pending:
            a, b = self.lora_A.detach().to(x.dtype), self.lora_B.detach().to(x.dtype)
            y = torch.addmm(y, rows @ a.T, b.T)
        if torch.is_grad_enabled() and self.lora_A.requires_grad:
            y = watched(self._see, rows, y, self.lora_A, self.lora_B)
        return y.unflatten(0, x.shape[:-1])

    def form_gradient(self, formed: bool) -> None:
        """Choose between the gradient itself and its products with two vectors."""
        self.weight.requires_grad_(formed)
        self.lora_A.requires_grad_(not formed)
        self.lora_B.requires_grad_(not formed)

    def found(self) -> tuple[Tensor, Tensor]:
        """After the way back: v of unit length ``[in]`` and ``G v [out]``; G is what the buffer holds as well."""
        if self.weight.grad is None:
            slots: Any = self.lora_A.grad, self.lora_B.grad
            return slots[0][0], slots[1][:, 0]
        whole = self.weight.grad if self.buffer is None else self.weight.grad.add_(self.buffer)
        return self._search(lambda v: whole @ v, lambda u: whole.T @ u)

    def update(self, v: Tensor, p: Tensor, learning_rate: float, decay: float) -> None:
        """Move b against ``p``, along ``v``; the buffer keeps what its rule leaves of G.

        Args:
            decay: the share of the weight, and of what is not merged yet, that is taken off before.
        """
        with torch.no_grad():
            if decay:
                self.weight.mul_(1 - decay)
                self.lora_B.mul_(1 - decay)
            self.lora_A.copy_(v[None])
            self.lora_B.sub_(unit(p)[:, None] * self.length(p), alpha=learning_rate)
            if self.buffer is not None and self.weight.grad is not None:
                self.buffer.copy_(self.weight.grad)
                if self.settings.error_feedback:
                    # With momentum, the rule of Dion (arXiv:2504.05295, algorithm 1).
                    self.buffer.addr_(p, v, alpha=self.settings.momentum - 1)
                else:
                    self.buffer.mul_(self.settings.momentum)
        self.pending = True

    def descent(self, v: Tensor, p: Tensor) -> Tensor:
        """``<G, f u vᵀ>``, before ``update``: what a step at a rate of one takes off the loss, to first order.

        G is this step's gradient alone, although the step goes along what the buffer holds as well.
        """
        own = p if self.buffer is None else p - self.buffer @ v
        return self.length(p) * (unit(p) * own).sum()

    def length(self, p: Tensor) -> Tensor:
        """How long the step is at a learning rate of one: ``‖G v‖``, or √(out / in) where it is normalised."""
        out, inner = self.weight.shape
        return p.new_tensor(math.sqrt(out / inner)) if self.settings.normalised else p.norm()

    def merged(self) -> Tensor:
        """The weight with the update added, in float32."""
        return self.weight.detach() + self.lora_B.detach() @ self.lora_A.detach()

    def _see(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        v, p = self._search(
            lambda v: (delta.T @ (x @ v.to(x.dtype))).float(), lambda u: (x.T @ (delta @ u.to(x.dtype))).float()
        )
        return v[None], p[:, None]

    def _search(self, times: Times, transposed: Times) -> tuple[Tensor, Tensor]:
        v = self.lora_A.detach()[0]
        if self.settings.mode == "power" and not self.pending:
            for _ in range(self.settings.iterations):
                v = unit(transposed(unit(times(v))))
        return v, times(v)


def put_rank1(model: Gemma3, settings: Rank1Settings, seed: int) -> None:
    """Freeze the model and let its targets find rank-1 updates."""
    model.requires_grad_(False)
    generator = np.random.default_rng(seed)
    for name, (_, inner) in target_modules(model.config, settings.targets, settings.layers).items():
        parent, _, leaf = name.rpartition(".")
        base = cast("Linear", model.get_submodule(name))
        v = torch.from_numpy(unit_vector(inner, generator)).to(base.weight.device)
        setattr(model.get_submodule(parent), leaf, Rank1Linear(base, settings, v))


def rank1_layers(model: Gemma3) -> dict[str, Rank1Linear]:
    """Linears that find rank-1 updates, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Rank1Linear)}


def draw(layers: dict[str, Rank1Linear], seed: int, step: int) -> None:
    """New random directions for a sketch; those whose update is not merged yet keep theirs."""
    generator = np.random.default_rng([seed, step])
    for layer in layers.values():
        v = unit_vector(layer.weight.shape[1], generator)
        if not layer.pending:
            layer.lora_A.data.copy_(torch.from_numpy(v)[None])
