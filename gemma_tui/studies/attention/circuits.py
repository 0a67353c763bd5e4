"""Output-value and query-key circuits: what the heads of a layer do with bare tokens (Elhage et al., 2021)."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from engines.edits import check_layer
from engines.errors import UnsupportedError
from engines.inspection import Circuit
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, Table
from gemma_tui.heat import Heat
from gemma_tui.studies.attention.attribution import resolved
from gemma_tui.studies.attention.heads import head_name
from gemma_tui.studies.attention.lens import check_token, columns
from gemma_tui.studies.attention.reading import Reading, View, label

TOP = 10
"""Tokens that are listed on either side."""

SAMPLE = 64
"""Tokens of a text that heads are tried with at most."""

BLOCK = 32
"""Of these at a time."""

DEFINITION = (
    "logits less their mean over the vocabulary: W_U · norm_final · norm_post,l · W_O,h W_V · norm_input,l(√d E[token])"
)

COPYING = "an own logit above the mean over the vocabulary, or among the 10 highest; rank 1 is the most raised token"


def circuits_view(reading: Reading, layer: int, position: int, token: int | None = None) -> View:
    """What each head of a layer raises and lowers when it attends to a token alone; which copy, and what they look for.

    Args:
        position: whose run gives the scales of the last norms; negative ones count from the end.
        token: attended to, and the query; None for the one at the position.

    Raises:
        UsageError: a layer, position or token that is not there.
    """
    config = reading.inspection.config
    try:
        check_layer(config, layer)
    except UnsupportedError as error:
        raise UsageError(str(error)) from None
    position = resolved(reading, position)
    check_token(reading, token)
    token = int(reading.tokens[position]) if token is None else int(token)
    for done in range(config.num_hidden_layers):
        reading.inspection.advance(done + 1)
        yield (done + 1) / (2 * config.num_hidden_layers)
    count = min(TOP, config.vocab_size)
    one = reading.inspection.circuit(layer, np.array([token], np.int32), position, count)
    places = sample(reading.tokens)
    tried = reading.tokens[places]
    own, rank, spread = yield from copying(reading, layer, position, tried)
    scores = reading.inspection.token_scores(layer, np.array([token], np.int32), tried)[:, 0]
    shown = label(reading.tokenizer, token)
    return Figure(
        f"circuits of layer {layer}, {'local' if config.is_local(layer) else 'global'}: {shown}",
        notes=_notes(reading, position, tried),
        heats=[_heat(reading, layer, places, rank)],
        tables=[
            _copying_table(layer, own, rank, spread),
            _output_table(reading, layer, one),
            _query_table(reading, layer, tried, scores),
        ],
        arrays={**{f"ov_{name}": array[:, 0] for name, array in vars(one).items()}, "tokens": tried,
                "own": own, "rank": rank, "spread": spread, "scores": scores},
        facts={**reading.facts, "layer": layer, "position": position, "token": token, "definition": DEFINITION,
               "copying": COPYING, "tried": len(tried)},
    )  # fmt: skip


def sample(tokens: np.ndarray) -> np.ndarray:
    """Where distinct tokens of a text first are, in their order; at most 64, spread evenly."""
    first = np.sort(np.unique(tokens, return_index=True)[1])
    count = min(SAMPLE, len(first))
    return first[np.arange(count) * len(first) // count]


def copying(
    reading: Reading, layer: int, position: int, tokens: np.ndarray
) -> Generator[float, None, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What heads do to the token that they attend to: own, rank and spread of ``Circuit``, ``[heads, tokens]``."""
    found: list[Circuit] = []
    for start in range(0, len(tokens), BLOCK):
        found.append(reading.inspection.circuit(layer, tokens[start : start + BLOCK], position, 0))
        yield (1 + min(1.0, (start + BLOCK) / len(tokens))) / 2
    own, rank, spread = (
        np.concatenate([getattr(part, name) for part in found], 1) for name in ("own", "rank", "spread")
    )
    return own, rank, spread


def _notes(reading: Reading, position: int, tried: np.ndarray) -> list[str]:
    distinct = len(np.unique(reading.tokens))
    notes = [
        "the stream is taken to be the token's embedding alone, as it is before layer 0; "
        "what layers before this one add to it is left out",
        f"frozen are two scales, those of the post-attention norm and of the final norm, at position {position}; they "
        "stretch logits and change no rank. The input norm's scale is the embedding's own",
        f"copying: {COPYING}; over {len(tried)} of {distinct} distinct tokens of the text",
        "query-key scores are between bare tokens at one place, so that rotation, which tells distances, does nothing",
    ]
    if reading.facts.get("dtype") == "bfloat16":
        notes.append("the model computes in bfloat16, so close ranks may be ties")
    return notes


def _heat(reading: Reading, layer: int, places: np.ndarray, rank: np.ndarray) -> Heat:
    names = columns(reading, places.tolist())
    heads = [head_name(layer, head) for head in range(len(rank))]
    return Heat("rank of the token that a head attends to, from 1", heads, names, rank + 1.0, log=True)


def _copying_table(layer: int, own: np.ndarray, rank: np.ndarray, spread: np.ndarray) -> Table:
    """A row per head, the one that copies most first."""
    rows = [
        (
            head_name(layer, head), float((own[head] > 0).mean()), float((rank[head] < TOP).mean()),
            float(rank[head].mean(dtype=np.float64) + 1), float(np.median(rank[head]) + 1),
            float(np.mean(own[head] / np.maximum(spread[head], np.finfo(np.float32).tiny), dtype=np.float64)),
        )
        for head in range(len(own))
    ]  # fmt: skip
    names = ("head", "raised", "in_top_10", "mean_rank", "median_rank", "deviations")
    return Table("copying", names, sorted(rows, key=lambda row: row[3]))


def _output_table(reading: Reading, layer: int, one: Circuit) -> Table:
    """The first of every head, then the second of every head."""
    rows = []
    for place, head in np.ndindex(one.raised.shape[2], len(one.own)):
        up, down = (label(reading.tokenizer, int(ids[head, 0, place])) for ids in (one.raised, one.lowered))
        by = float(one.raised_by[head, 0, place]), float(one.lowered_by[head, 0, place])
        rows.append((head_name(layer, head), place + 1, up, by[0], down, by[1]))
    return Table("ov", ("head", "place", "raised", "raised_by", "lowered", "lowered_by"), rows)


def _query_table(reading: Reading, layer: int, tried: np.ndarray, scores: np.ndarray) -> Table:
    """Tokens of the text that each head looks for most, from the token as query."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    rows = [
        (head_name(layer, head), place + 1, label(reading.tokenizer, int(tried[at])), float(scores[head, at]))
        for place, column in enumerate(order.T)
        for head, at in enumerate(column)
    ]
    return Table("qk", ("head", "place", "key", "score"), rows)
