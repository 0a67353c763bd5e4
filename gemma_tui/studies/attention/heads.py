"""Every head in one number per metric, and the grid of all heads."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.gemma3 import Gemma3Config
from engines.inspection import LayerStatistics
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, Table
from gemma_tui.heat import Heat
from gemma_tui.studies.attention.reading import Reading, View, window_notes

ELSEWHERE = 1e-4
"""Rows whose mass beside position 0 is less say nothing of where the rest goes."""

EDGE = 0.9
"""The oldest keys of a window begin at this share of it."""


@dataclass(frozen=True)
class Metric:
    """One number per head.

    Attributes:
        of: from the statistics of a layer and its window (None on global layers), float64 ``[heads]``.
    """

    name: str
    unit: str
    meaning: str
    of: Callable[[LayerStatistics, int | None], np.ndarray]


def _mean(rows: np.ndarray) -> np.ndarray:
    """Over the rows but the first, which sees itself alone."""
    if rows.shape[1] < 2:
        return np.full(len(rows), np.nan)
    return rows[:, 1:].mean(1, dtype=np.float64)


def _visible(length: int, window: int | None) -> np.ndarray:
    """How many keys each row sees."""
    return np.minimum(np.arange(1, length + 1), window or length)


def _normalised(s: LayerStatistics, window: int | None) -> np.ndarray:
    seen = _visible(s.entropy.shape[1], window)
    return _mean(s.entropy / np.log(np.maximum(seen, 2)))


def _distance(s: LayerStatistics, window: int | None) -> np.ndarray:
    return _mean(s.reach + s.first * np.arange(s.first.shape[1]))


def _distance_without_sink(s: LayerStatistics, window: int | None) -> np.ndarray:
    known = s.elsewhere > ELSEWHERE
    known[:, 0] = False
    rows = np.where(known, s.reach / np.maximum(s.elsewhere, ELSEWHERE), 0.0)
    counts = known.sum(1)
    return np.where(counts, rows.sum(1, dtype=np.float64) / np.maximum(counts, 1), np.nan)


def _sink(s: LayerStatistics, window: int | None) -> np.ndarray:
    return s.received[:, 0].astype(np.float64) / min(s.received.shape[1], window or s.received.shape[1])


def _sink_gu(s: LayerStatistics, window: int | None) -> np.ndarray:
    return s.received[:, 0].astype(np.float64) / s.received.shape[1]


def _share(rows: np.ndarray) -> np.ndarray:
    """Of all mass: TransformerLens' ``mul``, Σ(A∘D) / ΣA."""
    return rows.sum(1, dtype=np.float64) / rows.shape[1]


def _edge(s: LayerStatistics, window: int | None) -> np.ndarray:
    heads, length = s.by_distance.shape
    if window is None:
        return np.full(heads, np.nan)
    start = int(np.ceil(EDGE * window))
    if length <= start:
        return np.full(heads, np.nan)
    return s.by_distance[:, start:window].sum(1, dtype=np.float64) / (length - start)


