"""Scores split by rotary pair: which wavelengths a head reads by (RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from engines.edits import check_heads
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.inspection import first_key, spans
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.attention.attribution import resolved
from gemma_tui.studies.attention.heads import grid, head_name
from gemma_tui.studies.attention.reading import Reading, View, window_notes

DEFINITION = (
    "c_p = (q_p k_p + q_p+h k_p+h) · query_pre_attn_scalar^-0.5, h = head_dim / 2, q and k normalised and rotated; "
    "the pairs sum to the score before the softmax"
)

SHARE = (
    "cov(c_p, score) / var(score) over all visible pairs of the text; the shares of a head sum to 1, "
    "and a pair that works against the others has a negative one"
)


@dataclass(frozen=True, eq=False)
class RotarySums:
    """Rotary pairs over all visible query-key pairs; float64 ``[heads, head_dim / 2]``.

    Attributes:
        mean, spread: mean and standard deviation of the contribution to the score.
        share: of the variance of the score; NaN where that is nothing.
    """

    mean: np.ndarray
    spread: np.ndarray
    share: np.ndarray


def wavelengths(config: Gemma3Config, layer: int) -> np.ndarray:
    """Tokens in which each rotary pair turns once, float64 ``[head_dim / 2]``, the shortest first."""
    rope = config.rope(layer)
    return 2 * math.pi * rope.factor * rope.theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)


def contributions(query: np.ndarray, key: np.ndarray, scale: float) -> np.ndarray:
    """What each rotary pair adds to a score, float64 ``[..., head_dim / 2]``."""
    return _folded(query.astype(np.float64) * key.astype(np.float64)) * scale


def _folded(dimensions: np.ndarray) -> np.ndarray:
    """Dimension p and p + head_dim / 2 are a pair, as Hugging Face splits them."""
    first, second = np.split(dimensions, 2, axis=-1)
    return first + second


def rotary_sums(
    queries: np.ndarray, keys: np.ndarray, scale: float, window: int | None
) -> Generator[float, None, RotarySums]:
    """Each rotary pair over all visible pairs of a text, in time that grows as T · head_dim².

    Keys that every query of a tile sees come in by their second moments, so that only those at the window's two ends
    meet the queries one by one; float64.

    Args:
        queries: ``[heads, T, head_dim]``, normalised and rotated.
        keys: ``[kv_heads, T, head_dim]``.
    """
    heads, length, size = queries.shape
    group, pairs = heads // len(keys), size // 2
    moments, totals = np.zeros((len(keys), size, size)), np.zeros((len(keys), size))
    first, second, crossed = np.zeros((3, heads, pairs))
    count, held = 0, (0, 0)
    for start, stop in spans((0, length)):
        oldest = min(start, 0 if window is None else max(0, stop - window))
        for known, (begin, end) in ((1, (held[1], start)), (-1, (held[0], oldest))):
            part = keys[:, begin:end].astype(np.float64)
            moments += known * (part.swapaxes(1, 2) @ part)
            totals += known * part.sum(1)
        held = oldest, start
        near = np.r_[first_key(start, window) : oldest, start:stop]
        distance = np.arange(start, stop)[:, None] - near
        seen = ((distance >= 0) & (distance < (window or length))).astype(np.float64)
        count += int(seen.sum()) + (stop - start) * (start - oldest)
        for head in range(heads):
            q, k = queries[head, start:stop].astype(np.float64), keys[head // group, near].astype(np.float64)
            moment = moments[head // group]
            first[head] += _folded(q * (seen @ k + totals[head // group])).sum(0)
            second[head] += _squares(q, seen, k, moment)
            crossed[head] += _folded(q * ((seen * (q @ k.T)) @ k + q @ moment)).sum(0)
        yield stop / length
    mean, square = first * scale / count, second * scale**2 / count
    score = mean.sum(1, keepdims=True)
    covariance = crossed * scale**2 / count - mean * score
    variance = covariance.sum(1, keepdims=True)
    # What is left of a text of one token is rounding.
    constant = variance <= 1e-12 * (score**2 + np.finfo(np.float64).tiny)
    share = np.where(constant, np.nan, covariance / np.where(constant, 1, variance))
    return RotarySums(mean, np.sqrt(np.maximum(square - mean**2, 0)), share)


def _squares(q: np.ndarray, seen: np.ndarray, k: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Σ (q_1 k_1 + q_2 k_2)² of each rotary pair, float64 ``[head_dim / 2]``."""
    (q1, q2), (k1, k2) = np.split(q, 2, axis=1), np.split(k, 2, axis=1)
    half = q1.shape[1]
    own, across = np.split(np.diag(moment), 2), np.diag(moment, half)
    terms = ((q1 * q1, k1 * k1, own[0]), (2 * q1 * q2, k1 * k2, across), (q2 * q2, k2 * k2, own[1]))
    return np.sum([(ours * (seen @ theirs + far)).sum(0) for ours, theirs, far in terms], axis=0)


