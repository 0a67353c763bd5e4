"""Low-rank adapters in torch. The file mirrors ``engines/mlx/adapters.py``."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.adapters import Factors, target_modules
from engines.base import LoRASettings
from engines.initialisation import lora_factors
from engines.torch.model import Gemma3, Linear


class LoRALinear(Linear):
    """``x Wᵀ + alpha / rank · dropout(x) Aᵀ Bᵀ`` (Hu et al., arXiv:2106.09685, equation 3); A and B are float32."""

    def __init__(self, base: Linear, lora_a: Tensor, lora_b: Tensor, settings: LoRASettings) -> None:
        nn.Module.__init__(self)
        self.weight = base.weight
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)
        self.scale = settings.scale
        self.dropout = settings.dropout

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        z = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A.to(x.dtype))
        # Added in place: a sum of its own would be the largest tensor of the layer once more. The small copy of B gives
        # its gradient a layout that is multiplied many times faster.
        y = super().forward(rows).addmm_(z, self.lora_B.to(x.dtype).T.contiguous(), alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])

    def merged(self) -> Tensor:
        """The weight with the update added, in float32."""
        return self.weight.float() + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model: Gemma3, settings: LoRASettings, seed: int) -> None:
    """Freeze the model and put fresh adapters on its targets."""
    generator = np.random.default_rng(seed)
    shapes = target_modules(model.config, settings.targets)
    put_lora(model, {m: lora_factors(*shape, settings.rank, generator) for m, shape in shapes.items()}, settings)


def put_lora(model: Gemma3, factors: Factors, settings: LoRASettings) -> None:
    """Freeze the model and put the given adapters on it."""
    model.requires_grad_(False)
    for name, (lora_a, lora_b) in factors.items():
        parent, _, leaf = name.rpartition(".")
        base = cast("Linear", model.get_submodule(name))
        device = base.weight.device
        a, b = (torch.from_numpy(np.ascontiguousarray(f)).to(device) for f in (lora_a, lora_b))
        setattr(model.get_submodule(parent), leaf, LoRALinear(base, a, b, settings))


def lora_layers(model: Gemma3) -> dict[str, LoRALinear]:
    """Adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def factors_of(model: Gemma3) -> Factors:
    """The adapters as numpy arrays."""
    return {
        name: (layer.lora_A.detach().cpu().numpy(), layer.lora_B.detach().cpu().numpy())
        for name, layer in lora_layers(model).items()
    }
