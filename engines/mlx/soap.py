"""Adam and SOAP for stacks of networks in MLX. The file mirrors ``engines/torch/soap.py``."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from engines.mlx.device import eigenvectors, number, orthonormal
from engines.networks import NetworkTraining, rotated_axes

PARTS = ("first", "second", "factors", "bases")


class Soap:
    """Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al., arXiv:2409.11321, algorithm 3).

    A gradient G ``[m, n]`` is turned to Q_Lᵀ G Q_R, where Q_L and Q_R are eigenvectors of the running means of G Gᵀ and
    Gᵀ G; the second moment is kept there. ``adam`` turns nothing. Every network of the stack has bases of its own.

    Attributes:
        factors, bases: by ``name:axis``, ``[networks, n, n]``.
    """

    def __init__(self, weights: Mapping[str, mx.array], training: NetworkTraining) -> None:
        self.training = training
        self.steps = mx.zeros((1,))
        self.first = {name: mx.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: mx.zeros_like(weight) for name, weight in weights.items()}
        self.factors: dict[str, mx.array] = {}
        self.bases: dict[str, mx.array] = {}
        for name, weight in weights.items():
            for axis in rotated_axes(tuple(weight.shape), training.optimizer):
                size = weight.shape[axis]
                self.factors[f"{name}:{axis}"] = mx.zeros((len(weight), size, size))
                self.bases[f"{name}:{axis}"] = mx.broadcast_to(mx.eye(size), (len(weight), size, size))

    def step(
        self, weights: Mapping[str, mx.array], gradients: Mapping[str, mx.array], rates: mx.array
    ) -> dict[str, mx.array]:
        """The weights after a step.

        Args:
            rates: the learning rate of each network.
        """
        (first_decay, second_decay), reach = self.training.betas, self.training.reach
        self.steps = self.steps + 1
        count = round(number(self.steps))
        renewed, changed = count == 1 or count % self.training.renew_every == 0, {}
        for name, gradient in gradients.items():
            axes = [axis for axis in (1, 2) if f"{name}:{axis}" in self.bases]
            for axis in axes:
                self._observe(name, axis, gradient, count)
            if renewed:
                for axis in axes:
                    self._renew(name, axis, count)
            first = first_decay * self.first[name] + (1 - first_decay) * gradient
            turned = self._turned(name, gradient, axes)
            second = second_decay * self.second[name] + (1 - second_decay) * turned * turned
            spread = mx.sqrt(second / (1 - second_decay**count)) + self.training.epsilon
            if axes:
                spread = spread + self.training.floor * mx.sqrt(spread.square().mean(axis=(1, 2), keepdims=True))
            stride = self._turned(name, first, axes) / (1 - first_decay**count) / spread
            update = self._back(name, mx.clip(stride, -reach, reach), axes)
            self.first[name], self.second[name] = first, second
            changed[name] = weights[name] - rates.reshape(-1, *[1] * (update.ndim - 1)) * update
        return changed

    def keep(self, index: mx.array) -> None:
        """Go on with these networks alone."""
        for part in PARTS:
            setattr(self, part, {name: array[index] for name, array in getattr(self, part).items()})

    def state(self) -> dict[str, mx.array]:
        """Every array of the state."""
        named = {f"{part}.{name}": array for part in PARTS for name, array in getattr(self, part).items()}
        return {"steps": self.steps, **named}

    def put(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the arrays that ``state`` told."""
        self.steps = mx.array(arrays["steps"])
        for part in PARTS:
            setattr(self, part, {name: mx.array(arrays[f"{part}.{name}"]) for name in getattr(self, part)})

    def _observe(self, name: str, axis: int, gradient: mx.array, count: int) -> None:
        """Put a gradient into the running mean of its square along an axis."""
        place, across = f"{name}:{axis}", gradient if axis == 1 else gradient.swapaxes(1, 2)
        share = 1.0 if count == 1 else 1 - self.training.betas[1]
        self.factors[place] = (1 - share) * self.factors[place] + share * (across @ across.swapaxes(1, 2))

    def _renew(self, name: str, axis: int, count: int) -> None:
        """Eigenvectors of the first factor, then one step of orthogonal iteration from those before, sorted."""
        place = f"{name}:{axis}"
        factor, basis, second = self.factors[place], self.bases[place], self.second[name]
        if count == 1:
            self.bases[place] = eigenvectors(factor)
            return
        product = factor @ basis
        order = mx.argsort(-(basis * product).sum(axis=1), axis=1)
        columns = mx.broadcast_to(order[:, None], product.shape)
        self.bases[place] = orthonormal(mx.take_along_axis(product, columns, axis=2))
        order = order[:, :, None] if axis == 1 else order[:, None]
        self.second[name] = mx.take_along_axis(second, mx.broadcast_to(order, second.shape), axis=axis)

    def _turned(self, name: str, x: mx.array, axes: list[int]) -> mx.array:
        for axis in axes:
            basis = self.bases[f"{name}:{axis}"]
            x = basis.swapaxes(1, 2) @ x if axis == 1 else x @ basis
        return x

    def _back(self, name: str, x: mx.array, axes: list[int]) -> mx.array:
        for axis in axes:
            basis = self.bases[f"{name}:{axis}"]
            x = basis @ x if axis == 1 else x @ basis.swapaxes(1, 2)
        return x
