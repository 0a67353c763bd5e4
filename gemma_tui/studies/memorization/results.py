"""What a measurement has found, read back from the run store and the run's folder, and as a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import TokenScores
from gemma_tui.errors import GemmaTuiError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.memorization.findings import (
    Findings,
    exposure_findings,
    extraction_findings,
    membership_findings,
)
from gemma_tui.studies.memorization.history import marks, told
from gemma_tui.studies.memorization.inquiry import CURVES_FILE, EXTRACTED_FILE, FURTHER, MEMBERSHIP
from gemma_tui.studies.memorization.meter import ROWS_FILE, STRIPS_FILE, STUDY, plan_of
from gemma_tui.studies.memorization.planting import EXPOSURE
from gemma_tui.studies.memorization.reciting import EXTRACTION
from gemma_tui.studies.memorization.scores import SCORES, Scores
from gemma_tui.studies.memorization.sequences import HELD_OUT, TRAIN, Sequences, read_kept, read_sequences
from gemma_tui.studies.memorization.strips import distribution, strip_heat, strip_table, strip_values
from gemma_tui.studies.memorization.subjects import REFERENCE

MEASURES = {
    "sequences": "sequences",
    "tokens": "tokens that count",
    "loss": "loss, nats per token",
    "reference_loss": "loss of the reference",
    "clipped": "memorised bits (clipped at 0)",
    "signed": "signed bits",
    "mixture": "bits by the mixture",
    "signed_against_uniform": "signed bits against the uniform code",
    "bits_per_token": "memorised bits per token",
    "sequences_with_bits": "sequences with bits",
    "per_parameter": "bits per parameter",
    "per_trainable_parameter": "bits per trainable parameter",
    "per_parameter_without_embeddings": "bits per parameter but embeddings",
}
"""The measures of a set in a summary, and what they are called."""

KINDS = ("signed", "clipped", "mixture", "signed_against_uniform")
"""Kinds of bits that a sequence may have."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a measurement has found.

    Attributes:
        facts: what its start told.
        warnings: what a person should know before believing the numbers.
        summaries: of the target, or of each checkpoint; the last one is shown in full.
        sequences: as they were scored.
        rows: of ``sequences.jsonl``: each sequence under the last target.
        strips: of ``tokens.jsonl``: the most memorised sequences token by token; see ``strip_rows``.
        further: what the events ``membership``, ``extraction`` and ``exposure`` told of the last target.
        extracted: of ``extraction.jsonl``: each sequence that was cut to prefix and suffix.
        curves: of the ROC of each attack: ``loss_fpr``, ``loss_tpr`` and so on.
    """

    run: Run
    facts: dict[str, Any]
    summaries: list[dict[str, Any]]
    sequences: Sequences
    rows: list[dict[str, Any]]
    strips: list[dict[str, Any]] = field(default_factory=list)
    further: dict[str, dict[str, Any]] = field(default_factory=dict)
    extracted: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Whose scores there are: ``reference``, if there is one, and ``target`` or ``step-N`` for each checkpoint."""
        places = [path.name for path in (self.run.folder / SCORES).iterdir() if path.is_dir()]
        return sorted(places, key=lambda name: (name != REFERENCE, name))

    def scores(self, model: str) -> list[TokenScores]:
        """Token by token what a model makes of each sequence; see ``Scores.read``.

        Raises:
            GemmaTuiError: they are not all there.
        """
        return Scores(self.run.folder / SCORES / model, self.sequences).read()


