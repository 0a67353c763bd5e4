"""Measuring what a model has memorised, as a study: every sequence is scored by the reference, then by the target.

One model is on the engine at a time, each is loaded once, and the target stays there. What is scored is kept in the
run's folder, token by token, for all that is made of it: bits, membership.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Engine, TokenScores
from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.scores import Scores, score
from gemma_tui.studies.memorization.sequences import (
    Counts,
    Sequences,
    check_vocabulary,
    draw,
    make_sequences,
    measured_rows,
    read_sequences,
)
from gemma_tui.studies.memorization.subjects import REFERENCE, Subject, Subjects, subjects_of
from gemma_tui.studies.memorization.summary import sequence_rows, summary, supervised
from gemma_tui.studies.plan import build, command
from gemma_tui.studies.recording import Recorded, recorded
from gemma_tui.tokenizer import Tokenizer, read_tokenizer

STUDY = "memorization"
ROWS_FILE = "sequences.jsonl"
SCORES = "scores"


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is to be done: models, sequences, and what became of the rows they are from."""

    plan: MemorizationPlan
    subjects: Subjects
    tokenizer: Tokenizer
    sequences: Sequences
    counts: dict[str, Counts]

    @property
    def order(self) -> list[Subject]:
        """Who scores: the reference first, so that the target stays on the engine and tells its bits at once."""
        reference = self.subjects.reference
        return [*([reference] if reference else []), *self.subjects.targets]

    @property
    def steps(self) -> int:
        """Sequences to be scored, counted once for each model."""
        return len(self.order) * len(self.sequences)


def record_memorization(engine: Engine, plan: MemorizationPlan, control: Control, store: RunStore) -> Recorded:
    """Read the data, register a measurement, and make its recorded events; nothing is scored before they are asked for.

    Raises:
        EngineError: a model or the data is not usable; no run is made.
    """
    measurement = prepare(plan, store)
    words = words_of(engine.name, plan)
    run = store.create(plan.name or STUDY, STUDY, engine.name, asdict(plan), words, measurement.steps)
    measurement.sequences.write(run.folder)
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
    if run.engine != engine.name:
        raise UsageError(f"{run.run_id} was computed with {run.engine}: resume it with --engine {run.engine}")
    measurement = _prepared(plan, subjects_of(plan, store), read_sequences(run.folder), {})
    run = store.adopt(run.run_id)
    return Recorded(run, recorded(store, run, lambda folder: measure(engine, measurement, folder, control), control))


def plan_of(run: Run) -> MemorizationPlan:
    """The plan a measurement was started with.

    Raises:
        UsageError: the run is another study.
    """
    if run.study != STUDY:
        raise UsageError(f"{run.run_id} is no measurement of memorization: `gemma-tui runs list` tells what it is")
    return build(MemorizationPlan, {key: value for key, value in run.plan.items() if value is not None}, run.run_id)


def prepare(plan: MemorizationPlan, store: RunStore) -> Measurement:
    """Find the models and make the sequences.

    Raises:
        EngineError: a model is not here, the data is not usable or holds nothing to score, or the reference has another
            vocabulary.
    """
    subjects = subjects_of(plan, store)
    tokenizer = read_tokenizer(subjects.folder)
    train_rows, held_rows = measured_rows(plan.data, plan.held_out, tokenizer, subjects.trained)
    train, train_counts = make_sequences(train_rows, tokenizer, plan.max_tokens, plan.prompts)
    held, held_counts = make_sequences(held_rows, tokenizer, plan.max_tokens, plan.prompts, train)
    if not train:
        masked = f" whose supervised part begins within {plan.max_tokens} tokens" if train_counts.masked else ""
        raise GemmaTuiError(f"{plan.data} holds no text{masked}: name a file with some, or raise --max-tokens")
    if plan.held_out and not held:
        why = " that the training set has not, too" if held_counts.shared else ""
        raise GemmaTuiError(f"{plan.held_out} holds no text{why}: name a file with some, or leave --held-out out")
    drawn = draw(train, plan.rows, plan.seed), draw(held, plan.rows, plan.seed)
    train_counts.drawn, held_counts.drawn = map(len, drawn)
    pairs = [*drawn[0], *drawn[1]]
    sequences = Sequences([window for _, window in pairs], np.array([number for number, _ in pairs]), len(drawn[0]))
    return _prepared(plan, subjects, sequences, {"train": train_counts, "held_out": held_counts})


