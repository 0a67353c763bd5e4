"""What else is asked of a measurement's last target once its bits are told: extraction, exposure, membership."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import TokenScores
from engines.checkpoints import replacing
from gemma_tui.studies.events import Control, Event, Pace
from gemma_tui.studies.memorization.desk import Desk, Measurement, write_rows
from gemma_tui.studies.memorization.extraction import parse_split
from gemma_tui.studies.memorization.extras import Extra
from gemma_tui.studies.memorization.planting import EXPOSURE, exposure_summary
from gemma_tui.studies.memorization.reciting import (
    EXTRACTION,
    compared,
    decode,
    decoded,
    extracted_rows,
    extraction_summary,
    is_decoded,
)
from gemma_tui.studies.memorization.scores import SCORES, Scores
from gemma_tui.studies.memorization.sequences import HELD_OUT
from gemma_tui.studies.memorization.subjects import Subject
from gemma_tui.studies.memorization.suspects import RECALL, evidence, membership_steps, set_facts

MEMBERSHIP = "membership"
FURTHER = (MEMBERSHIP, EXTRACTION, EXPOSURE)
"""Kinds of events that tell what else was found of the last target."""

EXTRACTED_FILE, CURVES_FILE = "extraction.jsonl", "membership.npz"


def inquiry(desk: Desk, folder: Path, control: Control, done: int, pace: Pace) -> Iterator[Event]:
    """What else is asked of the last target: further sequences are scored first, so that it is loaded once."""
    measurement, target = desk.measurement, desk.measurement.subjects.targets[-1]
    for extra in measurement.extras:
        yield from desk.score(target, extra.scores(folder), control, done, pace)
        done += len(extra.sequences)
        if control.stop.is_set() and not extra.scores(folder).whole:
            return
        if extra.key == EXTRACTION:
            yield from _extraction(desk, extra, target, folder, control, done)
        elif extra.key == EXPOSURE:
            yield Event(EXPOSURE, done, exposure_summary(extra, extra.scores(folder).log_likelihoods()))
    if HELD_OUT in measurement.sequences.sets and not control.stop.is_set():
        yield from _membership(measurement, target, folder, control, done)


def _extraction(
    desk: Desk, extra: Extra, target: Subject, folder: Path, control: Control, done: int
) -> Iterator[Event]:
    plan, split = desk.measurement.plan, parse_split(desk.measurement.plan.extraction)
    scored = extra.scores(folder).read()
    numbers = compared(extra, plan.extraction_rows, plan.seed)
    if not is_decoded(scored, split, numbers, folder):
        yield from desk.hold(target, done)
        yield from decode(desk.engine, extra, scored, split, numbers, folder, control, done)
    if is_decoded(scored, split, numbers, folder):
        suffixes = decoded(extra, scored, split, numbers, folder)
        rows = extracted_rows(extra, scored, split, suffixes, desk.measurement.tokenizer)
        write_rows(folder / EXTRACTED_FILE, rows)
        yield Event(EXTRACTION, done, extraction_summary(rows, extra, plan.extraction))


def _membership(
    measurement: Measurement, target: Subject, folder: Path, control: Control, done: int
) -> Iterator[Event]:
    sequences, reference = measurement.sequences, measurement.subjects.reference

    def kept(subject: Subject) -> list[TokenScores]:
        return Scores(folder / SCORES / subject.key, sequences).read()

    recall = next((extra for extra in measurement.extras if extra.key == RECALL), None)
    members, others = evidence(
        sequences,
        measurement.tokenizer,
        kept(target),
        kept(reference) if reference else None,
        recall,
        recall.scores(folder).read() if recall else None,
    )
    found: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, told, split in membership_steps(members, others, measurement.plan.seed):
        if control.stop.is_set():
            return
        found[name] = told
        if split is not None:
            curves |= {f"{name}_fpr": split.curve.false_positives, f"{name}_tpr": split.curve.true_positives}
    with replacing(folder / CURVES_FILE) as file:
        np.savez_compressed(file, **curves)
    baseline = found.pop("baseline")
    yield Event(MEMBERSHIP, done, {**set_facts(members, others, recall), "attacks": found, "baseline": baseline})
