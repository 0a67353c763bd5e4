"""Types of heads, told on random tokens that come twice: previous token, duplicate token, induction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.base import Engine
from engines.gemma3 import Gemma3Config
from engines.inspection import LayerStatistics
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, Table
from gemma_tui.heat import Heat
from gemma_tui.studies.attention.heads import grid, head_name
from gemma_tui.studies.attention.reading import View, read_tokens
from gemma_tui.studies.intervals import interval
from gemma_tui.tokenizer import BOS, BYTE, Tokenizer

TYPES = ("induction", "previous", "duplicate")

HALF = 50
"""Tokens that are repeated, as in TransformerLens' demonstration, where the window has room for them."""

NAMED = 0.2
"""A head whose scores are all lower is of none of the types."""

DEFINITIONS = {
    "text": "<bos>, S random tokens, the same S again; a score is the mean of a diagonal of A[1:, 1:]",
    "induction": "A.diagonal(1 - S): the token after the earlier copy (TransformerLens, Main_Demo)",
    "previous": "A.diagonal(-1)",
    "duplicate": "A.diagonal(-S): the earlier copy itself",
    "interval": "95 % of Student's t, over texts",
}


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all heads on texts of one length.

    Attributes:
        half: S, the tokens that are repeated.
        values: float64 ``[types, texts, layers, heads]``, types as in ``TYPES``.
    """

    half: int
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """``[types, layers, heads]``."""
        return self.values.mean(1)

    @property
    def interval(self) -> np.ndarray:
        """Half the width of the 95 % confidence interval of the mean; NaN for one text."""
        return interval(self.values.swapaxes(0, 1))[1]


def ordinary(tokenizer: Tokenizer, vocabulary: int) -> np.ndarray:
    """The ids that are neither special, control nor byte tokens, int32."""
    added = set(tokenizer.backend.get_added_tokens_decoder())
    names = ((i, tokenizer.token(i)) for i in range(min(vocabulary, tokenizer.size)) if i not in added)
    return np.array([i for i, name in names if name and not BYTE.fullmatch(name)], np.int32)


def repeated(ids: np.ndarray, half: int, generator: np.random.Generator) -> np.ndarray:
    """``<bos>`` and ``half`` random ids twice, int32; no id comes twice in a half if there are enough."""
    drawn = generator.choice(ids, half, replace=half > len(ids))
    return np.concatenate(([BOS], drawn, drawn)).astype(np.int32)


def scores(statistics: LayerStatistics, half: int) -> np.ndarray:
    """The scores of a layer on a repeated text, float64 ``[types, heads]``.

    The sum over a diagonal is known with its entry in the column of ``<bos>``, which is taken away.
    """

    def stripe(distance: int) -> np.ndarray:
        """Mean of A[1:, 1:] at a distance."""
        total = statistics.by_distance[:, distance].astype(np.float64) - statistics.first[:, distance]
        return total / (2 * half - distance)

    return np.stack([stripe(half - 1), statistics.previous[:, 2:].mean(1, dtype=np.float64), stripe(half)])


def halves(config: Gemma3Config) -> list[int]:
    """S for a text whose copies every layer sees, and for one that is too long for local layers, if there is room."""
    room = (config.max_position_embeddings - 1) // 2
    wanted = min(HALF, config.sliding_window - 1), config.sliding_window + 1
    return [half for half in wanted if 2 <= half <= room]


def head_types(
    engine: Engine, tokenizer: Tokenizer, texts: int = 10, lengths: Sequence[int] = (), seed: int = 0
) -> View:
    """Cards of all heads, the most typical first.

    Args:
        texts: random texts per length.
        lengths: S of each run; none for one within the window and one beyond it.

    Raises:
        UsageError: no text, a length below 2 or beyond the context, or no model is loaded.
    """
    info = engine.model()
    if info is None:
        raise UsageError("no model is loaded: load one first")
    config, runs = info.config, list(lengths or halves(info.config))
    _check(config, texts, runs)
    ids, generator = ordinary(tokenizer, config.vocab_size), np.random.default_rng(seed)
    if not len(ids):
        raise UsageError("the vocabulary has special and byte tokens only: take another model")
    found, layers = [], config.num_hidden_layers
    facts: dict[str, Any] = {}
    for number, half in enumerate(runs):
        values = np.zeros((len(TYPES), texts, layers, config.num_attention_heads))
        for text in range(texts):
            reading = read_tokens(engine, tokenizer, repeated(ids, half, generator).tolist())
            facts = reading.facts
            for layer in range(layers):
                values[:, text, layer] = scores(reading.inspection.statistics(layer), half)
                yield (number + (text + (layer + 1) / layers) / texts) / len(runs)
        found.append(Scores(half, values))
    facts = {**facts, "tokens": [2 * half + 1 for half in runs], "halves": runs, "texts": texts, "seed": seed}
    return _figure(config, found, {**facts, "definitions": DEFINITIONS})


def _check(config: Gemma3Config, texts: int, runs: Sequence[int]) -> None:
    if texts < 1:
        raise UsageError(f"{texts} texts measure nothing: take at least 1, or 2 for an interval")
    longest = (config.max_position_embeddings - 1) // 2
    wrong = [half for half in runs if not 2 <= half <= longest]
    if wrong or not runs:
        raise UsageError(f"{wrong[0] if wrong else 0} repeated tokens do not go: take 2 to {longest:,}")


def card(layer: int, head: int, name: str, mean: float, interval: float) -> str:
    """A head in a few words: ``L4.H2 induction .81 ± .02``."""
    spread = "" if math.isnan(interval) else f" ± {_short(interval)}"
    return f"{head_name(layer, head)} {name} {_short(mean)}{spread}"


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _figure(config: Gemma3Config, runs: Sequence[Scores], facts: dict[str, Any]) -> Figure:
    heats, arrays = [], {}
    for run in runs:
        for name, mean, values in zip(TYPES, run.mean, run.values, strict=True):
            heats.append(_grid(config, name, run.half, mean))
            arrays[f"{name}_{run.half}"] = values
    rows = _rows(config, runs)
    columns = ["card", "head", "layer", "type", "score", "interval"]
    columns += [f"{name}_{run.half}" for run in runs for name in TYPES]
    return Figure(
        "types of heads on repeated random tokens",
        notes=_notes(config, runs, facts["texts"]),
        heats=heats,
        tables=[Table("head", columns, rows)],
        arrays=arrays,
        facts=facts,
    )


def _grid(config: Gemma3Config, name: str, half: int, mean: np.ndarray) -> Heat:
    where = "beyond the window" if half > config.sliding_window else "within the window"
    return grid(mean, config, f"{name}, S {half:,}, {where}", "")


def _rows(config: Gemma3Config, runs: Sequence[Scores]) -> list[tuple[Any, ...]]:
    """A row per head with its best score in any run, the highest first."""
    means, intervals = (np.concatenate(parts) for parts in zip(*((r.mean, r.interval) for r in runs), strict=True))
    rows = []
    for layer, head in np.ndindex(means.shape[1:]):
        best = int(means[:, layer, head].argmax())
        score, interval = float(means[best, layer, head]), float(intervals[best, layer, head])
        name = TYPES[best % len(TYPES)] if score >= NAMED else "none"
        shown = card(layer, head, name, score, interval)
        kind = "local" if config.is_local(layer) else "global"
        values = [float(value) for value in means[:, layer, head]]
        rows.append((shown, head_name(layer, head), kind, name, score, interval, *values))
    return sorted(rows, key=lambda row: -row[4])


def _notes(config: Gemma3Config, runs: Sequence[Scores], texts: int) -> list[str]:
    notes = [f"{texts} random texts of each length; {DEFINITIONS['text']}", f"below {NAMED} a head has no type"]
    far = [run for run in runs if run.half > config.sliding_window]
    local = [layer for layer in range(config.num_hidden_layers) if config.is_local(layer)]
    for run in far:
        stripe = float(np.abs(run.values[TYPES.index("induction")][:, local]).max(initial=0))
        held = "as the window demands" if stripe == 0 else "WRONG: THE WINDOW DEMANDS 0"
        notes.append(f"S {run.half:,} beyond the window: the highest induction of a local head is {stripe:g}, {held}")
    if not far:
        notes.append("no run is beyond the window, so local and global heads are not told apart")
    return notes
