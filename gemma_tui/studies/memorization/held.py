"""What each part holds: bits that are gone without it, beside what held-out text loses; as numbers and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engines.gemma3 import Gemma3Config
from engines.training import LINEARS
from gemma_tui.errors import GemmaTuiError
from gemma_tui.figure import Figure, Table
from gemma_tui.heat import Heat
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.attention.heads import grid
from gemma_tui.studies.memorization.bits import sequence_bits, totals
from gemma_tui.studies.memorization.parts import BRANCHES, INTACT, Part
from gemma_tui.studies.memorization.where import Chosen, Search, kept_parts, prepare, warnings, where_plan

COLUMNS = ("part", "what", "signed_change", "clipped_change", "loss_change", "held_out_loss_change", "ratio")
TITLES = {
    "branch": "bits that are lost without a layer's attention or MLP",
    "head": "bits that are lost without a head",
    "matrix": "bits that are lost without a matrix's adapter",
}


def changes(chosen: Chosen, intact: np.ndarray, without: np.ndarray) -> dict[str, float | None]:
    """What is otherwise without a part.

    Bits are those of the training sequences that were chosen, of whole sequences against the one reference: signed, and
    clipped at 0 (None without a reference). Losses are of these and of the held-out ones, nats per token, and the ratio
    is the one over the other: well above 1 for a part that holds what was memorised and little else, about 1 for one
    that all text needs. It is None where held-out text loses nothing.

    Args:
        intact, without: ln p of the chosen sequences, nats.
    """
    train, held = slice(0, chosen.trained), slice(chosen.trained, None)
    before, after = (totals(sequence_bits(x[train], chosen.reference[train])) for x in (intact, without))
    tokens = chosen.tokens
    loss = float((intact - without)[train].sum() / tokens[train].sum())
    other = float((intact - without)[held].sum() / tokens[held].sum()) if len(tokens) > chosen.trained else None
    return {
        "signed_change": after.signed - before.signed,
        "clipped_change": after.clipped - before.clipped,
        "loss_change": loss,
        "held_out_loss_change": other,
        "ratio": loss / other if other is not None and other > 0 else None,
    }


def where_figure(store: RunStore, run: Run) -> Figure:
    """Maps of what each part holds, and all parts, those without which most is lost first.

    Raises:
        UsageError: the run is another study.
        GemmaTuiError: it has not got so far, or what it was made from is gone.
    """
    found = parts_figure(prepare(where_plan(run), store), kept_parts(store, run))
    if found is None:
        raise GemmaTuiError(f"{run.run_id} has no part yet: `gemma-tui runs resume {run.run_id}` goes on with it")
    return found


def parts_figure(search: Search, known: Mapping[str, np.ndarray]) -> Figure | None:
    """The figure of what is known so far; None before the first part is.

    Args:
        known: as ``kept_parts`` gives it.
    """
    if INTACT not in known or len(known) < 2:
        return None
    chosen, config = search.chosen, search.subject.model.config()
    parts = [part for part in search.parts if part.name in known and part.kind]
    found = {part.name: changes(chosen, known[INTACT], known[part.name]) for part in parts}
    order = sorted(parts, key=lambda part: found[part.name]["signed_change"] or 0.0)
    against = search.measured.facts["reference"]
    columns = [c for c in COLUMNS if against is not None or c != "clipped_change"]
    rows = [tuple(_cell(part, found[part.name], column) for column in columns) for part in order]
    held = search.measured.sequences
    return Figure(
        f"which parts hold what {search.subject.name} has memorised",
        _notes(search, known[INTACT]),
        heats=[heat for kind in TITLES if (heat := _heat(kind, parts, found, config)) is not None],
        tables=[Table("part", columns, rows)],
        arrays={
            "log_likelihoods": np.stack([known[INTACT], *(known[part.name] for part in parts)]),
            "reference": chosen.reference,
            "sequence_rows": held.rows[chosen.numbers],
        },
        facts={
            "measurement": search.measured.run.run_id,
            "target": search.subject.name,
            "reference": against,
            "parts": [INTACT, *(part.name for part in parts)],
            "trained": chosen.trained,
            "signed_change": "bits of the chosen training sequences without the part, less those with it",
            "ratio": "loss change of the chosen training sequences over that of held-out ones",
        },
    )


def _cell(part: Part, found: Mapping[str, float | None], column: str) -> Any:
    return {"part": part.name, "what": part.kind, **found}[column]


def _heat(
    kind: str, parts: Sequence[Part], found: Mapping[str, Mapping[str, float | None]], config: Gemma3Config
) -> Heat | None:
    """Bits that are lost, by layer and column; NaN for what was not taken away."""
    here = [(part.at, found[part.name]["signed_change"]) for part in parts if part.kind == kind and part.at]
    if not here:
        return None
    names = {"branch": BRANCHES, "head": range(config.num_attention_heads), "matrix": LINEARS}[kind]
    values = np.full((config.num_hidden_layers, len(names)), math.nan)
    for at, change in here:
        values[at] = -(change or 0.0)
    if kind == "head":
        return grid(values, config, TITLES[kind], "bits")
    marks = ["·" if config.is_local(layer) else "G" for layer in range(len(values))]
    rows = [f"L{layer}" for layer in range(len(values))]
    return Heat(TITLES[kind], rows, [str(name) for name in names], values, "bits", marks, "G global, · local")


def _notes(search: Search, intact: np.ndarray) -> list[str]:
    chosen, trained = search.chosen, search.chosen.trained
    bits = totals(sequence_bits(intact[:trained], chosen.reference[:trained]))
    tokens, held = chosen.tokens, len(chosen.numbers) - trained
    against = search.measured.facts["reference"] or "the uniform code"
    notes = [
        f"the {trained} training sequences of {search.measured.run.run_id} that most is held of: "
        f"{bits.signed:,.1f} bits against {against}, {_loss(intact[:trained], tokens[:trained]):.4f} nats per token"
    ]
    if held:
        loss = _loss(intact[trained:], tokens[trained:])
        notes.append(f"{held} held-out sequences, {loss:.4f} nats per token; ratio: loss change over theirs")
        notes.append("a part without a ratio costs held-out text nothing")
    notes += [f"warning: {text}" for text in warnings(search)]
    return [*notes, "parts work together: what is lost without each does not add up to what is held"]


def _loss(log_likelihoods: np.ndarray, tokens: np.ndarray) -> float:
    return -float(log_likelihoods.sum() / tokens.sum())
