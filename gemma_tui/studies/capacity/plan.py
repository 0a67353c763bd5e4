"""A capacity sweep: which networks learn which random strings, and how long."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.networks import ARCHITECTURES, NetworkShape, NetworkTraining
from gemma_tui.errors import UsageError
from gemma_tui.studies.plan import build, option

MAX_CELLS = 10_000
MAX_SEQUENCES = 10_000_000
DTYPES = ("float32", "bfloat16")
HEAD_DIM = 4
"""Dimensions of a head where their number is not given: short heads hold more than long ones."""


@dataclass(frozen=True)
class CapacityPlan:
    """A grid of networks and data sets; every field is an option of ``gemma-tui capacity sweep``."""

    arch: str = option("gpt2", "architecture; gpt2 is that of arXiv:2505.24832", choices=ARCHITECTURES)
    layers: str = option("1", "numbers of layers, with commas")
    width: str = option("32", "widths, with commas")
    heads: int = option(0, "heads; 0 for heads of 4 dimensions", low=0, high=1024)
    vocab: int = option(2048, "tokens that strings are drawn from, uniformly", unit="tokens", low=2, high=65_536)
    length: int = option(64, "tokens of a string", unit="tokens", low=2, high=4096)
    sizes: str = option("100,200,400,600,800,1200", "numbers of strings, with commas")
    seeds: int = option(1, "networks of each kind, with data and first weights of their own", low=1, high=1000)
    steps: int = option(1000, "optimizer steps at most", low=1, high=10_000_000)
    batch_size: int = option(200, "strings in a step at most", low=1, high=65_536)
    learning_rate: float = option(0.05, "learning rate before it falls", low=1e-8, high=10.0)
    warmup: float = option(0.025, "share of the steps over which the rate rises", low=0.0, high=0.9)
    cooldown: float = option(0.5, "share of the steps over which the rate falls to zero", low=0.0, high=1.0)
    flat: float = option(
        0.002,
        "the rate begins to fall where bits grow by less than this share over five evaluations",
        low=0.0,
        high=1.0,
    )
    evaluate_every: int = option(50, "steps between two evaluations", low=1, high=1_000_000)
    dtype: str = option("float32", "dtype of the weights that networks compute with", choices=DTYPES)
    alpha: float = option(3.6, "bits per parameter that a network is expected to hold", low=0.01, high=100.0)
    seed: int = option(0, "the first seed", low=0, high=2**31)
    name: str = option("", "name of the run; empty for capacity")


@dataclass(frozen=True)
class MoreCells:
    """What a sweep is added to: cells of other sizes or seeds, since cells of another kind would not be comparable."""

    add: str = option("", "the sweep that gets more cells", required=True)
    sizes: str = option("", "numbers of strings that are added, with commas")
    seeds: int | None = option(
        None, "networks of each kind from now on", low=1, high=1000, open_means="as many as it has"
    )


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"width": "8", "vocab": 128, "length": 16, "sizes": "25,50,100,200,400", "steps": 300,
              "batch_size": 100, "evaluate_every": 25},
    "smallest": {"sizes": "300,600,900", "steps": 4000},
}  # fmt: skip
"""Sweeps by name: a plateau in minutes on any machine; the smallest network of arXiv:2505.24832."""


@dataclass(frozen=True)
class Cell:
    """One network with its data.

    Attributes:
        sequences: strings in its training set.
        seed: of the strings and the first weights.
    """

    shape: NetworkShape
    sequences: int
    seed: int

    @property
    def model(self) -> str:
        """What cells of one shape are called."""
        return f"{self.shape.layers}x{self.shape.width}"

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.model} N={self.sequences} seed {self.seed}"


def with_preset(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a preset, over which the given ones go.

    Raises:
        UsageError: there is none of that name.
    """
    if name and name not in PRESETS:
        raise UsageError(f"preset: {name[:40]!r} is not there; choose {' | '.join(PRESETS)}")
    return {**PRESETS.get(name, {}), **values}


def cells_of(plan: CapacityPlan) -> list[Cell]:
    """Every cell of the grid, the smallest networks and data sets first.

    Raises:
        UsageError: a list is not one of whole numbers, or there are too many cells.
        UnsupportedError: a shape cannot be built.
    """
    layers, widths = _numbers(plan.layers, "layers", 100), _numbers(plan.width, "width", 16_384)
    sizes = _numbers(plan.sizes, "sizes", MAX_SEQUENCES)
    count = len(layers) * len(widths) * len(sizes) * plan.seeds
    if count > MAX_CELLS:
        raise UsageError(f"these are {count:,} cells; {MAX_CELLS:,} at most make a sweep: give fewer sizes or seeds")
    cells = []
    for layer, width in itertools.product(layers, widths):
        heads = plan.heads or max(1, width // HEAD_DIM)
        shape = NetworkShape(plan.arch, layer, width, heads, plan.vocab, plan.length)
        shape.check()
        cells += [Cell(shape, n, plan.seed + s) for n, s in itertools.product(sizes, range(plan.seeds))]
    return cells


def training_of(plan: CapacityPlan) -> NetworkTraining:
    """What an engine must know to train the networks."""
    return NetworkTraining(dtype=plan.dtype)


def plan_of(values: Mapping[str, Any], where: str) -> CapacityPlan:
    """A plan as the run store keeps it.

    Raises:
        UsageError: it is another study's or another version's.
    """
    return build(CapacityPlan, values, where)


def _numbers(text: str, name: str, high: int) -> list[int]:
    found = []
    for part in text.split(","):
        try:
            number = int(part.strip().replace("_", ""))
        except ValueError:
            raise UsageError(
                f"{name}: {part.strip()[:40]!r} is no whole number; give some with commas between"
            ) from None
        if not 1 <= number <= high:
            raise UsageError(f"{name}: {number:,} is not from 1 to {high:,}")
        found.append(number)
    return sorted(set(found))