def neurons_view(reading: Reading, layer: int, head: int, query: int, key: int | None = None) -> View:
    """One score of a head by rotary pair, and the same over all pairs of the text, for this head and for all.

    Args:
        query: its position; negative ones count from the end.
        key: None for the one with the largest weight.

    Raises:
        UsageError: a head or position that is not there, or a key that the query does not see.
    """
    inspection, config = reading.inspection, reading.inspection.config
    try:
        check_heads(config, layer, (head,))
    except UnsupportedError as error:
        raise UsageError(str(error)) from None
    query = resolved(reading, query)
    key = None if key is None else resolved(reading, key)
    _check_seen(reading, layer, query, key)
    sums = []
    scale, layers = config.query_pre_attn_scalar**-0.5, config.num_hidden_layers
    for number in range(layers):
        steps = rotary_sums(*inspection.queries_keys(number), scale, config.window(number))
        while True:
            try:
                share = next(steps)
            except StopIteration as end:
                sums.append(end.value)
                break
            yield (number + share) / (layers + 1)
    split = _split(reading, layer, head, query, key)
    yield 1.0
    return _figure(reading, layer, head, split, sums)


def _check_seen(reading: Reading, layer: int, query: int, key: int | None) -> None:
    oldest = first_key(query, reading.inspection.config.window(layer))
    if key is not None and not oldest <= key <= query:
        raise UsageError(f"position {query} does not see position {key}: in layer {layer} it sees {oldest} to {query}")


@dataclass(frozen=True, eq=False)
class Split:
    """One score.

    Attributes:
        parts: float64 ``[head_dim / 2]``.
        weight: of the key, as the engine has it.
        off: the largest difference in the query's row between the weights of the engine and the softmax of the sums.
    """

    query: int
    key: int
    parts: np.ndarray
    weight: float
    off: float


