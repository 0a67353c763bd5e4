"""Adapters into weights, in torch. The file mirrors ``engines/mlx/merging.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from engines.errors import UnsupportedError
from engines.initialisation import lora_factors
from engines.pruning import check_reset
from engines.torch.adapters import DoRALinear, LoRALinear, lora_layers
from engines.torch.model import Gemma3, Linear
from engines.torch.observing import unit
from engines.torch.rank1 import Rank1Linear, rank1_layers
from engines.training import Merge


def keep_masters(model: Gemma3) -> None:
    """Keep the weights below all adapters in float32: bfloat16 would lose most of a small update (83 % at rms 1e-5)."""
    for layer in lora_layers(model).values():
        layer.weight = nn.Parameter(layer.weight.detach().float(), requires_grad=False)


def merge(model: Gemma3, reset: str, seed: int, count: bool) -> Merge:
    """Add every update to its weight; ``lora_B`` turns zero, and ``lora_A`` what ``reset`` says.

    The direction of a rank-1 update stays, whatever ``reset`` says: the next search begins there.

    Raises:
        UnsupportedError: there is nothing to merge, the weights are not float32, the adapters are DoRA's, or there is
            no such reset.
    """
    layers: dict[str, LoRALinear | Rank1Linear] = {**lora_layers(model), **rank1_layers(model)}
    if not layers or any(layer.weight.dtype != torch.float32 for layer in layers.values()):
        raise UnsupportedError("there are no adapters over float32 weights to merge: start training with merging")
    check_reset(reset, max(layer.lora_A.shape[0] for layer in layers.values()))
    if any(isinstance(layer, DoRALinear) for layer in layers.values()):
        raise UnsupportedError("dora cannot be merged, since its magnitudes go into no weight: take plain adapters")
    generator = np.random.default_rng(seed)
    squares, changed, total = 0.0, 0, 0
    for layer in layers.values():
        a, b, weight = layer.lora_A.data, layer.lora_B.data, layer.weight.data
        before = weight.to(model.dtype, copy=True) if count else None
        # ‖B A‖² = tr(Bᵀ B A Aᵀ), so that the product is not made once more.
        squares += layer.scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
        if b.any():
            weight.addmm_(b, a, alpha=layer.scale)
        if before is not None:
            changed, total = changed + int((weight.to(model.dtype) != before).sum()), total + weight.numel()
        if isinstance(layer, Rank1Linear):
            layer.pending = False
        else:
            _reset(layer, reset, generator)
        b.zero_()
    return Merge(max(0.0, squares) ** 0.5, changed / total if count else None)


def _reset(layer: LoRALinear, reset: str, generator: np.random.Generator) -> None:
    rank, inner = layer.lora_A.shape
    fresh, _ = lora_factors(layer.weight.shape[0], inner, rank, generator)
    if reset == "fresh":
        layer.lora_A.data.copy_(torch.from_numpy(fresh))
    elif reset == "direction":
        length = float(np.linalg.norm(fresh))
        layer.lora_A.data.copy_(length * unit(layer.lora_A.data[0])[None])


def fold(model: Gemma3) -> None:
    """Put plain linears with the merged weights, float32, in the place of all adapters."""
    for name in (*lora_layers(model), *rank1_layers(model)):
        plain = Linear(0, 0)
        plain.weight = nn.Parameter(effective(model, name), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)


def effective(model: Gemma3, name: str) -> Tensor:
    """The weight that a linear multiplies by, adapters and updates included, float32."""
    layer = cast("Linear", model.get_submodule(name))
    with torch.no_grad():
        return layer.merged() if isinstance(layer, LoRALinear | Rank1Linear) else layer.weight.detach().float()


def updates(model: Gemma3, start: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray, float]]:
    """``W - W_0`` and ``‖W_0‖`` of the linears whose first weights ``start`` gives, float32."""
    for name, before in start:
        yield name, effective(model, name).cpu().numpy() - before, float(np.linalg.norm(before))
