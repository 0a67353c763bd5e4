"""Several adapters made into one, and one made part of its model; numpy only, in float32 or better.

An adapter's update of a weight is ``scale · B A``. The weighted sum of updates is a matrix of up to the sum of the
ranks; ``cat`` keeps all of it, ``svd`` its best part of a given rank, and ``linear`` is another matrix altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.adapters import Factors, LowRank, target_modules
from engines.base import Progress
from engines.checkpoints import as_bfloat16, as_float32, write_json, write_safetensors
from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import Gemma3Config, read_config
from engines.quantization import iterate_dense
from engines.training import LINEARS, LoRASettings

WAYS = ("linear", "svd", "cat")


@dataclass(frozen=True)
class Blend:
    """Adapters in one.

    Attributes:
        kept: share of the squared Frobenius norm of the weighted sum of updates that is kept, over all linears; None
            for ``linear``, which is no approximation of that sum.
        worst: the least that is kept in any one linear, and its name.
    """

    factors: Factors
    settings: LoRASettings
    kept: float | None = None
    worst: tuple[float, str] | None = None


def blend(
    adapters: Sequence[tuple[Factors, LoRASettings]],
    weights: Sequence[float],
    config: Gemma3Config,
    how: str,
    rank: int | None = None,
) -> Blend:
    """Put adapters of one model together; one that does not have some linear adds nothing there.

    ``cat`` stacks the factors: exactly the weighted sum of the updates, of the sum of the ranks. ``svd`` is the matrix
    nearest to that sum of a given rank (Eckart and Young, 1936). ``linear`` sums the A and the B, each with the root of
    its weight times its scale, as PEFT's ``add_weighted_adapter`` does: products of one adapter's B with another's
    A come with it, so it is not the weighted sum of the updates, and says nothing of them unless the adapters share
    their A or B.

    Args:
        weights: one for each adapter; negative ones subtract.
        how: one of ``WAYS``.
        rank: of the result, for ``svd``; None takes the largest rank of the adapters.

    Raises:
        UnsupportedError: an adapter is DoRA, whose rows are rescaled and cannot be summed; ranks differ in ``linear``.
    """
    if any(settings.dora for _, settings in adapters):
        raise UnsupportedError("a DoRA adapter rescales its model's rows, so it cannot be blended: fuse it instead")
    ranks = [settings.rank for _, settings in adapters]
    if how == "linear" and len(set(ranks)) > 1:
        raise UnsupportedError(f"linear needs adapters of one rank, these have {', '.join(map(str, ranks))}: take svd")
    new_rank = {"linear": ranks[0], "cat": sum(ranks), "svd": rank or max(ranks)}[how]
    settings = _settings([settings for _, settings in adapters], new_rank)
    factors: Factors = {}
    energies: dict[str, tuple[float, float]] = {}
    for module, (out, inner) in target_modules(config, settings.targets, settings.layers).items():
        parts = [
            (some[module], weight * terms.scale)
            for (some, terms), weight in zip(adapters, weights, strict=True)
            if module in some
        ]
        if how == "linear":
            factors[module] = _linear(parts, new_rank, out, inner)
        elif how == "cat":
            factors[module] = _padded(*_stacked(parts, out, inner), new_rank)
        else:
            lora_a, lora_b, energies[module] = _nearest(*_stacked(parts, out, inner), new_rank)
            factors[module] = _padded(lora_a, lora_b, new_rank)
    if how != "svd":
        return Blend(factors, settings, 1.0 if how == "cat" else None)
    shares = {module: kept / total for module, (kept, total) in energies.items() if total}
    kept, total = (sum(part) for part in zip(*energies.values(), strict=True))
    worst = min(((share, module) for module, share in shares.items()), default=None)
    return Blend(factors, settings, kept / total if total else 1.0, worst)


def _settings(all_settings: Sequence[LoRASettings], rank: int) -> LoRASettings:
    """Every linear that one of them has; the scale is 1, since the factors carry the weights."""
    found = {target for settings in all_settings for target in settings.targets}
    targets = tuple(target for target in LINEARS if target in found)
    layers: tuple[int, ...] | None = None
    if all(settings.layers is not None for settings in all_settings):
        layers = tuple(sorted({i for settings in all_settings for i in settings.layers or ()}))
    return LoRASettings(rank, float(rank), all_settings[0].dropout, targets, layers)


def _linear(parts: Sequence[tuple[LowRank, float]], rank: int, out: int, inner: int) -> LowRank:
    lora_a, lora_b = np.zeros((rank, inner)), np.zeros((out, rank))
    for low_rank, weight in parts:
        root = math.sqrt(abs(weight))
        lora_a += math.copysign(root, weight) * low_rank.lora_A  # the sign on one side, or it would cancel itself
        lora_b += root * low_rank.lora_B
    return LowRank(lora_a.astype(np.float32), lora_b.astype(np.float32))


def _stacked(parts: Sequence[tuple[LowRank, float]], out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """A ``[R, in]`` and B ``[out, R]``, float64, whose product is the weighted sum of the updates."""
    lora_a = np.concatenate([np.zeros((0, inner)), *(weight * low_rank.lora_A for low_rank, weight in parts)])
    lora_b = np.concatenate([np.zeros((out, 0)), *(low_rank.lora_B for low_rank, _ in parts)], axis=1)
    return lora_a, lora_b


def _nearest(lora_a: np.ndarray, lora_b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Factors of at most ``rank`` nearest to ``B A``, with its energy that they keep and all of it.

    With B = Q R and Aᵀ = P S, the singular values of B A are those of the small R Sᵀ; B A itself is never made. Both
    factors get the root of the singular values, so that neither learns faster when they are trained on.
    """
    left, small_left = np.linalg.qr(lora_b)
    right, small_right = np.linalg.qr(lora_a.T)
    u, values, vt = np.linalg.svd(small_left @ small_right.T, full_matrices=False)
    roots = np.sqrt(values[:rank])
    energy = float((values[:rank] ** 2).sum()), float((values**2).sum())
    return roots[:, None] * (vt[:rank] @ right.T), (left @ u[:, :rank]) * roots, energy


