"""Values of one prompt's run put into another's: where the difference of their answers is carried."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engines.edits import Patch, Span
from engines.inspection import Inspection
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure, Table
from gemma_tui.heat import Heat
from gemma_tui.studies.attention.heads import grid, head_name
from gemma_tui.studies.attention.lens import check_token, columns
from gemma_tui.studies.attention.reading import Reading, View, label

WHAT = ("stream", "heads")

COLUMNS = 32
"""Positions of a map at most; where more differ, neighbours are patched together."""

LEAST = 1e-3
"""Prompts whose logit differences are nearer to each other say nothing of what restores them."""

Answers = tuple[int, int]
"""The token of the first prompt, and that of the second."""


def patching_view(reading: Reading, other: Reading, what: str = "stream", answers: Answers | None = None) -> View:
    """How far the answer moves from the first prompt's to the second's when values of the second are put in.

    The measure is the logit of the second's answer less that of the first's, at the last position: 0 is where it is in
    the first prompt, 1 where it is in the second (Zhang & Nanda, arXiv:2309.16042).

    Args:
        what: ``stream`` for the residual stream before each layer, position by position; ``heads`` for the outputs of
            each head at all positions.
        answers: None for what each prompt makes most probable.

    Raises:
        UsageError: prompts of different lengths, or whose answers do not differ.
    """
    _check(reading, other, what, answers)
    last = reading.length - 1
    chosen = answers or (reading.top_token(last), other.top_token(last))
    _check_answers(reading, chosen)
    base, donor = (_difference(x.inspection, x.inspection, last, chosen) for x in (reading, other))
    if abs(donor - base) < LEAST:
        raise UsageError(f"the logit difference is {base:.4f} in both prompts: nothing is to be restored")
    patches, names, shape = _patches(reading, other, what)
    restored = np.zeros(shape)
    for done, patch in enumerate(patches):
        found = _difference(reading.edited([patch]), reading.inspection, last, chosen)
        restored.flat[done] = (found - base) / (donor - base)
        yield (done + 1) / restored.size
    return Figure(
        f"patched {what}: how much of the other prompt's answer is there",
        notes=_notes(reading, chosen, (base, donor), what, names),
        heats=[_heat(reading, what, names, restored)],
        tables=[_table(reading, what, names, restored)],
        arrays={"restored": restored},
        facts={
            **reading.facts, "what": what, "answers": [int(token) for token in chosen], "logit_difference": base,
            "logit_difference_other": donor,
        },
    )  # fmt: skip


def _check(reading: Reading, other: Reading, what: str, answers: Answers | None) -> None:
    if what not in WHAT:
        raise UsageError(f"patching of {what[:40]!r} is not there: choose {' or '.join(WHAT)}")
    if reading.length != other.length:
        raise UsageError(
            f"the prompts have {reading.length} and {other.length} tokens: patching needs the same number of both"
        )
    if np.array_equal(reading.tokens, other.tokens):
        raise UsageError("the prompts are the same: give two that differ in a few tokens")
    for token in answers or ():
        check_token(reading, token)


def _check_answers(reading: Reading, answers: Answers) -> None:
    if answers[0] == answers[1]:
        shown = label(reading.tokenizer, answers[0])
        raise UsageError(f"both prompts go on with {shown}: name two answers, or take prompts that differ in them")


def _difference(inspection: Inspection, base: Inspection, last: int, answers: Answers) -> float:
    """The logit of the second answer less that of the first."""
    here = (last, last + 1)
    first, second = (inspection.effect(base, here, np.array([token], np.int32)) for token in answers)
    return float(second.logit[0] - first.logit[0])


def _patches(reading: Reading, other: Reading, what: str) -> tuple[Iterator[Patch], list[Span], tuple[int, int]]:
    """Patches in the order of a map, the positions that are its columns, and its shape."""
    config = reading.inspection.config
    layers, heads = range(config.num_hidden_layers), range(config.num_attention_heads)
    first = int(np.flatnonzero(reading.tokens != other.tokens)[0])
    if what == "heads":
        whole = first, reading.length
        outputs = (
            Patch(layer, (head,), whole, other.inspection.head_outputs(layer, (head,), whole))
            for layer in layers
            for head in heads
        )
        return outputs, [whole], (len(layers), len(heads))
    pieces = np.array_split(np.arange(first, reading.length), min(COLUMNS, reading.length - first))
    spans = [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]
    streams = (Patch(layer, None, span, other.inspection.stream(layer, span)) for layer in layers for span in spans)
    return streams, spans, (len(layers), len(spans))


def _notes(reading: Reading, answers: Answers, ends: tuple[float, float], what: str, spans: list[Span]) -> list[str]:
    mine, theirs = (label(reading.tokenizer, token) for token in answers)
    notes = [
        f"logit of {theirs} less that of {mine}: {ends[0]:.3f} here, {ends[1]:.3f} in the other prompt",
        "0: as here; 1: as in the other prompt; below 0 or above 1: it goes past them",
    ]
    if what == "stream":
        notes.append("the row of a layer is the stream before it")
    if spans[0][0] > 0:
        notes.append(f"positions 0 to {spans[0][0] - 1} have the same tokens, so there is nothing to patch")
    longest = max(stop - start for start, stop in spans)
    if what == "stream" and longest > 1:
        notes.append(f"neighbours are patched together, up to {longest} to a column")
    return notes


def _heat(reading: Reading, what: str, spans: list[Span], restored: np.ndarray) -> Heat:
    config = reading.inspection.config
    if what == "heads":
        return grid(restored, config, "share restored by a head", "")
    marks = ["·" if config.is_local(layer) else "G" for layer in range(len(restored))]
    rows, names = [f"L{layer}" for layer in range(len(restored))], [_place(reading, span) for span in spans]
    return Heat("share restored by the stream", rows, names, restored, "", marks, "before a layer: G global, · local")


def _place(reading: Reading, span: Span) -> str:
    (name,) = columns(reading, [span[0]])
    return name if span[1] == span[0] + 1 else f"{name}-{span[1] - 1}"


def _table(reading: Reading, what: str, spans: list[Span], restored: np.ndarray) -> Table:
    """What restores most, first."""
    order = sorted(np.ndindex(*restored.shape), key=lambda at: -restored[at])
    if what == "heads":
        heads = [(head_name(layer, head), float(restored[layer, head])) for layer, head in order]
        return Table("patched_head", ("head", "restored"), heads)
    streams = [(layer, _place(reading, spans[at]), float(restored[layer, at])) for layer, at in order]
    return Table("patched_stream", ("layer", "position", "restored"), streams)
