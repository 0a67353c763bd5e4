"""Adapters into weights, in MLX. The file mirrors ``engines/torch/merging.py``."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from engines.errors import UnsupportedError
from engines.initialisation import lora_factors
from engines.mlx.adapters import DoRALinear, LoRALinear, lora_layers
from engines.mlx.device import number
from engines.mlx.model import Gemma3, Linear
from engines.mlx.observing import unit
from engines.mlx.rank1 import Rank1Linear, rank1_layers
from engines.pruning import check_reset
from engines.training import Merge


def keep_masters(model: Gemma3) -> None:
    """Keep the weights below all adapters in float32: bfloat16 would lose most of a small update (83 % at rms 1e-5)."""
    for layer in lora_layers(model).values():
        layer.weight = layer.weight.astype(mx.float32)


def merge(model: Gemma3, reset: str, seed: int, count: bool) -> Merge:
    """Add every update to its weight; ``lora_B`` turns zero, and ``lora_A`` what ``reset`` says.

    The direction of a rank-1 update stays, whatever ``reset`` says: the next search begins there.

    Raises:
        UnsupportedError: there is nothing to merge, the weights are not float32, the adapters are DoRA's, or there is
            no such reset.
    """
    layers: dict[str, LoRALinear | Rank1Linear] = {**lora_layers(model), **rank1_layers(model)}
    if not layers or any(layer.weight.dtype != mx.float32 for layer in layers.values()):
        raise UnsupportedError("there are no adapters over float32 weights to merge: start training with merging")
    check_reset(reset, max(layer.lora_A.shape[0] for layer in layers.values()))
    if any(isinstance(layer, DoRALinear) for layer in layers.values()):
        raise UnsupportedError("dora cannot be merged, since its magnitudes go into no weight: take plain adapters")
    generator = np.random.default_rng(seed)
    squares, changed, total = 0.0, 0, 0
    for layer in layers.values():
        a, b = layer.lora_A, layer.lora_B
        before = layer.weight.astype(model.dtype)
        # ‖B A‖² = tr(Bᵀ B A Aᵀ), so that the product is not made once more.
        squares += layer.scale**2 * number(((b.T @ b) * (a @ a.T)).sum())
        if mx.any(b != 0).item():
            layer.weight = mx.addmm(layer.weight, b, a, alpha=layer.scale)
        if count:
            changed += int(number((layer.weight.astype(model.dtype) != before).sum()))
            total += layer.weight.size
        if isinstance(layer, Rank1Linear):
            layer.pending = False
        else:
            _reset(layer, reset, generator)
        layer.lora_B = mx.zeros_like(b)
        mx.eval(layer.parameters())
    return Merge(max(0.0, squares) ** 0.5, changed / total if count else None)


def _reset(layer: LoRALinear, reset: str, generator: np.random.Generator) -> None:
    rank, inner = layer.lora_A.shape
    fresh, _ = lora_factors(layer.weight.shape[0], inner, rank, generator)
    if reset == "fresh":
        layer.lora_A = mx.array(fresh)
    elif reset == "direction":
        length = float(np.linalg.norm(fresh))
        layer.lora_A = length * unit(layer.lora_A[0])[None]


def fold(model: Gemma3) -> None:
    """Put plain linears with the merged weights, float32, in the place of all adapters."""
    for name in (*lora_layers(model), *rank1_layers(model)):
        plain = Linear(1, 1)
        plain.weight = effective(model, name)
        plain.freeze()
        _, _, layer, block, leaf = name.split(".")
        model.model.layers[int(layer)][block][leaf] = plain


def effective(model: Gemma3, name: str) -> mx.array:
    """The weight that a linear multiplies by, adapters and updates included, float32."""
    _, _, index, block, leaf = name.split(".")
    layer = model.model.layers[int(index)][block][leaf]
    return layer.merged() if isinstance(layer, LoRALinear | Rank1Linear) else layer.dense()


def updates(model: Gemma3, start: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray, float]]:
    """``W - W_0`` and ``‖W_0‖`` of the linears whose first weights ``start`` gives, float32."""
    for name, before in start:
        yield name, np.array(effective(model, name)) - before, float(np.linalg.norm(before))
