"""Attention sinks and massive activations: which tokens draw weight and give little, and how large the stream grows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.inspection import LayerStatistics, ResidualFacts
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.attention.heads import grid
from gemma_tui.studies.attention.parts import part
from gemma_tui.studies.attention.reading import Reading, View, read_tokens, window_notes
from gemma_tui.tokenizer import BOS

EPSILON = 0.3
"""Of Gu et al.; Barbero et al. (arXiv:2504.02732) take 0.8."""

FP16_MAX = 65504.0

FEW = 32
"""A column that fewer rows come after is read by near ones only; it is not ranked. Half of a text that is shorter."""

DEFINITIONS = {
    "alpha_gu": "sum of a column's weights / (T - k) (Gu et al., arXiv:2410.10781)",
    "alpha": "sum of a column's weights / rows that see it; differs on local layers of a text beyond the window",
    "share": "share of all heads whose alpha is over epsilon",
    "drain": "norm of the value at a position / median norm of the others, mean over layers and key heads",
    "massive": "largest |h| of the residual stream / median |h|; before each layer, and after the last",
}


def column_mass(statistics: LayerStatistics, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The mean weight that each column gets: of the rows that see it, and by Gu et al.; float64 ``[heads, T]``."""
    length = statistics.received.shape[1]
    after = np.arange(length, 0, -1)
    received = statistics.received.astype(np.float64)
    return received / np.minimum(after, window or length), received / after


