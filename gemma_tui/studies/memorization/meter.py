"""Measuring what a model has memorised, as a study: every sequence is scored by the reference, then by the target.

One model is on the engine at a time, each is loaded once, and the target stays there. What is scored is kept in the
run's folder, token by token, for all that is made of it: bits, membership.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Engine, TokenScores
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.rows import data_path
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.events import Control, Event, Pace
from gemma_tui.studies.memorization.desk import Desk, Measurement, write_rows
from gemma_tui.studies.memorization.extraction import parse_split
from gemma_tui.studies.memorization.extras import Extra, read_extra
from gemma_tui.studies.memorization.inquiry import inquiry
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.planting import EXPOSURE, exposure_extra, read_sidecar
from gemma_tui.studies.memorization.reciting import EXTRACTION, SCHEME, extraction_extra
from gemma_tui.studies.memorization.scores import SCORES, Scores
from gemma_tui.studies.memorization.sequences import (
    Counts,
    Sequences,
    check_vocabulary,
    draw,
    make_sequences,
    measured_rows,
    read_sequences,
)
from gemma_tui.studies.memorization.strips import strip_rows
from gemma_tui.studies.memorization.subjects import REFERENCE, Subject, Subjects, subjects_of
from gemma_tui.studies.memorization.summary import sequence_rows, summary, supervised
from gemma_tui.studies.memorization.suspects import RECALL, recall_extra
from gemma_tui.studies.plan import command
from gemma_tui.studies.recording import Recorded, check_engine, kept_plan, recorded
from gemma_tui.tokenizer import read_tokenizer

STUDY = "memorization"
ROWS_FILE, STRIPS_FILE = "sequences.jsonl", "tokens.jsonl"


def record_memorization(engine: Engine, plan: MemorizationPlan, control: Control, store: RunStore) -> Recorded:
    """Read the data, register a measurement, and make its recorded events; nothing is scored before they are asked for.

    Raises:
        EngineError: a model or the data is not usable; no run is made.
    """
    measurement = prepare(plan, store)
    words = words_of(engine.name, plan)
    run = store.create(plan.name or STUDY, STUDY, engine.name, asdict(plan), words, measurement.steps)
    measurement.sequences.write(run.folder)
    for extra in measurement.extras:
        extra.write(run.folder)
    return Recorded(run, recorded(store, run, lambda folder: measure(engine, measurement, folder, control), control))


def words_of(engine: str, plan: MemorizationPlan) -> str:
    """The command of a measurement."""
    return command(("memorization", plan.model, "--engine", engine), replace(plan, model=MemorizationPlan.model))


def resume_memorization(engine: Engine, run: Run, control: Control, store: RunStore) -> Recorded:
    """Go on with a measurement after the last part that was kept, with the sequences it began with.

    Raises:
        UsageError: the run is another study or another engine's.
        GemmaTuiError: another process computes it, or its models or files are gone.
    """
    plan = plan_of(run)
    check_engine(run, engine)
    extras = [read_extra(key, run.folder, SCHEME if key == EXTRACTION else None) for key in _asked(plan)]
    measurement = _prepared(plan, subjects_of(plan, store), read_sequences(run.folder), {}, extras)
    run = store.adopt(run.run_id)
    return Recorded(run, recorded(store, run, lambda folder: measure(engine, measurement, folder, control), control))


def plan_of(run: Run) -> MemorizationPlan:
    """The plan a measurement was started with.

    Raises:
        UsageError: the run is another study.
    """
    return kept_plan(MemorizationPlan, run, STUDY, "measurement of memorization")


def prepare(plan: MemorizationPlan, store: RunStore) -> Measurement:
    """Find the models and make the sequences.

    Raises:
        EngineError: a model is not here, the data is not usable or holds nothing to score, or the reference has another
            vocabulary.
    """
    for name, beside in (("extraction_rows", "extraction"), ("exposure_strings", "exposure")):
        if getattr(plan, name) != getattr(MemorizationPlan, name) and not getattr(plan, beside):
            flag = name.replace("_", "-")
            raise UsageError(f"{name}: --{flag} makes no difference without --{beside}: leave it out")
    split = parse_split(plan.extraction) if plan.extraction else None
    sidecar = read_sidecar(data_path(plan.exposure)) if plan.exposure else None
    subjects = subjects_of(plan, store)
    tokenizer = read_tokenizer(subjects.folder)
    train_rows, held_rows = measured_rows(plan.data, plan.held_out, tokenizer, subjects.trained)
    train, train_counts = make_sequences(train_rows, tokenizer, plan.max_tokens, plan.prompts)
    held, held_counts = make_sequences(held_rows, tokenizer, plan.max_tokens, plan.prompts, train)
    if not train:
        masked = f" whose supervised part begins within {plan.max_tokens} tokens" if train_counts.masked else ""
        longer = ", or raise --max-tokens" if masked else ""
        raise GemmaTuiError(f"{plan.data} holds no text{masked}: name a file with some{longer}")
    if plan.held_out and not held:
        why = " but what the training set has" if held_counts.shared else ""
        raise GemmaTuiError(f"{plan.held_out} holds no text{why}: name a file with some, or leave --held-out out")
    drawn = draw(train, plan.rows, plan.seed), draw(held, plan.rows, plan.seed)
    train_counts.drawn, held_counts.drawn = map(len, drawn)
    pairs = [*drawn[0], *drawn[1]]
    sequences = Sequences([window for _, window in pairs], np.array([number for number, _ in pairs]), len(drawn[0]))
    extras = []
    if plan.recall:
        extras.append(recall_extra(sequences, subjects.config.max_position_embeddings, plan.seed))
    if split is not None:
        extras.append(extraction_extra(plan, split, tokenizer, (train_rows, held_rows)))
    if sidecar is not None:
        extras.append(exposure_extra(sidecar, plan.exposure_strings, plan.seed, tokenizer, plan.prompts))
    return _prepared(plan, subjects, sequences, {"train": train_counts, "held_out": held_counts}, extras)


def _asked(plan: MemorizationPlan) -> list[str]:
    """The keys of the further sequences that a plan asks for."""
    return [key for key in (RECALL, EXTRACTION, EXPOSURE) if getattr(plan, key)]


def _prepared(
    plan: MemorizationPlan,
    subjects: Subjects,
    sequences: Sequences,
    counts: dict[str, Counts],
    extras: list[Extra],
) -> Measurement:
    tokenizer = read_tokenizer(subjects.folder)
    if subjects.reference is not None and subjects.reference.model.folder.resolve() != subjects.folder.resolve():
        check_vocabulary(tokenizer, read_tokenizer(subjects.reference.model.folder), subjects.reference.name)
    longest = max(len(window) for window in sequences.windows)
    measurement = Measurement(plan, subjects, tokenizer, sequences, counts, extras)
    for extra in extras:
        context, needed = subjects.config.max_position_embeddings, max(map(len, extra.sequences.windows))
        if needed > context:
            raise UsageError(
                f"{extra.key}: {plan.model} has a context of {context:,} tokens, not {needed:,}: take fewer"
            )
    for subject in measurement.order:
        config = subject.model.config()
        if longest > config.max_position_embeddings:
            raise UsageError(
                f"{subject.name} has a context of {config.max_position_embeddings:,} tokens: lower --max-tokens"
            )
        if sequences.largest() >= config.vocab_size:
            raise GemmaTuiError(f"{subject.name} has no token {sequences.largest():,}: its tokenizer is not its own")
    return measurement


def measure(engine: Engine, measurement: Measurement, folder: Path, control: Control) -> Iterator[Event]:
    """Score what is not scored yet and tell the bits of each target; runs on the engine's thread.

    Args:
        folder: of the run.

    Raises:
        EngineError: a model is not usable or has changed since the run began, or the disk is full.
    """
    sequences, subjects = measurement.sequences, measurement.subjects
    vocabulary, desk = subjects.config.vocab_size, Desk(engine, measurement)
    yield Event("start", values=_facts(engine, measurement))
    yield from (Event("warning", values={"text": text}) for text in warnings(measurement))
    done, pace, last = 0, _pace(measurement, folder), False
    reference: np.ndarray | None = None
    other: list[TokenScores] | None = None
    for subject in measurement.order:
        scores = Scores(folder / SCORES / subject.key, sequences)
        yield from desk.score(subject, scores, control, done, pace)
        done += len(sequences)
        if control.stop.is_set() and not scores.whole:
            return
        if subject.key == REFERENCE:
            reference, other = scores.log_likelihoods(), scores.read()
            if not np.isfinite(reference).all():
                raise GemmaTuiError(_broken(subject))
            if measurement.plan.checkpoints and subjects.implied:
                found = summary(sequences, reference, reference, subjects.parameters, vocabulary)
                yield Event(STUDY, done, {"target": subject.name, "checkpoint": 0, **found})
            continue
        target = scores.log_likelihoods()
        last = bool(np.isfinite(target).all())
        if not last:
            if len(subjects.targets) == 1:
                raise GemmaTuiError(_broken(subject))
            yield Event("warning", done, {"text": f"{_broken(subject)}; it is left out"})
            continue
        rows = sequence_rows(sequences, target, reference, vocabulary, measurement.tokenizer)
        write_rows(folder / ROWS_FILE, rows)
        strips = strip_rows(sequences, scores.read(), other, vocabulary, measurement.tokenizer)
        write_rows(folder / STRIPS_FILE, strips)
        found = summary(sequences, target, reference, subjects.parameters, vocabulary)
        yield Event(STUDY, done, {"target": subject.name, "checkpoint": subject.step, **found})
    if last:
        yield from inquiry(desk, folder, control, done, pace)


def _broken(subject: Subject) -> str:
    return f"{subject.name} gives probabilities that are no numbers: its training diverged, or its weights are broken"


def _pace(measurement: Measurement, folder: Path) -> Pace:
    """All batches that are to be scored, weighed by their tokens."""
    size, batches, whole = measurement.plan.batch_size, 0, 0
    for _, scores in measurement.parts(folder):
        for part, numbers in enumerate(scores.parts):
            if not scores.has(part):
                batches += -(-len(numbers) // size)
                whole += sum(len(scores.sequences.windows[i]) for i in numbers)
    return Pace("scoring", 0, batches, whole)


def warnings(measurement: Measurement) -> list[str]:
    """One line for each thing a person should know before believing the numbers."""
    plan, trained, found = measurement.plan, measurement.subjects.trained, []
    if len(measurement.sequences.sets) == 1:
        found.append("there is nothing held out, so bits cannot be told from what is easy: name some with --held-out")
    if trained is not None and trained.data != plan.data:
        found.append(f"{plan.model} was trained on {trained.data}: of other data its training left no bits")
    if trained is not None and trained.prompts != plan.prompts:
        found.append(f"{plan.model} was trained with --prompts {trained.prompts}: take the same")
    if measurement.subjects.reference is None:
        found.append(
            "without a reference bits are against log2 V a token, so all that was learned counts: name a --reference"
        )
    return found


def _facts(engine: Engine, measurement: Measurement) -> dict[str, Any]:
    subjects, sequences = measurement.subjects, measurement.sequences
    tokens = supervised(sequences)
    return {
        "target": measurement.plan.model,
        "reference": subjects.reference.name if subjects.reference else None,
        "engine": engine.name,
        "checkpoints": len(subjects.targets) if measurement.plan.checkpoints else 0,
        "vocabulary": subjects.config.vocab_size,
        "max_tokens": measurement.plan.max_tokens,
        "parameters": asdict(subjects.parameters),
        "sequences": {name: len(numbers) for name, numbers in sequences.sets.items()},
        "tokens": {name: int(tokens[n.start : n.stop].sum()) for name, n in sequences.sets.items()},
        "rows": {name: asdict(counts) for name, counts in measurement.counts.items()},
    }
