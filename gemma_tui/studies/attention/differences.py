"""How the attention of each head differs between two runs: prompts, models, engines, dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.gemma3 import Gemma3Config
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.attention.heads import grid, head_name
from gemma_tui.studies.attention.reading import Reading, View, window_notes
from gemma_tui.text import one_line

MOST_BYTES = 1_000_000_000
"""Of queries and keys that are kept while another model is loaded."""

ROUNDING = 1e-3
"""A divergence is exact to some 1e-7 nats in float32, and its root to this."""

DEFINITION = (
    "√ of the Jensen-Shannon divergence, in bits, of the rows of two heads: 0 for equal rows, 1 for rows without a "
    "common key (Endres & Schindelin, 2003); a head's number is the mean over its rows, row 0 left out"
)

ALIKE = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar",
    "sliding_window", "layer_types",
)  # fmt: skip
"""What two models must have in common for their heads to be the same heads."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What attention is made of in one run, so that another model can take the engine's place.

    Attributes:
        queries, keys: of each layer float32 ``[heads, T, head_dim]`` and ``[kv_heads, T, head_dim]``.
        labels: its tokens as they are shown.
    """

    queries: Sequence[np.ndarray]
    keys: Sequence[np.ndarray]
    labels: Sequence[str]
    config: Gemma3Config
    facts: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in (*self.queries, *self.keys))


def kept_bytes(config: Gemma3Config, length: int) -> int:
    """What ``keep`` would keep of so many tokens."""
    heads = config.num_attention_heads + config.num_key_value_heads
    return 4 * config.num_hidden_layers * heads * length * config.head_dim


def keep(reading: Reading) -> Kept:
    """Queries and keys of every layer.

    Raises:
        UsageError: they would take more than a gigabyte.
    """
    config, size = reading.inspection.config, kept_bytes(reading.inspection.config, reading.length)
    if size > MOST_BYTES:
        most = reading.length * MOST_BYTES // size
        raise UsageError(
            f"{reading.length:,} tokens would keep {size / 1e9:.1f} GB of queries and keys, more than "
            f"{MOST_BYTES / 1e9:g} GB: cut the text to {most:,} tokens"
        )
    found = [reading.inspection.queries_keys(layer) for layer in range(config.num_hidden_layers)]
    return Kept([q for q, _ in found], [k for _, k in found], list(reading.labels), config, dict(reading.facts))


def divergence_view(reading: Reading, kept: Kept, names: tuple[str, str]) -> View:
    """The distance of every head's attention from that of a run kept before.

    Args:
        names: of this run, and of the one kept.

    Raises:
        UsageError: another number of tokens, or a model of another shape.
    """
    config = reading.inspection.config
    _check(reading, kept)
    layers = []
    for layer in range(config.num_hidden_layers):
        divergence = reading.inspection.divergence(layer, kept.queries[layer], kept.keys[layer])
        layers.append(np.sqrt(divergence.astype(np.float64) / np.log(2)))
        yield (layer + 1) / config.num_hidden_layers
    distance = np.stack(layers)
    heads = distance[:, :, 1:].mean(-1) if reading.length > 1 else distance[:, :, 0]
    title = " against ".join(one_line(name, 40) for name in names)
    return Figure(
        f"attention of {title}",
        notes=_notes(reading, kept, heads),
        heats=[grid(heads, config, "Jensen-Shannon distance", "0 to 1")],
        charts=[_chart(config, distance)],
        tables=[_heads_table(reading, kept, heads, distance), _layers_table(config, heads)],
        arrays={"distance": distance.astype(np.float32)},
        facts={**reading.facts, "names": list(names), "other": dict(kept.facts), "definition": DEFINITION},
    )


def _check(reading: Reading, kept: Kept) -> None:
    if reading.length != len(kept.labels):
        raise UsageError(
            f"the texts have {reading.length:,} and {len(kept.labels):,} tokens: give two of the same number"
        )
    for name in ALIKE:
        mine, other = getattr(reading.inspection.config, name), getattr(kept.config, name)
        if mine != other:
            shown = "" if name == "layer_types" else f" ({mine} and {other})"
            raise UsageError(f"the models differ in {name}{shown}: take two of the same shape")


def _notes(reading: Reading, kept: Kept, heads: np.ndarray) -> list[str]:
    config = reading.inspection.config
    means = [f"{kind} {heads[layers].mean():.4f}" for kind, layers in _kinds(config).items()]
    other = sum(a != b for a, b in zip(reading.labels, kept.labels, strict=True))
    notes = [
        f"mean Jensen-Shannon distance: {', '.join(means)}",
        "√ of the divergence in bits: 0 where a head looks at the same, 1 where it looks at nothing the other does; "
        "row 0 is left out of means",
    ]
    if heads.max() < ROUNDING:
        notes.append(f"all below {ROUNDING}, which is what rounding in float32 makes: no difference")
    if other:
        notes.append(f"{other} of {reading.length} tokens differ; rows are compared by position")
    return [*notes, *window_notes(reading)]


def _kinds(config: Gemma3Config) -> dict[str, np.ndarray]:
    """Which layers are local, and which global; a kind without layers is left out."""
    local = np.array([config.is_local(layer) for layer in range(config.num_hidden_layers)])
    return {kind: layers for kind, layers in (("local", local), ("global", ~local)) if layers.any()}


def _chart(config: Gemma3Config, distance: np.ndarray) -> LineChart:
    places = np.arange(distance.shape[-1], dtype=float)
    series = [Series(kind, places, distance[layers].mean((0, 1))) for kind, layers in _kinds(config).items()]
    return LineChart("distance by position", series, "position of the query")


def _heads_table(reading: Reading, kept: Kept, heads: np.ndarray, distance: np.ndarray) -> Table:
    """Heads, the most different first, with the row that differs most and the tokens there."""
    config, rows = reading.inspection.config, []
    for layer, head in sorted(np.ndindex(*heads.shape), key=lambda at: -heads[at]):
        row = int(distance[layer, head].argmax())
        kind = "local" if config.is_local(layer) else "global"
        mean, most = float(heads[layer, head]), float(distance[layer, head, row])
        rows.append((head_name(layer, head), kind, mean, most, row, reading.labels[row], kept.labels[row]))
    return Table("head", ("head", "layer", "distance", "most", "position", "token", "other_token"), rows)


def _layers_table(config: Gemma3Config, heads: np.ndarray) -> Table:
    rows = [(kind, float(heads[layers].mean()), float(heads[layers].max())) for kind, layers in _kinds(config).items()]
    return Table("layers", ("layers", "distance", "most"), rows)
