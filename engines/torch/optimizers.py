"""Optimizers in torch. The file mirrors ``engines/mlx/optimizers.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from engines.errors import UnsupportedError
from engines.pruning import pruned_state
from engines.training import OptimizerSettings

EMBEDDING = "model.embed_tokens.weight"
MOMENTS = "exp_avg", "exp_avg_sq"

Parameters = Mapping[str, nn.Parameter]


def make_optimizers(trained: Parameters, settings: OptimizerSettings) -> list[Optimizer]:
    """What updates the trained parameters, at a rate that is set at each step; decay is not theirs, see ``step``.

    Raises:
        UnsupportedError: there is no optimizer of that name.
    """
    everything = list(trained.values())
    if not everything:
        return []
    match settings.name:
        case "adamw":
            return [_adamw(everything, settings)]
        case "sgd":
            return [SGD(everything, lr=0.0, momentum=settings.momentum)]
        case "adafactor":
            # torch squares the first only where it bounds v from below: 1e-30 there, as published. Its own 1e-7 bounds
            # the mean of v as well, which of a large model's gradients is smaller.
            return [Adafactor(everything, lr=0.0, eps=(1e-15, 1e-3))]
        case "muon":
            # Orthogonal rows mean nothing for a table of vectors or for gains (Jordan et al., 2024).
            turned = [p for name, p in trained.items() if is_turned(name, p)]
            rest = [p for name, p in trained.items() if not is_turned(name, p)]
            muon: list[Optimizer] = [Muon(turned, lr=0.0, weight_decay=0.0, momentum=settings.momentum)]
            return (muon if turned else []) + ([_adamw(rest, settings)] if rest else [])
    raise UnsupportedError(f"optimizer {settings.name[:40]!r} is not there: choose adamw, sgd, adafactor or muon")


def is_turned(name: str, parameter: Tensor) -> bool:
    """Whether Muon has a parameter."""
    return parameter.ndim == 2 and name != EMBEDDING


def step(optimizers: Sequence[Optimizer], trained: Parameters, learning_rate: float, decay: float) -> None:
    """Decay the matrices (Loshchilov & Hutter, arXiv:1711.05101, the same for all optimizers), then update everything.

    Norm gains are not matrices: pulling them to zero would pull the gain 1 + w to one for no reason.
    """
    if decay:
        with torch.no_grad():
            for parameter in trained.values():
                if parameter.ndim > 1:
                    parameter.mul_(1 - learning_rate * decay)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()


def state_of(optimizers: Sequence[Optimizer], trained: Parameters) -> dict[str, np.ndarray]:
    """Every tensor of the optimizers' state, float32, by ``parameter:key``."""
    return {
        f"{name}:{key}": value.detach().float().cpu().numpy()
        for optimizer in optimizers
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore(optimizers: Sequence[Optimizer], trained: Parameters, state: Mapping[str, np.ndarray]) -> None:
    """Put back what ``state_of`` told."""
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for place, array in state.items():
        name, _, key = place.rpartition(":")
        parameter = trained[name]
        value = torch.from_numpy(array.copy())
        # A step counter stays on the CPU, as torch keeps it.
        owner[parameter].state[parameter][key] = value if key == "step" else value.to(parameter.device)


def nbytes(optimizers: Sequence[Optimizer]) -> int:
    """Bytes of all tensors of the state."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def prune(optimizers: Sequence[Optimizer], trained: Parameters, how: str, ratio: float, seed: int) -> float:
    """Zero entries of the state of the given parameters; returns the share that is zero after it."""
    zero = total = 0
    generator = np.random.default_rng(seed)
    for optimizer in optimizers:
        for parameter in trained.values():
            state = optimizer.state.get(parameter, {})
            arrays = {key: v.cpu().numpy() for key, v in state.items() if isinstance(v, Tensor) and v.ndim}
            for key, array in pruned_state(arrays, MOMENTS, how, ratio, generator).items():
                state[key].copy_(torch.from_numpy(array))
                zero, total = zero + int((array == 0).sum()), total + array.size
    return zero / total if total else 0.0


def _adamw(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    return AdamW(parameters, lr=0.0, betas=settings.betas, eps=settings.epsilon, weight_decay=0.0)