def value_drain(statistics: LayerStatistics) -> np.ndarray:
    """‖v‖ at each position over the median of all the others, float64 ``[kv_heads, T]``; NaN for a single token."""
    norms = statistics.value_norm.astype(np.float64)
    length = norms.shape[1]
    if length < 2:
        return np.full(norms.shape, np.nan)
    # Without one entry the middle of the sorted rest moves by at most one place.
    order, rank = np.sort(norms, axis=1), norms.argsort(1).argsort(1)
    middles = ((length - 2) // 2, (length - 1) // 2)
    medians = sum(np.take_along_axis(order, m + (rank <= m), axis=1) for m in middles) / 2
    return norms / np.maximum(medians, 1e-30)


@dataclass(frozen=True, eq=False)
class Sinks:
    """What there is about the sinks of a text.

    Attributes:
        share, share_gu: float64 ``[T]``, of all heads, those with a column's alpha over epsilon.
        mean, mean_gu: float64 ``[T]``, of alpha over all heads.
        first, first_gu: float64 ``[layers, heads]``, alpha of position 0.
        drain: float64 ``[T]``, mean over layers and key heads; ``first_drain`` ``[layers]``, of position 0.
        stream: of the residual stream, before each layer and after the last.
    """

    share: np.ndarray
    share_gu: np.ndarray
    mean: np.ndarray
    mean_gu: np.ndarray
    first: np.ndarray
    first_gu: np.ndarray
    drain: np.ndarray
    first_drain: np.ndarray
    stream: list[ResidualFacts]


def measure(reading: Reading, epsilon: float = EPSILON) -> Generator[float, None, Sinks]:
    """The sinks of one text.

    Raises:
        UsageError: epsilon is not between 0 and 1.
    """
    if not 0 < epsilon < 1:
        raise UsageError(f"epsilon {epsilon} must be between 0 and 1: 0.3 is usual")
    config, count = reading.inspection.config, reading.inspection.config.num_hidden_layers
    columns, firsts, drains, stream = np.zeros((4, reading.length)), [], [], []
    for layer in range(count):
        statistics = reading.statistics(layer)
        alphas = np.stack(column_mass(statistics, config.window(layer)))
        columns += np.concatenate(((alphas > epsilon).mean(1), alphas.mean(1))) / count
        firsts.append(alphas[:, :, 0])
        drains.append(value_drain(statistics).mean(0))
        stream.append(reading.inspection.residual(layer))
        yield (layer + 1) / count
    stream.append(reading.inspection.residual(count))
    first, first_gu = np.stack(firsts, axis=1)
    drain = np.mean(drains, axis=0)
    share, share_gu, mean, mean_gu = columns
    first_drain = np.array([values[0] for values in drains])
    return Sinks(share, share_gu, mean, mean_gu, first, first_gu, drain, first_drain, stream)


def sinks(reading: Reading, epsilon: float = EPSILON, compare: bool = False, top: int = 8) -> View:
    """Sinks by column and by layer, massive activations by layer.

    Args:
        compare: whether the same text is read a second time, without ``<bos>``, or with it if it had none.
    """
    parts = 2 if compare else 1
    found = yield from part(measure(reading, epsilon), 0, parts)
    readings = [(reading, found)]
    if compare:
        other = _other(reading)
        readings.append((other, (yield from part(measure(other, epsilon), 1, parts))))
    config = reading.inspection.config
    tables = [
        Table("sink", _SINK, _columns(reading, found, top)),
        Table("layer", _LAYER, _layers(reading, found, epsilon)),
        Table("massive", _MASSIVE, _massive(reading, found)),
    ]
    if compare:
        tables.append(Table("bos", _BOS, [_summary(*pair) for pair in readings]))
    return Figure(
        "sinks and massive activations",
        notes=_notes(reading, found, epsilon),
        heats=[grid(found.first, config, "alpha of position 0, by the rows that see it", "")],
        charts=_charts(readings, epsilon),
        tables=tables,
        arrays=_arrays(found),
        facts={**reading.facts, "epsilon": epsilon, "definitions": DEFINITIONS},
    )


def _other(reading: Reading) -> Reading:
    """The same text without ``<bos>``, or with it."""
    ids = reading.tokens.tolist()
    return read_tokens(reading.engine, reading.tokenizer, ids[1:] if ids[0] == BOS else [BOS, *ids])


def _columns(reading: Reading, found: Sinks, top: int) -> list[tuple[Any, ...]]:
    """Position 0, and the columns that are sinks of the most heads."""
    ranked = np.lexsort((-found.mean_gu, -found.share_gu))
    last = reading.length - min(FEW, (reading.length + 1) // 2)
    chosen = [0, *[int(k) for k in ranked if 0 < k <= last][: top - 1]]
    numbers = (found.share, found.share_gu, found.mean, found.mean_gu, found.drain)
    return [(k, reading.labels[k], *(float(values[k]) for values in numbers)) for k in chosen]


_SINK = ("position", "token", "share", "share_gu", "alpha", "alpha_gu", "drain")
_MASSIVE = ("layer", "value", "position", "token", "dimension", "over_median")
_LAYER = ("layer", "type", "share", "share_gu", "alpha", "alpha_gu", "drain", "rms", "largest", "massive")
_BOS = ("text", "first_token", "share", "share_gu", "alpha", "alpha_gu", "drain", "massive")


def _layers(reading: Reading, found: Sinks, epsilon: float) -> list[tuple[Any, ...]]:
    """A row per layer; after the last only the stream is there."""
    config, rows = reading.inspection.config, []
    for layer, facts in enumerate(found.stream):
        stream = (_rms(facts), facts.largest[0][0], _massiveness(facts))
        if layer == config.num_hidden_layers:
            rows.append((f"after L{layer - 1}", "", *[float("nan")] * 5, *stream))
            continue
        alpha, gu = found.first[layer], found.first_gu[layer]
        shares = [float((values > epsilon).mean()) for values in (alpha, gu)]
        means = [float(values.mean()) for values in (alpha, gu)]
        kind = "local" if config.is_local(layer) else "global"
        rows.append((f"L{layer}", kind, *shares, *means, float(found.first_drain[layer]), *stream))
    return rows


def _massive(reading: Reading, found: Sinks) -> list[tuple[Any, ...]]:
    """The three largest entries of each stream."""
    last = len(found.stream) - 1
    return [
        (f"after L{layer - 1}" if layer == last else f"L{layer}", value, position, reading.labels[position], dimension,
         value / max(facts.median, 1e-30))
        for layer, facts in enumerate(found.stream)
        for value, position, dimension in facts.largest
    ]  # fmt: skip


def _summary(reading: Reading, found: Sinks) -> tuple[Any, ...]:
    name = "with <bos>" if reading.facts["bos"] else "without <bos>"
    numbers = (found.share, found.share_gu, found.mean, found.mean_gu, found.drain)
    massive = max(_massiveness(facts) for facts in found.stream)
    return name, reading.labels[0], *(float(values[0]) for values in numbers), massive


def _rms(facts: ResidualFacts) -> float:
    """Of all entries of a stream."""
    return float(np.sqrt(np.mean(facts.rms.astype(np.float64) ** 2)))


def _massiveness(facts: ResidualFacts) -> float:
    return facts.largest[0][0] / max(facts.median, 1e-30)


def _notes(reading: Reading, found: Sinks, epsilon: float) -> list[str]:
    notes = window_notes(reading)
    share, gu = found.share[0], found.share_gu[0]
    heads = found.first.size
    notes.append(
        f"position 0 {reading.labels[0]} is a sink (alpha > {epsilon:g}) of {share:.1%} of {heads} heads "
        f"by the rows that see it, of {gu:.1%} by Gu's definition"
    )
    largest = max(facts.largest[0][0] for facts in found.stream)
    if largest > FP16_MAX:
        notes.append(f"the largest |h| is {largest:,.0f}: fp16 ends at 65,504 and would overflow")
    return notes


def _charts(readings: list[tuple[Reading, Sinks]], epsilon: float) -> list[LineChart]:
    """By layer; a second reading is a second line."""
    shares: list[Series] = []
    alphas: list[Series] = []
    rms: list[Series] = []
    largest: list[Series] = []
    massive: list[Series] = []
    for reading, found in readings:
        name = " with <bos>" if reading.facts["bos"] else " without <bos>"
        name = name if len(readings) > 1 else ""
        layers, streams = np.arange(len(found.first)), np.arange(len(found.stream))
        shares.append(Series(f"by rows that see it{name}", layers, (found.first > epsilon).mean(1)))
        shares.append(Series(f"Gu{name}", layers, (found.first_gu > epsilon).mean(1)))
        alphas.append(Series(f"alpha{name}", layers, found.first.mean(1)))
        alphas.append(Series(f"drain{name}", layers, found.first_drain))
        rms.append(Series(f"rms{name}", streams, [_rms(facts) for facts in found.stream]))
        largest.append(Series(f"largest{name}", streams, [facts.largest[0][0] for facts in found.stream]))
        massive.append(Series(f"largest / median{name}", streams, [_massiveness(facts) for facts in found.stream]))
    ends = [0.0, float(len(readings[0][1].stream) - 1)]
    largest.append(Series("fp16 ends, 65,504", ends, [FP16_MAX, FP16_MAX]))
    return [
        LineChart(f"share of heads with a sink at position 0, epsilon {epsilon:g}", shares, "layer"),
        LineChart("position 0: mean alpha, and drain of its value", alphas, "layer"),
        LineChart("rms of the residual stream", rms, "before layer", log=True),
        LineChart("largest |h|", largest, "before layer", log=True),
        LineChart("largest |h| over the median", massive, "before layer", log=True),
    ]


def _arrays(found: Sinks) -> dict[str, np.ndarray]:
    """All of it, with the stream as numbers by layer."""
    stream = found.stream
    arrays = {name: values for name, values in vars(found).items() if isinstance(values, np.ndarray)}
    return {
        **arrays,
        "rms": np.stack([facts.rms for facts in stream]),
        "median": np.array([facts.median for facts in stream]),
        "largest": np.array([[entry[0] for entry in facts.largest] for facts in stream]),
        "largest_at": np.array([[entry[1:] for entry in facts.largest] for facts in stream]),
    }
