"""Adam and SOAP for stacks of networks in torch. The file mirrors ``engines/mlx/soap.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engines.networks import NetworkTraining, rotated_axes
from engines.torch.device import eigenvectors, orthonormal


class Soap:
    """Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al., arXiv:2409.11321, algorithm 3).

    A gradient G ``[m, n]`` is turned to Q_Lᵀ G Q_R, where Q_L and Q_R are eigenvectors of the running means of G Gᵀ and
    Gᵀ G; the second moment is kept there. ``adam`` turns nothing. Every network of the stack has bases of its own.

    Attributes:
        factors, bases: by ``name:axis``, ``[networks, n, n]``.
    """

    def __init__(self, weights: Mapping[str, Tensor], training: NetworkTraining) -> None:
        self.training = training
        self.steps = torch.zeros(1)
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.factors, self.bases = {}, {}
        for name, weight in weights.items():
            for axis in rotated_axes(tuple(weight.shape), training.optimizer):
                size = weight.shape[axis]
                self.factors[f"{name}:{axis}"] = weight.new_zeros((len(weight), size, size))
                self.bases[f"{name}:{axis}"] = torch.eye(size, dtype=weight.dtype, device=weight.device).repeat(
                    len(weight), 1, 1
                )

    def step(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rates: Tensor) -> None:
        """Change the weights in place.

        Args:
            rates: the learning rate of each network.
        """
        (first_decay, second_decay), reach = self.training.betas, self.training.reach
        self.steps += 1
        count = int(self.steps)
        renewed = count == 1 or count % self.training.renew_every == 0
        for name, gradient in gradients.items():
            axes = [axis for axis in (1, 2) if f"{name}:{axis}" in self.bases]
            for axis in axes:
                self._observe(name, axis, gradient, count)
            if renewed:
                for axis in axes:
                    self._renew(name, axis, count)
            first, second = self.first[name], self.second[name]
            first.lerp_(gradient, 1 - first_decay)
            turned = self._turned(name, gradient, axes)
            second.lerp_(turned * turned, 1 - second_decay)
            spread = (second / (1 - second_decay**count)).sqrt_().add_(self.training.epsilon)
            if axes:
                spread.add_(self.training.floor * spread.square().mean(dim=(1, 2), keepdim=True).sqrt())
            stride = self._turned(name, first, axes) / (1 - first_decay**count) / spread
            update = self._back(name, stride.clamp_(-reach, reach), axes)
            weights[name].sub_(update.mul_(rates.view(-1, *[1] * (update.ndim - 1))))

    def keep(self, index: Tensor) -> None:
        """Go on with these networks alone."""
        for state in (self.first, self.second, self.factors, self.bases):
            state |= {name: tensor[index] for name, tensor in state.items()}

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state, to be read and written."""
        parts = {"first": self.first, "second": self.second, "factors": self.factors, "bases": self.bases}
        named = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        return {"steps": self.steps, **named}

    def _observe(self, name: str, axis: int, gradient: Tensor, count: int) -> None:
        """Put a gradient into the running mean of its square along an axis."""
        factor, across = self.factors[f"{name}:{axis}"], gradient if axis == 1 else gradient.transpose(1, 2)
        factor.lerp_(torch.bmm(across, across.transpose(1, 2)), 1.0 if count == 1 else 1 - self.training.betas[1])

    def _renew(self, name: str, axis: int, count: int) -> None:
        """Eigenvectors of the first factor, then one step of orthogonal iteration from those before, sorted."""
        place = f"{name}:{axis}"
        factor, basis, second = self.factors[place], self.bases[place], self.second[name]
        if count == 1:
            basis.copy_(eigenvectors(factor))
            return
        product = torch.bmm(factor, basis)
        order = (basis * product).sum(1).argsort(dim=1, descending=True)
        basis.copy_(orthonormal(product.gather(2, order[:, None].expand_as(product))))
        order = order[:, :, None] if axis == 1 else order[:, None]
        second.copy_(second.gather(axis, order.expand_as(second)))

    def _turned(self, name: str, x: Tensor, axes: list[int]) -> Tensor:
        for axis in axes:
            basis = self.bases[f"{name}:{axis}"]
            x = torch.bmm(basis.transpose(1, 2), x) if axis == 1 else torch.bmm(x, basis)
        return x

    def _back(self, name: str, x: Tensor, axes: list[int]) -> Tensor:
        for axis in axes:
            basis = self.bases[f"{name}:{axis}"]
            x = torch.bmm(basis, x) if axis == 1 else torch.bmm(x, basis.transpose(1, 2))
        return x
