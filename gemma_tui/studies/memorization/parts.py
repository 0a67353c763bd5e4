"""The parts of a model that are taken away one after the other, to see where what it memorised is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engines.gemma3 import Gemma3Config
from engines.removal import Removal
from engines.training import LINEARS
from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.heads import head_name
from gemma_tui.text import one_line

KINDS = ("layers", "heads", "adapters")
INTACT = "nothing"
"""The name of the part that is none: the whole model, which the others are held against."""

BRANCHES = ("attention", "mlp")


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        kind: ``branch``, ``head``, ``matrix``, ``layer`` or ``kind``, the last three of adapters; none of the intact
            model.
        at: where it stands on the map of its kind, layer and column; None if it has no place there.
    """

    name: str
    kind: str = ""
    removal: Removal = field(default_factory=Removal)
    at: tuple[int, int] | None = None


def kinds_of(text: str) -> list[str]:
    """The kinds of parts that a text such as ``layers,heads`` names, each once.

    Raises:
        UsageError: there is no such kind.
    """
    named = [part.strip() for part in text.split(",")]
    wrong = [part for part in named if part not in KINDS]
    if wrong:
        raise UsageError(f"where: {one_line(wrong[0], 40)!r} is not there: choose of {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in named]


def parts_of(kinds: Sequence[str], config: Gemma3Config, adapted: Sequence[str]) -> list[Part]:
    """The intact model, and all parts of some kinds.

    Args:
        adapted: the linears that have adapters.

    Raises:
        UsageError: adapters are asked for and there are none.
    """
    if "adapters" in kinds and not adapted:
        raise UsageError("where: the model has no adapters to be taken away: choose layers or heads")
    made = {"layers": _branches, "heads": _heads}
    found = [part for kind in kinds if kind in made for part in made[kind](config)]
    return [Part(INTACT), *found, *(_adapters(adapted) if "adapters" in kinds else [])]


def _branches(config: Gemma3Config) -> list[Part]:
    every = tuple(range(config.num_attention_heads))
    return [
        Part(f"L{layer} {branch}", "branch", removal, (layer, column))
        for layer in range(config.num_hidden_layers)
        for column, (branch, removal) in enumerate(
            zip(BRANCHES, (Removal(heads={layer: every}), Removal(mlps=(layer,))), strict=True)
        )
    ]


def _heads(config: Gemma3Config) -> list[Part]:
    return [
        Part(head_name(layer, head), "head", Removal(heads={layer: (head,)}), (layer, head))
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    ]


def _adapters(adapted: Sequence[str]) -> list[Part]:
    """Each matrix, all of each layer, and all of each kind of matrix."""
    places = {name: (int(name.split(".")[2]), LINEARS.index(name.rpartition(".")[2])) for name in adapted}
    found = [Part(f"L{at[0]} {LINEARS[at[1]]}", "matrix", Removal(adapters=(name,)), at) for name, at in places.items()]
    for layer in sorted({at[0] for at in places.values()}):
        names = tuple(name for name, at in places.items() if at[0] == layer)
        found.append(Part(f"adapters of L{layer}", "layer", Removal(adapters=names)))
    for column in sorted({at[1] for at in places.values()}):
        names = tuple(name for name, at in places.items() if at[1] == column)
        found.append(Part(f"adapters of {LINEARS[column]}", "kind", Removal(adapters=names)))
    return found