def read_measured(store: RunStore, run: Run) -> Measured:
    """What a measurement has found.

    Raises:
        UsageError: the run is another study.
        GemmaTuiError: it has not got so far.
    """
    plan_of(run)
    events = store.events(run.run_id, limit=1_000_000)
    found = {event.values["target"]: dict(event.values) for event in events if event.kind == STUDY}
    if not found:
        raise GemmaTuiError(f"{run.run_id} has no bits yet: `gemma-tui runs resume {run.run_id}` goes on with it")
    facts = next(dict(event.values) for event in events if event.kind == "start")
    further = {event.kind: dict(event.values) for event in events if event.kind in FURTHER}
    curves = {}
    if MEMBERSHIP in further:
        drawn = [name for name, told in further[MEMBERSHIP]["attacks"].items() if "auc" in told]
        curves = read_kept(run.folder / CURVES_FILE, [f"{name}_{rate}" for name in drawn for rate in ("fpr", "tpr")])
    return Measured(
        run,
        facts,
        list(found.values()),
        read_sequences(run.folder),
        _read_rows(run.folder / ROWS_FILE),
        _read_rows(run.folder / STRIPS_FILE),
        further,
        _read_rows(run.folder / EXTRACTED_FILE) if EXTRACTION in further else [],
        curves,
        list(dict.fromkeys(str(event.values["text"]) for event in events if event.kind == "warning")),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise GemmaTuiError(f"{path} is broken: start the measurement again") from None


def memorization_figure(measured: Measured) -> Figure:
    """Bits of both sets, how they go with training, and the sequences that most is held of."""
    last, facts = measured.summaries[-1], measured.facts
    sets = {name.replace("_", "-"): last[name] for name in (TRAIN, HELD_OUT) if name in last}
    rows = [
        (words, *(found[measure] for found in sets.values()))
        for measure, words in MEASURES.items()
        if last[TRAIN].get(measure) is not None
    ]
    notes = [_against(facts), *(f"warning: {text}" for text in measured.warnings)]
    notes += ["bits are of whole sequences; their sum is a lower bound of what is held of the set"]
    if "gap" in last:
        notes.append(f"generalisation gap: {last['gap']:.4f} nats per token (held-out loss less training loss)")
    charts, moved = _history(measured.summaries, notes) if facts["checkpoints"] else ([], [])
    parts = _further(measured)
    return Figure(
        f"what {last['target']} has memorised",
        [*notes, *(note for part in parts for note in part.notes)],
        heats=[strip_heat(measured.strips, _against(facts))] if measured.strips else [],
        charts=[*charts, *_distribution(measured.rows), *(chart for part in parts for chart in part.charts)],
        tables=[
            Table("measure", ("measure", *sets), rows),
            *moved,
            *(table for part in parts for table in part.tables),
            *([strip_table(measured.strips)] if measured.strips else []),
            _most(measured.rows),
        ],
        arrays={
            **_arrays(measured.rows),
            **_strip_arrays(measured.strips),
            **{f"roc_{name}": curve for name, curve in measured.curves.items()},
        },
        facts=facts,
    )


def _further(measured: Measured) -> list[Findings]:
    found, parts = measured.further, []
    if MEMBERSHIP in found:
        parts.append(membership_findings(found[MEMBERSHIP], measured.curves, measured.facts))
    if EXTRACTION in found:
        parts.append(extraction_findings(found[EXTRACTION], measured.extracted))
    if EXPOSURE in found:
        parts.append(exposure_findings(found[EXPOSURE]))
    return parts


def _against(facts: dict[str, Any]) -> str:
    if facts["reference"] is None:
        return f"against the uniform code: log2 {facts['vocabulary']:,} bits a token"
    return f"against {facts['reference']}"


def _history(summaries: Sequence[dict[str, Any]], notes: list[str]) -> tuple[list[LineChart], list[Table]]:
    """Bits and losses over the training steps; adds to the notes what they tell."""
    kind = "clipped" if "clipped" in summaries[0][TRAIN] else "signed_against_uniform"
    sets = [name for name in (TRAIN, HELD_OUT) if name in summaries[0]]
    steps = [int(found["checkpoint"]) for found in summaries]
    lines = {(name, m): [float(found[name][m]) for found in summaries] for m in (kind, "loss") for name in sets}
    notes += told(steps, lines[TRAIN, kind], lines.get((HELD_OUT, "loss")))
    over, lowest = marks(steps, lines[TRAIN, kind], lines.get((HELD_OUT, "loss"), ()))
    charts = []
    for m, words, at in ((kind, "over at", over), ("loss", "lowest at", lowest)):
        series = [Series(name.replace("_", "-"), [float(step) for step in steps], lines[name, m]) for name in sets]
        if at is not None:
            values = [value for name in sets for value in lines[name, m]]
            series.append(Series(f"{words} {at}", [float(at)] * 2, [min(values), max(values)]))
        charts.append(LineChart(MEASURES[m], series, "training step"))
    columns = ["step", *(f"{name.replace('_', '-')} {'loss' if m == 'loss' else 'bits'}" for name, m in lines)]
    return charts, [Table("checkpoint", columns, list(zip(steps, *lines.values(), strict=True)))]


def _most(rows: Sequence[dict[str, Any]]) -> Table:
    """All sequences, those of the training set first, and of each set those that most is held of."""
    if not rows:
        return Table("sequence", (), ())
    kinds = [kind for kind in KINDS if kind in rows[0]]
    columns = ("set", "row", "tokens", *kinds, "text")
    order = sorted(rows, key=lambda row: (row["set"] != TRAIN, -row[kinds[0]]))
    return Table("sequence", columns, [tuple(row[column] for column in columns) for row in order])


def _distribution(rows: Sequence[dict[str, Any]]) -> list[LineChart]:
    kind = next((kind for kind in KINDS if rows and kind in rows[0]), None)
    if kind is None:
        return []
    sets = {name: np.array([row[kind] for row in rows if row["set"] == name]) for name in (TRAIN, HELD_OUT)}
    return [distribution({n.replace("_", "-"): bits for n, bits in sets.items() if len(bits)}, MEASURES[kind])]


def _strip_arrays(strips: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Bits and tokens by sequence and place; a token beyond the end is empty."""
    if not strips:
        return {}
    bits = strip_values(strips)
    tokens = [[*row["tokens"], *[""] * (bits.shape[1] - len(row["tokens"]))] for row in strips]
    return {
        "strip_rows": np.array([row["row"] for row in strips]),
        "strip_bits": bits,
        "strip_tokens": np.array(tokens),
    }


def _arrays(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """One number for each sequence, in their order."""
    known = [kind for kind in ("target", "reference", *KINDS) if rows and rows[0].get(kind) is not None]
    return {kind: np.array([row[kind] for row in rows]) for kind in known}
