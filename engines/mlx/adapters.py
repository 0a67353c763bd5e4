"""Low-rank adapters in MLX. The file mirrors ``engines/torch/adapters.py``."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engines.adapters import Factors, target_modules
from engines.base import LoRASettings
from engines.initialisation import lora_factors
from engines.mlx.model import Gemma3, Linear


class LoRALinear(Linear):
    """``x Wᵀ + alpha / rank · dropout(x) Aᵀ Bᵀ`` (Hu et al., arXiv:2106.09685, equation 3); A and B are float32."""

    def __init__(self, base: Linear, lora_a: mx.array, lora_b: mx.array, settings: LoRASettings) -> None:
        nn.Module.__init__(self)
        self.weight = base.weight
        self.lora_A = lora_a
        self.lora_B = lora_b
        self.scale = settings.scale
        self.dropout = nn.Dropout(settings.dropout)
        self.freeze(keys=["weight"])

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        z = self.dropout(rows) @ self.lora_A.astype(x.dtype).T
        y = mx.addmm(super().__call__(rows), z, self.lora_B.astype(x.dtype).T, alpha=self.scale)
        return y.reshape(*x.shape[:-1], -1)

    def merged(self) -> mx.array:
        """The weight with the update added, in float32."""
        return self.weight.astype(mx.float32) + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model: Gemma3, settings: LoRASettings, seed: int) -> None:
    """Freeze the model and put fresh adapters on its targets."""
    generator = np.random.default_rng(seed)
    shapes = target_modules(model.config, settings.targets)
    put_lora(model, {m: lora_factors(*shape, settings.rank, generator) for m, shape in shapes.items()}, settings)


def put_lora(model: Gemma3, factors: Factors, settings: LoRASettings) -> None:
    """Freeze the model and put the given adapters on it."""
    model.freeze()
    for name, (lora_a, lora_b) in factors.items():
        _, _, layer, block, leaf = name.split(".")
        parent = model.model.layers[int(layer)][block]
        a, b = (mx.array(np.ascontiguousarray(f)) for f in (lora_a, lora_b))
        parent[leaf] = LoRALinear(parent[leaf], a, b, settings)


def lora_layers(model: Gemma3) -> dict[str, LoRALinear]:
    """Adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def factors_of(model: Gemma3) -> Factors:
    """The adapters as numpy arrays."""
    return {name: (np.array(layer.lora_A), np.array(layer.lora_B)) for name, layer in lora_layers(model).items()}
