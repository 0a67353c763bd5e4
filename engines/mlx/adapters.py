"""Low-rank adapters in MLX. The file mirrors ``engines/torch/adapters.py``."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engines.adapters import Factors, LowRank, target_modules
from engines.initialisation import lora_factors
from engines.mlx.model import Gemma3, Linear
from engines.training import LINEARS, LoRASettings


class LoRALinear(Linear):
    """``x Wᵀ + alpha / rank · dropout(x) Aᵀ Bᵀ`` (Hu et al., arXiv:2106.09685, equation 3); A and B are float32.

    Attributes:
        off: whether it computes ``x Wᵀ`` alone for now.
    """

    def __init__(self, base: Linear, lora_a: mx.array, lora_b: mx.array, settings: LoRASettings) -> None:
        nn.Module.__init__(self)
        self.share(base)
        self.lora_A = lora_a
        self.lora_B = lora_b
        self.scale = settings.scale
        self.off = False
        self.dropout = nn.Dropout(settings.dropout)
        self.freeze(keys=["weight", "scales", "biases"])

    def __call__(self, x: mx.array) -> mx.array:
        if self.off:
            return Linear.__call__(self, x)
        rows = x.reshape(-1, x.shape[-1])
        z = self.dropout(rows) @ self.lora_A.astype(x.dtype).T
        y = mx.addmm(super().__call__(rows), z, self.lora_B.astype(x.dtype).T, alpha=self.scale)
        return y.reshape(*x.shape[:-1], -1)

    def merged(self) -> mx.array:
        """The weight with the update added, in float32."""
        return self.dense() + self.scale * (self.lora_B @ self.lora_A)


class DoRALinear(LoRALinear):
    """``m · V x / ‖V‖`` with V = W + scale · B A, row by row (Liu et al., arXiv:2402.09353, equation 5).

    ‖V‖ is a constant to the gradient (section 4.3). As in PEFT, dropout changes what the adapter adds to W x, so
    ``dropped`` stands in both terms of the difference.

    Args:
        magnitude: m, float32 ``[out]``; None takes the lengths of the rows of W.
    """

    def __init__(
        self, base: Linear, lora_a: mx.array, lora_b: mx.array, magnitude: mx.array | None, settings: LoRASettings
    ) -> None:
        super().__init__(base, lora_a, lora_b, settings)
        lengths = mx.linalg.norm(base.dense(), axis=1) if magnitude is None else magnitude
        self.lora_magnitude_vector = lengths

    def __call__(self, x: mx.array) -> mx.array:
        if self.off:
            return Linear.__call__(self, x)
        rows = x.reshape(-1, x.shape[-1])
        dropped = self.dropout(rows)
        lengths = mx.stop_gradient(mx.linalg.norm(super().merged(), axis=1))
        z = dropped @ self.lora_A.astype(x.dtype).T
        y = mx.addmm(Linear.__call__(self, dropped), z, self.lora_B.astype(x.dtype).T, alpha=self.scale)
        # In float32, as PEFT does: m / ‖V‖ begins at 1, and bfloat16 has no number between 1 and 1.0078.
        y = (self.lora_magnitude_vector / lengths * y).astype(x.dtype)
        if dropped is not rows:
            y = y + Linear.__call__(self, rows - dropped)
        return y.reshape(*x.shape[:-1], -1)

    def merged(self) -> mx.array:
        """The weight with the update added and its rows brought to their lengths, in float32."""
        weight = super().merged()
        return (self.lora_magnitude_vector / mx.linalg.norm(weight, axis=1))[:, None] * weight


def add_lora(model: Gemma3, settings: LoRASettings, seed: int) -> None:
    """Freeze the model and put fresh adapters on its targets."""
    generator = np.random.default_rng(seed)
    shapes = target_modules(model.config, settings.targets, settings.layers)
    fresh = {m: LowRank(*lora_factors(*shape, settings.rank, generator)) for m, shape in shapes.items()}
    put_lora(model, fresh, settings)


def put_lora(model: Gemma3, factors: Factors, settings: LoRASettings) -> None:
    """Freeze the model and put the given adapters on it."""
    model.freeze()
    for name, low_rank in factors.items():
        _, _, index, block, leaf = name.split(".")
        parent = model.model.layers[int(index)][block]
        a, b = (_array(f) for f in (low_rank.lora_A, low_rank.lora_B))
        if settings.dora:
            magnitude = None if low_rank.magnitude is None else _array(low_rank.magnitude)
            layer: LoRALinear = DoRALinear(parent[leaf], a, b, magnitude, settings)
        else:
            layer = LoRALinear(parent[leaf], a, b, settings)
        parent[leaf] = layer


def _array(array: np.ndarray) -> mx.array:
    return mx.array(np.ascontiguousarray(array))


def lora_layers(model: Gemma3) -> dict[str, LoRALinear]:
    """Adapted linears by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {name: found[name] for name in target_modules(model.config, LINEARS) if name in found}


def factors_of(model: Gemma3) -> Factors:
    """The adapters as numpy arrays."""
    return {name: LowRank(*(np.array(p) for p in _trained(m))) for name, m in lora_layers(model).items()}


def _trained(layer: LoRALinear) -> list[mx.array]:
    magnitude = [layer.lora_magnitude_vector] if isinstance(layer, DoRALinear) else []
    return [layer.lora_A, layer.lora_B, *magnitude]