def _split(reading: Reading, layer: int, head: int, query: int, key: int | None) -> Split:
    config, oldest = reading.inspection.config, first_key(query, reading.inspection.config.window(layer))
    weights = reading.inspection.attention(layer, head, (query, query + 1))[0, oldest : query + 1].astype(np.float64)
    key = oldest + int(weights.argmax()) if key is None else key
    queries, keys = reading.inspection.queries_keys(layer)
    seen = keys[head * len(keys) // len(queries), oldest : query + 1]
    parts = contributions(queries[head, query], seen, config.query_pre_attn_scalar**-0.5)
    scores = parts.sum(1)
    made = np.exp(scores - scores.max())
    off = float(np.abs(made / made.sum() - weights).max())
    return Split(query, key, parts[key - oldest], float(weights[key - oldest]), off)


def _figure(reading: Reading, layer: int, head: int, split: Split, sums: list[RotarySums]) -> Figure:
    config, labels = reading.inspection.config, reading.labels
    lengths, kind = wavelengths(config, layer), "local" if config.is_local(layer) else "global"
    long = np.stack([sums[i].share[:, wavelengths(config, i) > config.sliding_window].sum(1) for i in range(len(sums))])
    found = sums[layer]
    rope = config.rope(layer)
    return Figure(
        f"{head_name(layer, head)}, {kind}: {labels[split.query]} {split.query} reads {labels[split.key]} {split.key}, "
        "by rotary pair",
        notes=[
            f"sum of the {len(split.parts)} pairs = score {split.parts.sum():.6g}, weight {split.weight:.4g}; softmax "
            f"of such sums - weights of the row, at most {split.off:.1e}",
            f"rotation: θ {rope.theta:g}" + (f", positions divided by {rope.factor:g}" if rope.factor != 1 else "")
            + f"; wavelengths {lengths[0]:.3g} to {lengths[-1]:.4g} tokens",
            f"share: {SHARE}",
            *window_notes(reading),
        ],
        heats=[grid(long, config, f"share of the score's variance from wavelengths over the window, "
                    f"{config.sliding_window:,} tokens", "")],
        charts=_charts(config, layer, head, split, sums),
        tables=[_pairs(lengths, split, found, head), _kinds(config, sums)],
        arrays={
            "contribution": split.parts, "wavelength": lengths, "beyond": long,
            **{name: np.stack([getattr(some, name) for some in sums]) for name in ("mean", "spread", "share")},
        },
        facts={
            **reading.facts, "layer": layer, "head": head, "query": split.query, "key": split.key,
            "definition": DEFINITION, "share": SHARE, "score": float(split.parts.sum()), "weight": split.weight,
            "difference": split.off, "theta": rope.theta, "factor": rope.factor,
        },
    )  # fmt: skip


def _charts(config: Gemma3Config, layer: int, head: int, split: Split, sums: list[RotarySums]) -> list[LineChart]:
    x, found, axis = np.log10(wavelengths(config, layer)), sums[layer], "log10 of the wavelength, tokens"
    name = head_name(layer, head)
    shares = [Series(name, x, found.share[head])]
    for kind in ("local", "global"):
        chosen = [i for i in range(len(sums)) if config.is_local(i) == (kind == "local")]
        if chosen:
            mean = np.mean([sums[i].share.mean(0) for i in chosen], axis=0)
            shares.append(Series(f"all {kind} heads", np.log10(wavelengths(config, chosen[0])), mean))
    one = [Series(f"{name}, query {split.query}, key {split.key}", x, split.parts)]
    every = [Series("mean", x, found.mean[head]), Series("standard deviation", x, found.spread[head])]
    drawn = (
        ("what each rotary pair adds to the score", one),
        (f"the same over all pairs of the text, {name}", every),
        ("share of the score's variance", shares),
    )
    return [LineChart(title, [*lines, _window(config, lines)], axis) for title, lines in drawn]


def _window(config: Gemma3Config, lines: list[Series]) -> Series:
    """The window as an upright line."""
    values = np.concatenate([np.asarray(line.y, np.float64) for line in lines])
    seen = values[np.isfinite(values)]
    ends = [float(seen.min()), float(seen.max())] if seen.size else [0.0, 1.0]
    where = math.log10(config.sliding_window)
    return Series(f"window, {config.sliding_window:,} tokens", [where, where], ends)


def _pairs(lengths: np.ndarray, split: Split, found: RotarySums, head: int) -> Table:
    """Every rotary pair, the largest contribution first whatever its sign."""
    half = len(lengths)
    rows = [
        (
            pair, f"{pair}, {pair + half}", float(lengths[pair]), 2 * math.pi / float(lengths[pair]),
            float(split.parts[pair]), float(found.mean[head, pair]), float(found.spread[head, pair]),
            float(found.share[head, pair]),
        )
        for pair in np.argsort(-np.abs(split.parts), kind="stable").tolist()
    ]  # fmt: skip
    columns = ("pair", "dimensions", "wavelength", "frequency", "contribution", "mean", "spread", "share")
    return Table("pair", columns, rows)


def _kinds(config: Gemma3Config, sums: list[RotarySums]) -> Table:
    """Layers, with the mean over heads of the share of each decade of wavelengths."""
    decades = [int(d) for d in np.unique(np.floor(np.log10(_every_wavelength(config))))]
    rows = []
    for layer, found in enumerate(sums):
        own, share = np.floor(np.log10(wavelengths(config, layer))), found.share.mean(0)
        kind = "local" if config.is_local(layer) else "global"
        rows.append((f"L{layer}", kind, *(float(share[own == decade].sum()) for decade in decades)))
    return Table("layer", ("place", "layer", *(f"1e{d} to 1e{d + 1}" for d in decades)), rows)


def _every_wavelength(config: Gemma3Config) -> np.ndarray:
    return np.concatenate([wavelengths(config, layer) for layer in range(config.num_hidden_layers)])
