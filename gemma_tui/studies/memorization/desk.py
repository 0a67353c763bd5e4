"""What is to be measured, and the engine with the model that is on it; what it scores is kept part by part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.base import Engine, TokenScores
from engines.checkpoints import replacing
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.memorization.extras import Extra
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.scores import SCORES, Scores, score
from gemma_tui.studies.memorization.sequences import Counts, Sequences
from gemma_tui.studies.memorization.subjects import Subject, Subjects
from gemma_tui.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is to be done: models, sequences, and what became of the rows they are from."""

    plan: MemorizationPlan
    subjects: Subjects
    tokenizer: Tokenizer
    sequences: Sequences
    counts: dict[str, Counts]
    extras: list[Extra] = field(default_factory=list)

    @property
    def order(self) -> list[Subject]:
        """Who scores: the reference first, so that the target stays on the engine and tells its bits at once."""
        reference = self.subjects.reference
        return [*([reference] if reference else []), *self.subjects.targets]

    @property
    def steps(self) -> int:
        """Sequences to be scored, counted once for each model."""
        return len(self.order) * len(self.sequences) + sum(len(extra.sequences) for extra in self.extras)

    def parts(self, folder: Path) -> list[tuple[Subject, Scores]]:
        """All that is scored, in order; what is further asked of the last target comes last."""
        main = [(subject, Scores(folder / SCORES / subject.key, self.sequences)) for subject in self.order]
        return main + [(self.subjects.targets[-1], extra.scores(folder)) for extra in self.extras]


@dataclass
class Desk:
    """The engine, and which subject is on it."""

    engine: Engine
    measurement: Measurement
    subject: Subject | None = None

    def hold(self, subject: Subject, step: int) -> Iterator[Event]:
        """Load a subject that is not there."""
        if self.subject is not subject:
            yield Event("load", step, {"model": subject.name})
            self.subject = None
            subject.load(self.engine, self.measurement.subjects.dtype)
            self.subject = subject

    def score(self, subject: Subject, scores: Scores, control: Control, done: int, pace: Pace) -> Iterator[Event]:
        """Score the parts of one model that are missing; a part that is stopped in its middle is not kept."""
        windows, size = scores.sequences.windows, self.measurement.plan.batch_size
        pace.step = done
        missing = [part for part in range(len(scores.parts)) if not scores.has(part)]
        if not missing or control.stop.is_set():
            return
        scores.claim(subject.name, subject.digest())
        yield from self.hold(subject, done)
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
                scored += score(self.engine, batch, scores.sampling)
                yield from pace.advance(sum(map(len, batch)))
            scores.keep(part, scored)
            pace.step = done
            values = {"model": subject.name, "sequences": len(numbers), "memory": self.engine.memory()}
            yield Event("scored", done, values)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as a JSONL file of a run's folder.

    Raises:
        EngineError: the disk is full or not writable.
    """
    with replacing(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
