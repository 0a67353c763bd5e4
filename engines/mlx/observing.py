"""The gradient of a linear's weight, seen and not kept, in MLX. The file mirrors ``engines/torch/observing.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from engines.mlx.device import number
from engines.mlx.model import Gemma3, Linear
from engines.training import GradientFacts

See = Callable[[mx.array, mx.array], tuple[mx.array, ...]]
"""Called on the way back with the inputs X ``[n, in]`` and the gradients Δ ``[n, out]`` of the outputs; G = Δᵀ X.
It returns what is handed on as the gradients of the slots."""

ITERATIONS, FIRST_ITERATIONS = 8, 40
"""Power iterations of an observation, which begins where the one before ended, and of the first."""

Seen = dict[str, tuple[mx.array, mx.array]]


def watched(see: See, x: mx.array, y: mx.array, *slots: mx.array) -> mx.array:
    """``y``, the outputs of a linear for ``x``; on the way back ``see`` is called and fills the slots' gradients."""

    @mx.custom_function
    def passed(y: mx.array, *slots: mx.array) -> mx.array:
        return mx.array(y)

    @passed.vjp
    def seen(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        return (cotangent, *see(mx.stop_gradient(x), cotangent))

    result: Any = passed(y, *slots)
    return result


def top_pair(matrix: mx.array, v: mx.array, iterations: int) -> tuple[mx.array, mx.array, mx.array]:
    """Leading singular vectors u, v and value of a matrix, by power iteration from a unit vector ``v``."""
    for _ in range(iterations):
        u = unit(matrix @ v)
        w = matrix.T @ u
        v = unit(w)
    return u, v, mx.linalg.norm(w)


def unit(vector: mx.array) -> mx.array:
    """A vector of length one; zero stays zero."""
    return vector / mx.maximum(mx.linalg.norm(vector), 1e-30)


@contextmanager
def observed(model: Gemma3, seen: Seen, wanted: bool) -> Iterator[dict[str, GradientFacts]]:
    """Within it, the way back through the layers' linears fills the facts of their gradients, if they are wanted.

    Args:
        seen: the singular vectors of the observation before, replaced by those of this one.
    """
    facts: dict[str, GradientFacts] = {}
    lazy: dict[str, list[mx.array]] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and wanted}
    kinds = {name: type(linear) for name, linear in linears.items()}

    def observing(name: str, kind: type[Linear]) -> type[Linear]:
        def see(x: mx.array, delta: mx.array) -> tuple[mx.array, ...]:
            rows, out = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])
            lazy[name] = _measures(out.astype(mx.float32).T @ rows.astype(mx.float32), seen.get(name))
            return ()

        def call(self: Linear, x: mx.array) -> mx.array:
            return watched(see, x, kind.__call__(self, x))

        return type(kind.__name__, (kind,), {"__call__": call})

    # MLX's modules have no hooks, so that a class of its own does it for as long.
    for name, linear in linears.items():
        linear.__class__ = observing(name, kinds[name])
    try:
        yield facts
        mx.eval(lazy)
        for name, (u, v, norm, sigma, *drift) in lazy.items():
            facts[name] = GradientFacts(number(norm), number(sigma), *map(number, drift))
            if 0 < facts[name].sigma < math.inf:  # nothing could go on from directions that are none
                seen[name] = (u, v)
    finally:
        for name, linear in linears.items():
            linear.__class__ = kinds[name]


def _measures(gradient: mx.array, before: tuple[mx.array, mx.array] | None) -> list[mx.array]:
    """u, v, ‖G‖ and σ₁; with an observation before, also |cos| between its u and v and these."""
    start = before[1] if before else unit(gradient.sum(axis=0) + 1e-30)
    u, v, sigma = top_pair(gradient, start, ITERATIONS if before else FIRST_ITERATIONS)
    drift = [mx.abs((before[0] * u).sum()), mx.abs((before[1] * v).sum())] if before else []
    return [u, v, mx.linalg.norm(gradient), sigma, *drift]
