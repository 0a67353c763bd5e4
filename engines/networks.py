"""Small networks that are trained side by side on random tokens, to count the bits they hold: the engines' contract.

All networks of a stack have one shape and differ in their first weights and their data; what is computed for one is
computed for all of them in one batched operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import GLOBAL, Gemma3Config, Rope
from engines.initialisation import INITIALIZER_RANGE, gemma3_weights

ARCHITECTURES = ("gpt2", "gemma3")
LAYER_NORM_EPSILON = 1e-5
IN_FLIGHT_BYTES = 8 << 20
"""A batch is taken in parts of which the widest activation fits in this: it stays in a CPU's cache."""

LOGITS_BYTES = 8 << 20
"""Logits are made for as many positions at a time as fit in this, for the same reason."""


@dataclass(frozen=True)
class NetworkShape:
    """What the networks of a stack have in common.

    Attributes:
        arch: ``gpt2`` (Radford et al., 2019: learned positions, biases, tied head), the shape of arXiv:2505.24832;
            or ``gemma3``, all layers global with as many KV heads as heads and an MLP of 4 * width.
        length: tokens of a sequence; there are as many positions.
    """

    arch: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int

    def check(self) -> None:
        """Whether such a network can be built.

        Raises:
            UnsupportedError: it cannot.
        """
        if self.arch not in ARCHITECTURES:
            raise UnsupportedError(f"arch {self.arch[:40]!r} is not there: choose {' or '.join(ARCHITECTURES)}")
        if self.width % self.heads:
            raise UnsupportedError(f"width {self.width} is no multiple of {self.heads} heads: choose others")
        if self.arch == "gemma3" and (self.width // self.heads) % 2:
            raise UnsupportedError(f"heads of {self.width // self.heads} dimensions are odd; rotation needs pairs")

    @property
    def config(self) -> Gemma3Config:
        """The architecture in Gemma-3's terms; of ``gemma3`` only."""
        dim = self.width // self.heads
        return Gemma3Config(
            self.vocabulary, self.width, 4 * self.width, self.layers, self.heads, self.heads, dim, self.length,
            (GLOBAL,) * self.layers, Rope(1e4), Rope(1e4), float(dim), max_position_embeddings=self.length,
        )  # fmt: skip

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one network by its Hugging Face name; GPT-2's matrices are ``[in, out]``."""
        if self.arch == "gemma3":
            return self.config.parameter_shapes()
        d = self.width
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (self.vocabulary, d), "wpe.weight": (self.length, d)}
        for i in range(self.layers):
            shapes |= {
                f"h.{i}.ln_1.weight": (d,), f"h.{i}.ln_1.bias": (d,),
                f"h.{i}.attn.c_attn.weight": (d, 3 * d), f"h.{i}.attn.c_attn.bias": (3 * d,),
                f"h.{i}.attn.c_proj.weight": (d, d), f"h.{i}.attn.c_proj.bias": (d,),
                f"h.{i}.ln_2.weight": (d,), f"h.{i}.ln_2.bias": (d,),
                f"h.{i}.mlp.c_fc.weight": (d, 4 * d), f"h.{i}.mlp.c_fc.bias": (4 * d,),
                f"h.{i}.mlp.c_proj.weight": (4 * d, d), f"h.{i}.mlp.c_proj.bias": (d,),
            }  # fmt: skip
        return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}

    @property
    def embedding(self) -> str:
        """The table of token vectors, which is the output head, too."""
        return "wte.weight" if self.arch == "gpt2" else "model.embed_tokens.weight"

    def parameter_count(self, embeddings: bool = True) -> int:
        """Number of parameters of one network: of GPT-2 ``V d + S d + L (12 d² + 13 d) + 2 d``.

        Args:
            embeddings: with the tables of token and position vectors.
        """
        shapes = self.parameter_shapes()
        left_out = () if embeddings else (self.embedding, "wpe.weight")
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in left_out)

    def part(self, networks: int, batch: int) -> int:
        """How many sequences of each network are in flight at once."""
        widest = networks * self.length * 4 * self.width * 4
        return max(1, min(batch, IN_FLIGHT_BYTES // widest))

    def rows(self, networks: int, positions: int) -> int:
        """For how many positions of each network logits are made at once."""
        return max(1, min(positions, LOGITS_BYTES // (4 * networks * self.vocabulary)))


@dataclass(frozen=True)
class NetworkTraining:
    """How a stack is trained: Adam (arXiv:1412.6980), every network at a rate of its own, gradients not clipped.

    Attributes:
        dtype: ``bfloat16`` computes with weights rounded to it; what is updated stays in float32.
    """

    betas: tuple[float, float] = (0.9, 0.995)
    epsilon: float = 1e-8
    dtype: str = "float32"


def stack_bytes(shape: NetworkShape, networks: int) -> tuple[int, int]:
    """Bytes of memory that a stack takes in training, estimated, and of disk that its state takes.

    Weights, the copy that is computed with, gradient, two moments and two temporary arrays of an update; activations of
    the parts in flight, and logits.
    """
    weights = 4 * networks * shape.parameter_count()
    flight = 4 * networks * shape.part(networks, 1 << 30) * shape.length * shape.width * 16 * (shape.layers + 1)
    return 7 * weights + flight + 2 * LOGITS_BYTES, 3 * weights


class Networks(Protocol):
    """A stack of networks on an engine; every method is called on the engine's thread."""

    def step(self, tokens: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """One optimizer step of every network.

        Args:
            tokens: int32 ``[networks, batch, length]``.
            rates: the learning rate of each network.

        Returns:
            float64 ``[networks]``: mean negative log-likelihood of the ``length - 1`` tokens that follow another,
            before the step, nats.
        """

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """float64 ``[networks, batch]``: negative log-likelihood summed over a sequence's predicted tokens, nats."""

    def keep(self, chosen: Sequence[int]) -> None:
        """Go on with these networks alone, in this order."""

    def parameters(self, network: int) -> dict[str, np.ndarray]:
        """The weights of one network, float32, by name."""

    def save_state(self, path: Path) -> None:
        """Write the weights and the optimizer's state to a safetensors file."""

    def load_state(self, path: Path) -> None:
        """Take up training where ``save_state`` left it.

        Raises:
            CheckpointError: the file is broken, or of another stack.
        """


def first_weights(shape: NetworkShape, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """float32 ``[networks, ...]`` by name: matrices N(0, 0.02²), GPT-2's second ones of a layer over √(2 layers).

    Source: Radford et al., 2019, section 2.3; biases and Gemma-3's norms are zero, GPT-2's norms one.
    """
    stacks = [dict(_weights(shape, seed)) for seed in seeds]
    return {name: np.stack([weights[name] for weights in stacks]) for name in shape.parameter_shapes()}


def _weights(shape: NetworkShape, seed: int) -> list[tuple[str, np.ndarray]]:
    if shape.arch == "gemma3":
        return list(gemma3_weights(shape.config, seed))
    generator, found = np.random.default_rng(seed), []
    for name, size in shape.parameter_shapes().items():
        if len(size) > 1:
            deviation = INITIALIZER_RANGE / (math.sqrt(2 * shape.layers) if "c_proj" in name else 1.0)
            found.append((name, generator.standard_normal(size, np.float32) * np.float32(deviation)))
        else:
            found.append((name, np.full(size, float(name.endswith("weight")), np.float32)))
    return found


def check_state(path: Path, arrays: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Whether a saved state is that of a stack.

    Raises:
        CheckpointError: it is not.
    """
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise CheckpointError(f"{path} was saved by another stack of networks: its arrays do not fit")