def _prepared(
    plan: MemorizationPlan, subjects: Subjects, sequences: Sequences, counts: dict[str, Counts]
) -> Measurement:
    tokenizer = read_tokenizer(subjects.folder)
    if subjects.reference is not None and subjects.reference.model.folder.resolve() != subjects.folder.resolve():
        check_vocabulary(tokenizer, read_tokenizer(subjects.reference.model.folder), subjects.reference.name)
    longest = max(len(window) for window in sequences.windows)
    measurement = Measurement(plan, subjects, tokenizer, sequences, counts)
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
    vocabulary = subjects.config.vocab_size
    yield Event("start", values=_facts(engine, measurement))
    yield from (Event("warning", values={"text": text}) for text in warnings(measurement))
    done, pace = 0, _pace(measurement, folder)
    reference: np.ndarray | None = None
    for subject in measurement.order:
        scores = Scores(folder / SCORES / subject.key, sequences)
        yield from _score(engine, measurement, subject, scores, control, done, pace)
        done += len(sequences)
        if control.stop.is_set() and not all(map(scores.has, range(len(scores.parts)))):
            return
        if subject.key == REFERENCE:
            reference = scores.log_likelihoods()
            if not np.isfinite(reference).all():
                raise GemmaTuiError(_broken(subject))
            if measurement.plan.checkpoints and subjects.implied:
                found = summary(sequences, reference, reference, subjects.parameters, vocabulary)
                yield Event(STUDY, done, {"target": subject.name, "checkpoint": 0, **found})
            continue
        target = scores.log_likelihoods()
        if not np.isfinite(target).all():
            if len(subjects.targets) == 1:
                raise GemmaTuiError(_broken(subject))
            yield Event("warning", done, {"text": f"{_broken(subject)}; it is left out"})
            continue
        rows = sequence_rows(sequences, target, reference, vocabulary, measurement.tokenizer)
        _write_rows(folder / ROWS_FILE, rows)
        found = summary(sequences, target, reference, subjects.parameters, vocabulary)
        yield Event(STUDY, done, {"target": subject.name, "checkpoint": subject.step, **found})


def _broken(subject: Subject) -> str:
    return f"{subject.name} gives probabilities that are no numbers: its training diverged, or its weights are broken"


def _score(
    engine: Engine, measurement: Measurement, subject: Subject, scores: Scores, control: Control, done: int, pace: Pace
) -> Iterator[Event]:
    """Score the parts of one model that are missing; a part that is stopped in its middle is not kept."""
    windows, size = measurement.sequences.windows, measurement.plan.batch_size
    pace.step = done
    missing = [part for part in range(len(scores.parts)) if not scores.has(part)]
    if not missing or control.stop.is_set():
        return
    yield Event("load", done, {"model": subject.name})
    scores.claim(subject.name, subject.digest())
    subject.load(engine, measurement.subjects.dtype)
    for part, numbers in enumerate(scores.parts):
        done += len(numbers)
        if part not in missing:
            continue
        scored: list[TokenScores] = []
        for start in range(0, len(numbers), size):
            yield from wait_while_paused(control, pace.step)
            if control.stop.is_set():
                return
            batch = [windows[i] for i in numbers[start : start + size]]
            scored += score(engine, batch)
            yield from pace.advance(sum(map(len, batch)))
        scores.keep(part, scored)
        pace.step = done
        yield Event("scored", done, {"model": subject.name, "sequences": len(numbers), "memory": engine.memory()})


def _pace(measurement: Measurement, folder: Path) -> Pace:
    """All batches that are to be scored, weighed by their tokens."""
    windows, size = measurement.sequences.windows, measurement.plan.batch_size
    batches, whole = 0, 0
    for subject in measurement.order:
        scores = Scores(folder / SCORES / subject.key, measurement.sequences)
        for part, numbers in enumerate(scores.parts):
            if not scores.has(part):
                batches += -(-len(numbers) // size)
                whole += sum(len(windows[i]) for i in numbers)
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


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with replacing(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
