"""Low-rank adapters in torch. The file mirrors ``engines/mlx/adapters.py``."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.adapters import Factors, LowRank, target_modules
from engines.initialisation import lora_factors
from engines.torch.model import Gemma3, Linear
from engines.training import LoRASettings


class LoRALinear(Linear):
    """``x Wᵀ + alpha / rank · dropout(x) Aᵀ Bᵀ`` (Hu et al., arXiv:2106.09685, equation 3); A and B are float32.

    Attributes:
        off: whether it computes ``x Wᵀ`` alone for now.
    """

    def __init__(self, base: Linear, lora_a: Tensor, lora_b: Tensor, settings: LoRASettings) -> None:
        nn.Module.__init__(self)
        self.weight = base.weight
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)
        self.scale = settings.scale
        self.off = False
        self.dropout = settings.dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return Linear.forward(self, x)
        rows = x.flatten(0, -2)
        z = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A.to(x.dtype))
        # Added in place: a sum of its own would be the largest tensor of the layer once more. The small copy of B gives
        # its gradient a layout that is multiplied many times faster.
        y = super().forward(rows).addmm_(z, self.lora_B.to(x.dtype).T.contiguous(), alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])

    def merged(self) -> Tensor:
        """The weight with the update added, in float32."""
        return self.weight.float() + self.scale * (self.lora_B @ self.lora_A)


class DoRALinear(LoRALinear):
    """``m · V x / ‖V‖`` with V = W + scale · B A, row by row (Liu et al., arXiv:2402.09353, equation 5).

    ‖V‖ is a constant to the gradient (section 4.3). As in PEFT, dropout changes what the adapter adds to W x, so
    ``dropped`` stands in both terms of the difference.

    Args:
        magnitude: m, float32 ``[out]``; None takes the lengths of the rows of W.
    """

    def __init__(
        self, base: Linear, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, settings: LoRASettings
    ) -> None:
        super().__init__(base, lora_a, lora_b, settings)
        lengths = base.weight.detach().float().norm(dim=1) if magnitude is None else magnitude
        self.lora_magnitude_vector = nn.Parameter(lengths)

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return Linear.forward(self, x)
        rows = x.flatten(0, -2)
        dropped = F.dropout(rows, self.dropout, self.training)
        with torch.no_grad():
            lengths = super().merged().norm(dim=1)
        z = F.linear(dropped, self.lora_A.to(x.dtype))
        y = Linear.forward(self, dropped).addmm_(z, self.lora_B.to(x.dtype).T.contiguous(), alpha=self.scale)
        # In float32, as PEFT does: m / ‖V‖ begins at 1, and bfloat16 has no number between 1 and 1.0078.
        y = (self.lora_magnitude_vector / lengths * y).to(x.dtype)
        if self.training and self.dropout:
            y = y + Linear.forward(self, rows - dropped)
        return y.unflatten(0, x.shape[:-1])

    def merged(self) -> Tensor:
        """The weight with the update added and its rows brought to their lengths, in float32."""
        weight = super().merged()
        return (self.lora_magnitude_vector / weight.norm(dim=1))[:, None] * weight


def add_lora(model: Gemma3, settings: LoRASettings, seed: int) -> None:
    """Freeze the model and put fresh adapters on its targets."""
    generator = np.random.default_rng(seed)
    shapes = target_modules(model.config, settings.targets, settings.layers)
    fresh = {m: LowRank(*lora_factors(*shape, settings.rank, generator)) for m, shape in shapes.items()}
    put_lora(model, fresh, settings)


def put_lora(model: Gemma3, factors: Factors, settings: LoRASettings) -> None:
    """Freeze the model and put the given adapters on it."""
    model.requires_grad_(False)
    for name, low_rank in factors.items():
        parent, _, leaf = name.rpartition(".")
        base = cast("Linear", model.get_submodule(name))
        a, b = (_tensor(f, base.weight.device) for f in (low_rank.lora_A, low_rank.lora_B))
        if settings.dora:
            magnitude = None if low_rank.magnitude is None else _tensor(low_rank.magnitude, base.weight.device)
            layer: LoRALinear = DoRALinear(base, a, b, magnitude, settings)
        else:
            layer = LoRALinear(base, a, b, settings)
        setattr(model.get_submodule(parent), leaf, layer)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def lora_layers(model: Gemma3) -> dict[str, LoRALinear]:
    """Adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def factors_of(model: Gemma3) -> Factors:
    """The adapters as numpy arrays."""
    return {name: LowRank(*(p.detach().cpu().numpy() for p in _trained(m))) for name, m in lora_layers(model).items()}


def _trained(layer: LoRALinear) -> list[Tensor]:
    magnitude = [layer.lora_magnitude_vector] if isinstance(layer, DoRALinear) else []
    return [layer.lora_A, layer.lora_B, *magnitude]
