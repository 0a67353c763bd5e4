"""A model's architecture as a tree: what it is made of, which layers see everything, and what LoRA would add."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engines.base import LINEARS
from engines.gemma3 import Gemma3Config
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, Table

MOST_RANK = 4096


@dataclass(frozen=True)
class Node:
    """A part of a model.

    Attributes:
        depth: 0 for the model.
        shape: of a weight; empty for what has parts.
        share: of all parameters.
        lora: parameters that adapters would add in it.
        note: what is special about it.
    """

    name: str
    depth: int
    shape: tuple[int, ...]
    parameters: int
    share: float
    lora: int
    note: str = ""

    @property
    def label(self) -> str:
        """Name and note, set in as deep as it lies."""
        return "· " * self.depth + (f"{self.name}, {self.note}" if self.note else self.name)


def architecture(config: Gemma3Config, rank: int) -> Iterator[Node]:
    """The parts, each before those it is made of.

    Args:
        rank: of the LoRA that is counted, on all linears.

    Raises:
        UsageError: the rank is none.
    """
    if not 1 <= rank <= MOST_RANK:
        raise UsageError(f"rank is {rank}; a whole number from 1 to {MOST_RANK:,} is needed")
    shapes, whole = config.parameter_shapes(), config.parameter_count()

    def node(name: str, prefix: str, depth: int, note: str = "") -> Node:
        inside = {n: s for n, s in shapes.items() if n == f"{prefix}.weight" or n.startswith(f"{prefix}.")}
        count = sum(map(math.prod, inside.values()))
        lora = sum(rank * sum(s) for n, s in inside.items() if n.split(".")[-2] in LINEARS)
        shape = shapes.get(f"{prefix}.weight", ())
        return Node(name, depth, shape, count, count / whole, lora, note)

    yield node("model", "model", 0, f"{len(config.global_layers)} of {config.num_hidden_layers} global")
    yield node("embed_tokens", "model.embed_tokens", 1, "also the head")
    for i in range(config.num_hidden_layers):
        kind = "local" if config.is_local(i) else "global"
        yield node(f"layers.{i}", f"model.layers.{i}", 1, kind)
        paths = [n.removeprefix(f"model.layers.{i}.").removesuffix(".weight") for n in shapes if f".{i}." in n]
        for block in dict.fromkeys(path.rpartition(".")[0] for path in paths):
            if block:
                yield node(block, f"model.layers.{i}.{block}", 2)
            for path in paths:
                if path.rpartition(".")[0] == block:
                    yield node(path.removeprefix(f"{block}."), f"model.layers.{i}.{path}", 3 if block else 2)
    yield node("norm", "model.norm", 1)


def tree_figure(name: str, config: Gemma3Config, rank: int = 8) -> Figure:
    """The tree as a table; of layers alike only the first has its parts."""
    rows = [
        (n.label, " x ".join(map(str, n.shape)), n.parameters, n.share, n.lora)
        for n in told(architecture(config, rank))
    ]
    columns = ("part", "shape", "parameters", "share", f"LoRA r{rank}")
    notes = [f"{config.parameter_count():,} parameters; LoRA of rank {rank} adds {config.lora_count(rank, LINEARS):,}"]
    return Figure(f"tree of {name}", notes, tables=[Table("part", columns, rows)])


def told(nodes: Iterable[Node]) -> list[Node]:
    """The tree for a person: of layers alike only the first with its parts."""
    found, kinds, inside = [], set(), True
    for each in nodes:
        if each.depth == 1:
            inside = each.note not in kinds
            kinds.add(each.note)
        if each.depth < 2 or inside:
            found.append(each)
    return found
