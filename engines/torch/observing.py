"""The gradient of a linear's weight, seen and not kept, in torch. The file mirrors ``engines/mlx/observing.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engines.torch.model import Gemma3, Linear
from engines.training import GradientFacts

See = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Called on the way back with the inputs X ``[n, in]`` and the gradients Δ ``[n, out]`` of the outputs; G = Δᵀ X.
It returns what is handed on as the gradients of the slots."""

ITERATIONS, FIRST_ITERATIONS = 8, 40
"""Power iterations of an observation, which begins where the one before ended, and of the first."""


class _Watched(torch.autograd.Function):
    """``y`` as it is."""

    @staticmethod
    def forward(ctx: Any, see: See, x: Tensor, y: Tensor, *slots: Tensor) -> Tensor:
        """Keep the inputs."""
        ctx.see = see
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Hand the gradient on, and let it be seen."""
        (x,) = ctx.saved_tensors
        return (None, None, outputs[0], *ctx.see(x, outputs[0]))


def watched(see: See, x: Tensor, y: Tensor, *slots: Tensor) -> Tensor:
    """``y``, the outputs of a linear for ``x``; on the way back ``see`` is called and fills the slots' gradients."""
    return _Watched.apply(see, x, y, *slots)


def top_pair(matrix: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """Leading singular vectors u, v and value of a matrix, by power iteration from a unit vector ``v``."""
    for _ in range(iterations):
        u = unit(matrix @ v)
        w = matrix.T @ u
        v = unit(w)
    return u, v, float(w.norm())


def unit(vector: Tensor) -> Tensor:
    """A vector of length one; zero stays zero."""
    return vector / vector.norm().clamp_min(1e-30)


@contextmanager
def observed(model: Gemma3, seen: dict[str, tuple[Tensor, Tensor]], wanted: bool) -> Iterator[dict[str, GradientFacts]]:
    """Within it, the way back through the layers' linears fills the facts of their gradients, if they are wanted.

    Args:
        seen: the singular vectors of the observation before, replaced by those of this one.
    """
    facts: dict[str, GradientFacts] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and wanted}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def see(x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
            gradient = delta.flatten(0, -2).float().T @ x.flatten(0, -2).float()
            facts[name], pair = _facts(gradient, seen.get(name))
            if 0 < facts[name].sigma < math.inf:  # nothing could go on from directions that are none
                seen[name] = pair
            return ()

        return lambda module, inputs, y: watched(see, inputs[0], y)

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield facts
    finally:
        for handle in handles:
            handle.remove()


def _facts(gradient: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[GradientFacts, tuple[Tensor, Tensor]]:
    start = before[1] if before else unit(gradient.sum(dim=0) + 1e-30)
    u, v, sigma = top_pair(gradient, start, ITERATIONS if before else FIRST_ITERATIONS)
    drift = (abs(float(before[0] @ u)), abs(float(before[1] @ v))) if before else (None, None)
    return GradientFacts(float(gradient.norm()), sigma, *drift), (u, v)