def _drain(s: LayerStatistics, window: int | None) -> np.ndarray:
    heads, (groups, length) = s.entropy.shape[0], s.value_norm.shape
    if length < 2:
        return np.full(heads, np.nan)
    median = np.median(s.value_norm[:, 1:], axis=1)
    return np.repeat(s.value_norm[:, 0] / np.maximum(median, 1e-30), heads // groups).astype(np.float64)


METRICS = {
    m.name: m
    for m in (
        Metric("entropy", "nats", "mean entropy of a row, -Σ A ln A; row 0 left out", lambda s, w: _mean(s.entropy)),
        Metric("entropy_normalised", "", "entropy over the logarithm of the keys that are seen", _normalised),
        Metric("distance", "tokens", "mean of Σ A (q - k)", _distance),
        Metric("distance_without_sink", "tokens", "the same without position 0, renormalised", _distance_without_sink),
        Metric("sink", "", "mean weight of position 0 over the rows that see it", _sink),
        Metric("sink_gu", "", "Σ of the weights of position 0 over all rows (Gu et al., arXiv:2410.10781)", _sink_gu),
        Metric("bos_mass", "", "share of all mass on position 0, row 0 left out", lambda s, w: _mean(s.first)),
        Metric("previous", "", "share on the token before", lambda s, w: _share(s.previous)),
        Metric("self", "", "share on the token itself", lambda s, w: s.by_distance[:, 0] / s.by_distance.shape[1]),
        Metric("duplicate", "", "share on earlier copies of the token", lambda s, w: _share(s.duplicate)),
        Metric("induction", "", "share on what followed earlier copies of the token", lambda s, w: _share(s.induction)),
        Metric("beyond", "", "share at a distance of the window or more", lambda s, w: _share(s.beyond)),
        Metric("edge", "", "local: mass in the oldest tenth of the window, of rows that have it", _edge),
        Metric("value", "", "mean of Σ A ‖v‖", lambda s, w: _mean(s.weighted_value)),
        Metric("drain", "", "‖v‖ at position 0 over the median elsewhere", _drain),
    )
}  # fmt: skip

Heads = dict[str, np.ndarray]
"""For each metric float64 ``[layers, heads]``."""


def head_metrics(statistics: Sequence[LayerStatistics], config: Gemma3Config) -> Heads:
    """All metrics of all heads; NaN where one does not apply."""
    return {
        name: np.stack([metric.of(s, config.window(layer)) for layer, s in enumerate(statistics)])
        for name, metric in METRICS.items()
    }


def head_name(layer: int, head: int) -> str:
    """As everyone writes it."""
    return f"L{layer}.H{head}"


def head_grid(reading: Reading, metric: str = "entropy", where: str = "", sort: bool = True) -> View:
    """Layers × heads coloured by a metric, and the heads that a filter keeps as a table.

    Raises:
        UsageError: an unknown metric, or a filter that cannot be read.
    """
    check_metric(metric)
    config = reading.inspection.config
    statistics = yield from reading.all_statistics()
    heads = head_metrics(statistics, config)
    kept = keep(heads, config, where)
    order = np.argwhere(kept)
    if sort:
        values = np.nan_to_num(heads[metric][kept], nan=-np.inf)
        order = order[np.argsort(-values, kind="stable")]
    rows = [
        (head_name(layer, head), _kind(config, layer), *(float(heads[name][layer, head]) for name in METRICS))
        for layer, head in order
    ]
    return Figure(
        f"heads by {metric}",
        notes=[*window_notes(reading), f"{metric}: {METRICS[metric].meaning}", *_kept_note(where, kept)],
        heats=[grid(np.where(kept, heads[metric], np.nan), config, metric, METRICS[metric].unit)],
        tables=[Table("head", ("head", "layer", *METRICS), rows)],
        arrays=heads,
        facts={**reading.facts, "metrics": {name: m.meaning for name, m in METRICS.items()}},
    )


def check_metric(metric: str) -> None:
    """Refuse a metric that is not there."""
    if metric not in METRICS:
        raise UsageError(f"metric {metric[:40]!r} is not there: choose {', '.join(METRICS)}")


def grid(values: np.ndarray, config: Gemma3Config, title: str, unit: str) -> Heat:
    """A map of heads; layers are marked local (·) or global (G), and heads that share keys have a group's letter."""
    group = config.num_attention_heads // config.num_key_value_heads
    columns = [f"H{head}" + ("" if group == 1 else f" {chr(97 + head // group)}") for head in range(values.shape[1])]
    marks = ["·" if config.is_local(layer) else "G" for layer in range(len(values))]
    meaning = "G global, · local" + ("" if group == 1 else "; a, b … share keys and values")
    return Heat(title, [f"L{layer}" for layer in range(len(values))], columns, values, unit, marks, meaning)


def keep(heads: Heads, config: Gemma3Config, where: str) -> np.ndarray:
    """The heads for which an expression like ``sink > .3 and local`` holds, boolean ``[layers, heads]``.

    Names are the metrics, ``layer``, ``head``, ``local`` and ``global``; there are and, or, not, comparisons and
    arithmetic. A comparison with what does not apply is false.

    Raises:
        UsageError: it is not written like that.
    """
    shape = next(iter(heads.values())).shape
    if not where.strip():
        return np.ones(shape, bool)
    local = np.array([config.is_local(layer) for layer in range(shape[0])])[:, None].repeat(shape[1], 1)
    places = np.indices(shape)
    names: dict[str, np.ndarray] = {**heads, "layer": places[0], "head": places[1], "local": local, "global_": ~local}
    try:
        # `global` is a keyword of Python's, whose grammar this is.
        tree = ast.parse(_renamed(where), mode="eval").body
        found = _value(tree, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, np.ndarray) or found.dtype != bool:
        raise UsageError(f"filter {where[:60]!r} cannot be read: write for example sink > 0.3 and local")
    return found


def _renamed(where: str) -> str:
    words = where.replace("&", " and ").replace("|", " or ").split("global")
    return "global_".join(words).strip()


def _value(node: ast.expr, names: Mapping[str, np.ndarray]) -> Any:
    match node:
        case ast.BoolOp(op=op, values=values):
            parts = [_boolean(_value(value, names)) for value in values]
            return np.logical_and.reduce(parts) if isinstance(op, ast.And) else np.logical_or.reduce(parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_boolean(_value(operand, names))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return _COMPARISONS[type(op)](_value(left, names), _value(right, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_value(left, names), _value(right, names))
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name) if name in names:
            return names[name]
    raise ValueError(ast.dump(node)[:40])


def _boolean(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype != bool:
        raise ValueError("no condition")
    return value


_COMPARISONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Gt: np.greater, ast.GtE: np.greater_equal, ast.Lt: np.less, ast.LtE: np.less_equal,
    ast.Eq: np.equal, ast.NotEq: np.not_equal,
}  # fmt: skip
_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.true_divide,
}  # fmt: skip


def _kind(config: Gemma3Config, layer: int) -> str:
    return "local" if config.is_local(layer) else "global"


def _kept_note(where: str, kept: np.ndarray) -> list[str]:
    return [f"{int(kept.sum())} of {kept.size} heads: {where}"] if where.strip() else []