def _padded(lora_a: np.ndarray, lora_b: np.ndarray, rank: int) -> LowRank:
    """The factors in float32, with zeros up to ``rank``."""
    missing = rank - lora_a.shape[0]
    wide_a = np.pad(lora_a, ((0, missing), (0, 0)))
    wide_b = np.pad(lora_b, ((0, 0), (0, missing)))
    return LowRank(wide_a.astype(np.float32), wide_b.astype(np.float32))


def merged(weight: np.ndarray, low_rank: LowRank, settings: LoRASettings) -> np.ndarray:
    """A weight ``[out, in]`` with the update in it, float32; with DoRA its rows brought to their lengths."""
    value = weight + np.float32(settings.scale) * (low_rank.lora_B @ low_rank.lora_A)
    if low_rank.magnitude is None:
        return value
    return (low_rank.magnitude / np.linalg.norm(value, axis=1))[:, None] * value


def fuse(
    model: Path,
    factors: Factors,
    settings: LoRASettings,
    target: Path,
    dtype: str,
    progress: Progress | None = None,
) -> None:
    """Write a model with the adapter merged into its weights, one tensor at a time: weights and ``config.json``.

    Args:
        target: a folder that exists.
        dtype: of the file, ``float32`` or ``bfloat16``; the merge itself is in float32.

    Raises:
        CheckpointError: the model's files are broken or do not fit the adapter, or the disk is full.
    """
    config = read_config(model)
    shapes = config.parameter_shapes()
    for module, low_rank in factors.items():
        if shapes.get(f"{module}.weight") != (low_rank.lora_B.shape[0], low_rank.lora_A.shape[1]):
            raise CheckpointError(f"{model} has no {module} that fits the adapter: fuse it with its own model")
    kind = "BF16" if dtype == "bfloat16" else "F32"
    total, done = config.parameter_count(), 0

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal done
        for name, stored in iterate_dense(model, config):
            module = name.removesuffix(".weight")
            value = as_float32(stored)
            if module in factors:
                value = merged(value, factors[module], settings)
            yield name, as_bfloat16(value) if kind == "BF16" else value
            done += value.size
            if progress is not None:
                progress(done / total, name)

    write_safetensors(target / "model.safetensors", arrays(), {name: (kind, shape) for name, shape in shapes.items()})
    terms: Mapping[str, Any] = replace(config, quantization=None).to_dict()
    write_json(target / "config.json", {**terms, "dtype": dtype})
