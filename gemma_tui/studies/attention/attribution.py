"""Where a logit comes from: heads, MLPs, the embedding, and the tokens that heads read."""

from __future__ import annotations

import re

import numpy as np

from engines.edits import check_heads
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.inspection import Attribution
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.attention.heads import grid, head_name
from gemma_tui.studies.attention.lens import check_token
from gemma_tui.studies.attention.reading import Reading, View, label
from gemma_tui.text import one_line
from gemma_tui.tokenizer import Tokenizer

TOP = 20
"""Sources that are listed."""

DEFINITION = (
    "parts of the residual stream before the final norm, through the post-norms and the final norm with the scales "
    "that these have in the run; the parts sum to the logit"
)


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The one token that a typed text is; a space before a word counts.

    Raises:
        UsageError: it is none, or several, which are named.
    """
    ids = tokenizer.encode(text, bos=False)
    if len(ids) == 1:
        return ids[0]
    # Control tokens, and tokens that encoding never gives alone.
    known = tokenizer.backend.token_to_id(text)
    if known is not None:
        return int(known)
    if not ids:
        raise UsageError("the token is empty: type one, with the space before it if it begins a word")
    parts = " ".join(label(tokenizer, i) for i in ids[:8]) + (" …" if len(ids) > 8 else "")
    raise UsageError(f"{_visible(text)} is {len(ids)} tokens ({parts}), not one: type one of them")


def position_of(reading: Reading, text: str) -> int:
    """A position as it is typed: a number, negative from the end, or a token, of which the last one is taken.

    Raises:
        UsageError: the text has no such position or token.
    """
    if re.fullmatch(r"-?\d{1,9}", text):
        return resolved(reading, int(text))
    places = np.flatnonzero(reading.tokens == token_id(reading.tokenizer, text))
    if not len(places):
        shown, last = _visible(text), reading.length - 1
        raise UsageError(f"token {shown} is not in the text: take one that is, or a position 0 to {last}")
    return int(places[-1])


def _visible(text: str) -> str:
    """What was typed, with its spaces as a vocabulary writes them."""
    return one_line(text.replace(" ", "▁"), 40)


def resolved(reading: Reading, position: int) -> int:
    """A position, negative ones counted from the end.

    Raises:
        UsageError: it is not there.
    """
    if not -reading.length <= position < reading.length:
        raise UsageError(f"position {position} is not there: the text has positions 0 to {reading.length - 1}")
    return position % reading.length


def attribution_view(
    reading: Reading,
    position: int,
    token: int | None = None,
    contrast: int | None = None,
    head: tuple[int, int] | None = None,
) -> View:
    """The logit of a token after a position, split into what each part of the model adds to it.

    Args:
        position: negative ones count from the end.
        token: None for the most probable.
        contrast: another token, whose logit is taken off.
        head: layer and head whose sources are listed as well.

    Raises:
        UsageError: a position, token or head that is not there.
    """
    config = reading.inspection.config
    position = resolved(reading, position)
    for wanted in (token, contrast):
        check_token(reading, wanted)
    if head is not None:
        _check_head(config, *head)
    for layer in range(config.num_hidden_layers):
        reading.inspection.advance(layer + 1)
        yield (layer + 1) / (config.num_hidden_layers + 1)
    token = reading.top_token(position) if token is None else int(token)
    parts = reading.inspection.attribution(position, token, contrast)
    yield 1.0
    heads = parts.sources.sum(-1, dtype=np.float64)
    title = _named(reading, position, token, contrast)
    tables = [_parts_table(parts, heads), _sources_table(reading, "source", parts.sources.sum((0, 1), np.float64))]
    if head is not None:
        name = f"source_of_{head_name(*head)}"
        tables.append(_sources_table(reading, name, parts.sources[head].astype(np.float64)))
    return Figure(
        title,
        notes=_notes(reading, parts, heads, contrast),
        heats=[grid(heads, config, "what heads add", "logits")],
        charts=[_chart(parts, heads)],
        tables=tables,
        arrays={"sources": parts.sources, "mlps": parts.mlps, "embedding": np.array(parts.embedding)},
        facts={
            **reading.facts, "position": position, "token": token, "definition": DEFINITION,
            "contrast": None if contrast is None else int(contrast), "logit": parts.logit, "sum": parts.total,
        },
    )  # fmt: skip


def _check_head(config: Gemma3Config, layer: int, head: int) -> None:
    try:
        check_heads(config, layer, (head,))
    except UnsupportedError as error:
        raise UsageError(str(error)) from None


def _named(reading: Reading, position: int, token: int, contrast: int | None) -> str:
    against = "" if contrast is None else f" less that of {label(reading.tokenizer, contrast)}"
    shown = label(reading.tokenizer, token)
    return f"the logit of {shown}{against} after {reading.labels[position]}, position {position}"


def _notes(reading: Reading, parts: Attribution, heads: np.ndarray, contrast: int | None) -> list[str]:
    notes = [
        f"logit {parts.logit:.4f} = heads {heads.sum():.4f} + MLPs {parts.mlps.sum(dtype=np.float64):.4f} "
        f"+ embedding {parts.embedding:.4f}",
        f"sum of the parts - logit = {parts.total - parts.logit:.1e}",
    ]
    if contrast is None:
        notes.append("what moves all logits alike is counted too, though it changes no probability: give a contrast")
    if reading.facts.get("dtype") == "bfloat16":
        notes.append("the model computes in bfloat16, so the sum is as far off as its rounding")
    return notes


def _chart(parts: Attribution, heads: np.ndarray) -> LineChart:
    layers = np.arange(len(heads), dtype=float)
    series = [Series("MLP", layers, parts.mlps.astype(np.float64)), Series("heads", layers, heads.sum(1))]
    return LineChart("what layers add, logits", series, "layer")


def _parts_table(parts: Attribution, heads: np.ndarray) -> Table:
    """Every part, the largest first whatever its sign."""
    rows = [("embedding", "embedding", parts.embedding)]
    rows += [(f"L{layer}.MLP", "mlp", float(value)) for layer, value in enumerate(parts.mlps)]
    rows += [(head_name(layer, head), "head", float(value)) for (layer, head), value in np.ndenumerate(heads)]
    return Table("part", ("part", "type", "logits"), sorted(rows, key=lambda row: -abs(row[2])))


def _sources_table(reading: Reading, kind: str, sources: np.ndarray) -> Table:
    """The tokens that heads carry most from, the largest first whatever its sign."""
    order = np.argsort(-np.abs(sources), kind="stable")[:TOP]
    rows = [(int(at), reading.labels[at], float(sources[at])) for at in order]
    return Table(kind, ("position", "token", "logits"), rows)
