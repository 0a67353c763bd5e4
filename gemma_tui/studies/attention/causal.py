"""What an edit does to the predictions: heads put out, edges cut."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import fields

import numpy as np

from engines.edits import (
    ABLATIONS,
    Ablation,
    Edit,
    Knockout,
    Span,
    check_heads,
)
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.inspection import Effect, Inspection
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.attention.heads import grid, head_name
from gemma_tui.studies.attention.lens import CHUNK, SHOWN
from gemma_tui.studies.attention.reading import Reading, View, label, window_notes
from gemma_tui.text import one_line

TOP = 20
"""Positions that are listed."""

FORMS = "write L3, L3.H1, L3.G0, local, global or beyond, and L3.H1:20>0 or L3.H1:10-20>0-3 for edges"
CHOSEN = re.compile(
    r"(?:L(?P<layer>\d{1,4})(?:\.(?P<kind>[HG])(?P<which>\d{1,4}))?|(?P<type>local|global))", re.IGNORECASE
)
EDGES = re.compile(r"(\d{1,7})(?:-(\d{1,7}))?>(\d{1,7})(?:-(\d{1,7}))?")

Chosen = list[tuple[int, tuple[int, ...]]]
"""Layers, and heads of each."""


def parse_target(text: str, config: Gemma3Config, how: str = "zero", length: int | None = None) -> list[Edit]:
    """The edits that a text such as ``L3.H1,L5.H0:10-20>0`` names, several of them between commas.

    ``L3`` are all heads of a layer, ``L3.G0`` those of a group that shares keys and values, ``local`` and ``global``
    all heads of such layers: their outputs are ablated, or with ``:queries>keys`` (a position, or the first and the
    last) those edges are cut. ``beyond`` cuts all global attention to what a local layer would not see.

    Args:
        how: ``zero`` or ``mean``, of ablations.
        length: of the text, so that edges beyond its end are refused; None for any.

    Raises:
        UsageError: it is not written like that, or names what is not there.
    """
    if how not in ABLATIONS:
        raise UsageError(f"ablation {one_line(how, 40)!r} is not there: choose {' or '.join(ABLATIONS)}")
    return [edit for part in text.split(",") for edit in _parsed(part.strip(), config, how, length)]


def _parsed(part: str, config: Gemma3Config, how: str, length: int | None) -> list[Edit]:
    if part.lower() == "beyond":
        layers = [(layer, tuple(range(config.num_attention_heads))) for layer in config.global_layers]
        if not layers:
            raise UsageError("beyond is not there: the model has no global layer")
        return [Knockout(layer, heads, beyond=config.sliding_window) for layer, heads in layers]
    name, colon, edges = part.partition(":")
    match = CHOSEN.fullmatch(name.strip())
    if match is None:
        raise UsageError(f"target {one_line(part, 40)!r} cannot be read: {FORMS}")
    chosen = _chosen(match, config)
    if not colon:
        return [Ablation(layer, heads, how) for layer, heads in chosen]
    return _cuts(chosen, edges, config, length)


def _chosen(match: re.Match[str], config: Gemma3Config) -> Chosen:
    every = tuple(range(config.num_attention_heads))
    if match["type"]:
        local = match["type"].lower() == "local"
        found: Chosen = [(i, every) for i in range(config.num_hidden_layers) if config.is_local(i) == local]
        if not found:
            raise UsageError(f"{match['type']} is not there: the model has no such layer")
        return found
    layer, heads = int(match["layer"]), every
    if match["kind"]:
        heads = _group(int(match["which"]), config) if match["kind"] in "gG" else (int(match["which"]),)
    try:
        check_heads(config, layer, heads)
    except UnsupportedError as error:
        raise UsageError(str(error)) from None
    return [(layer, heads)]


def _group(group: int, config: Gemma3Config) -> tuple[int, ...]:
    size, count = config.num_attention_heads // config.num_key_value_heads, config.num_key_value_heads
    if group >= count:
        raise UsageError(f"group G{group} is not there: a layer has groups 0 to {count - 1}, of {size} heads each")
    return tuple(range(group * size, (group + 1) * size))


def _cuts(chosen: Chosen, edges: str, config: Gemma3Config, length: int | None) -> list[Edit]:
    match = EDGES.fullmatch(edges.replace(" ", ""))
    shown = one_line(edges, 40)
    if match is None:
        raise UsageError(f"edges {shown!r} cannot be read: write 20>0, query first, or 10-20>0-3")
    queries, keys = _span(match[1], match[2], shown), _span(match[3], match[4], shown)
    if length is not None and max(queries[1], keys[1]) > length:
        raise UsageError(f"edges {shown} are not there: the text has positions 0 to {length - 1}")
    if queries[1] <= keys[0]:
        raise UsageError(f"edges {shown} are not there: a token sees itself and those before it (query > key)")
    nearest = queries[0] - keys[1] + 1
    blind = [layer for layer, _ in chosen if nearest >= (config.window(layer) or nearest + 1)]
    if blind:
        raise UsageError(
            f"edges {shown} are not there: layer {blind[0]} is local and sees {config.sliding_window} tokens"
        )
    return [Knockout(layer, heads, queries, keys) for layer, heads in chosen]


def _span(first: str, last: str | None, shown: str) -> Span:
    start, stop = int(first), int(last or first) + 1
    if stop <= start:
        raise UsageError(f"edges {shown} are not there: a range goes from its first position to its last")
    return start, stop


def effect(reading: Reading, edited: Inspection, span: Span, targets: np.ndarray) -> Generator[float, None, Effect]:
    """What an edited run of the text predicts otherwise, layer by layer and then chunk by chunk.

    Args:
        targets: int32 ``[T]``, of the whole text.
    """
    layers, starts = reading.inspection.config.num_hidden_layers, range(*span, CHUNK)
    steps, done = 2 * layers + len(starts), 0
    for inspection in (reading.inspection, edited):
        for layer in range(layers):
            inspection.advance(layer + 1)
            yield (done := done + 1) / steps
    parts = []
    for start in starts:
        chunk = start, min(start + CHUNK, span[1])
        parts.append(edited.effect(reading.inspection, chunk, targets[slice(*chunk)]))
        yield (done := done + 1) / steps
    return Effect(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Effect)))


def causal_view(reading: Reading, edits: Sequence[Edit], name: str) -> View:
    """What edits change: the next token, the loss over the text, and the positions they change most.

    Args:
        name: of the edits, as it was typed.

    Raises:
        UnsupportedError: an edit names what is not there.
    """
    targets = reading.targets()
    found = yield from effect(reading, reading.edited(edits), (0, reading.length), targets)
    before, after = -found.base_log_prob.astype(np.float64), -found.log_prob.astype(np.float64)
    places = np.arange(reading.length, dtype=float)
    change = Series("change of -ln p(next)", places, after - before)
    return Figure(
        f"the predictions with {one_line(name, 60)} taken out",
        notes=_effect_notes(reading, found, edits, int(targets[-1])),
        charts=[
            LineChart("KL(whole ‖ edited) of the next token, nats", [Series("KL", places, found.kl)], "position"),
            LineChart("loss by position, nats", [change], "position"),
        ],
        tables=[_changed(reading, found, targets)],
        arrays={**{f.name: getattr(found, f.name) for f in fields(Effect)}, "targets": targets},
        facts={**reading.facts, "edits": name, "kl": "KL(whole ‖ edited) of the next token, nats"},
    )


def _effect_notes(reading: Reading, found: Effect, edits: Sequence[Edit], target: int) -> list[str]:
    logits = float(found.base_logit[-1]), float(found.logit[-1])
    top = label(reading.tokenizer, int(found.top[-1]))
    notes = [
        f"next token {label(reading.tokenizer, target)}: logit {logits[0]:.3f} to {logits[1]:.3f} "
        f"({logits[1] - logits[0]:+.3f}), KL {max(0.0, found.kl[-1]):.4g} nats, most probable now {top}"
    ]
    if reading.length > 1:
        before, after = -found.base_log_prob[:-1].mean(dtype=np.float64), -found.log_prob[:-1].mean(dtype=np.float64)
        notes.append(f"loss of the text: {before:.4f} to {after:.4f} nats per token ({after - before:+.4f})")
    share = float((found.top != found.base_top).mean())
    notes.append(
        f"mean KL {max(0.0, found.kl.mean(dtype=np.float64)):.4g} nats; {share:.1%} of positions have another top token"
    )
    if any(isinstance(edit, Knockout) and edit.beyond for edit in edits):
        notes += window_notes(reading)
    return notes


def _changed(reading: Reading, found: Effect, targets: np.ndarray) -> Table:
    """The positions whose predictions changed most."""
    order = np.argsort(-found.kl, kind="stable")[:TOP]
    rows = [
        (
            int(at), reading.labels[at], label(reading.tokenizer, int(targets[at])), float(found.kl[at]),
            float(found.base_log_prob[at]), float(found.log_prob[at]),
            label(reading.tokenizer, int(found.base_top[at])), label(reading.tokenizer, int(found.top[at])),
        )
        for at in order
    ]  # fmt: skip
    names = ("position", "token", "next", "kl", "log_prob_before", "log_prob_after", "top_before", "top_after")
    return Table("changed", names, rows)


def ablation_scan(reading: Reading, how: str = "zero") -> View:
    """Every head ablated in turn: what each does to the predictions at the last 64 positions.

    Raises:
        UsageError: an unknown way of ablation.
    """
    parse_target("L0", reading.inspection.config, how)
    config, targets = reading.inspection.config, reading.targets()
    shape = config.num_hidden_layers, config.num_attention_heads
    span = max(0, reading.length - SHOWN), reading.length
    kl, loss, logit = np.zeros((3, *shape))
    for done, (layer, head) in enumerate(np.ndindex(*shape)):
        edited = reading.edited([Ablation(layer, (head,), how)])
        found = edited.effect(reading.inspection, span, targets[slice(*span)])
        kl[layer, head] = found.kl.mean(dtype=np.float64)
        loss[layer, head] = (found.base_log_prob - found.log_prob)[: -1 if reading.length > 1 else None].mean()
        logit[layer, head] = found.logit[-1] - found.base_logit[-1]
        yield (done + 1) / kl.size
    order = sorted(np.ndindex(*shape), key=lambda at: -kl[at])
    rows = [
        (head_name(*at), "local" if config.is_local(at[0]) else "global", *(float(x[at]) for x in (kl, loss, logit)))
        for at in order
    ]
    notes = [f"each head ablated alone ({how}); means over positions {span[0]} to {span[1] - 1}"]
    notes.append("the loss leaves out the last position, whose next token is not in the text")
    return Figure(
        f"what each head does ({how} ablation)",
        notes=notes,
        heats=[grid(kl, config, "mean KL(whole ‖ without)", "nats"), grid(loss, config, "rise of the loss", "nats")],
        tables=[Table("head", ("head", "layer", "kl", "loss_change", "logit_change"), rows)],
        arrays={"kl": kl, "loss_change": loss, "logit_change": logit},
        facts={**reading.facts, "how": how, "positions": list(span), "kl": "KL(whole ‖ without), nats, mean"},
    )
