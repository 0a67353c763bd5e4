"""Optimizers in MLX. The file mirrors ``engines/torch/optimizers.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn import Module
from mlx.optimizers import SGD, Adafactor, AdamW, MultiOptimizer, Muon, Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from engines.errors import UnsupportedError
from engines.pruning import pruned_state
from engines.training import OptimizerSettings

EMBEDDING = "model.embed_tokens.weight"
MOMENTS = "m", "v"
COUNTERS = ("step", "learning_rate")


def make_optimizer(settings: OptimizerSettings) -> Optimizer:
    """What updates the trained parameters, at a rate that is set at each step; decay is not its, see ``step``.

    Raises:
        UnsupportedError: there is no optimizer of that name.
    """
    match settings.name:
        case "adamw":
            return _adamw(settings)
        case "sgd":
            return SGD(0.0, momentum=settings.momentum)
        case "adafactor":
            return Adafactor(0.0, relative_step=False)
        case "muon":
            # Orthogonal rows mean nothing for a table of vectors or for gains (Jordan et al., 2024).
            muon = Muon(0.0, momentum=settings.momentum, weight_decay=0.0)
            return MultiOptimizer([muon, _adamw(settings)], [is_turned])
    raise UnsupportedError(f"optimizer {settings.name[:40]!r} is not there: choose adamw, sgd, adafactor or muon")


def is_turned(name: str, parameter: mx.array) -> bool:
    """Whether Muon has a parameter."""
    return parameter.ndim == 2 and name != EMBEDDING


def step(
    optimizer: Optimizer, model: Module, gradients: Mapping[str, mx.array], learning_rate: float, decay: float
) -> None:
    """Decay the matrices (Loshchilov & Hutter, arXiv:1711.05101, the same for all optimizers), then update everything.

    Norm gains are not matrices: pulling them to zero would pull the gain 1 + w to one for no reason.
    """
    tree = tree_unflatten(list(gradients.items()))
    if decay:
        parameters = dict(tree_flatten(model.trainable_parameters()))
        shrunk = [(n, p * (1 - learning_rate * decay)) for n, p in parameters.items() if p.ndim > 1 and n in gradients]
        model.update(tree_unflatten(shrunk))
    if gradients:
        optimizer.learning_rate = learning_rate
        optimizer.update(model, tree)
    mx.eval(model.parameters(), optimizer.state)


def state_of(optimizer: Optimizer) -> dict[str, np.ndarray]:
    """Every array of the optimizer's state, float32, by its place in the state's tree."""
    flat: list[tuple[str, Any]] = tree_flatten(optimizer.state)
    return {place: np.array(value.astype(mx.float32)) for place, value in flat}


def restore(optimizer: Optimizer, state: Mapping[str, np.ndarray]) -> None:
    """Put back what ``state_of`` told."""
    arrays = [(place, mx.array(a, mx.uint64 if place.endswith("step") else mx.float32)) for place, a in state.items()]
    if arrays:
        optimizer.state = tree_unflatten(arrays)


def foreign(state: Collection[str], trained: Collection[str]) -> list[str]:
    """Places in a state that belong to none of the trained parameters."""
    own = [place for place in state if place.rpartition(".")[2] in COUNTERS]
    return [p for p in state if p not in own and not any(f"{name}." in f"{p}." for name in trained)]


def nbytes(optimizer: Optimizer) -> int:
    """Bytes of all arrays of the state."""
    flat: list[tuple[str, Any]] = tree_flatten(optimizer.state)
    return sum(value.nbytes for _, value in flat)


def prune(optimizer: Optimizer, names: Collection[str], how: str, ratio: float, seed: int) -> float:
    """Zero entries of the state of the given parameters; returns the share that is zero after it."""
    zero = total = 0
    generator = np.random.default_rng(seed)
    flat: dict[str, Any] = dict(tree_flatten(optimizer.state))
    chosen = [place for place, value in flat.items() if value.ndim and any(f"{name}." in f"{place}." for name in names)]
    for parameter, places in groupby(chosen, key=lambda place: place.rpartition(".")[0]):
        arrays = {place.rpartition(".")[2]: np.array(flat[place]) for place in places}
        for key, array in pruned_state(arrays, MOMENTS, how, ratio, generator).items():
            flat[f"{parameter}.{key}"] = mx.array(array)
            zero, total = zero + int((array == 0).sum()), total + array.size
    if total:
        optimizer.state = tree_unflatten(list(flat.items()))
    return zero / total if total else 0.0


def _adamw(settings: OptimizerSettings) -> Optimizer:
    return AdamW(0.0, betas=list(settings.betas), eps=settings.epsilon, weight_decay=0.0, bias_correction=True)
