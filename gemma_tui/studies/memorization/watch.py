"""What a run has memorised so far, measured while it trains: Morris et al., arXiv:2505.24832, section 2.

The reference is the model as it was before the first step: its log-likelihoods are measured once and kept in the run's
folder with the sequences, so that a run that goes on has the same ones. New weights know nothing yet, so there it is
the code that spends log2 V bits on every token.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Engine
from engines.checkpoints import replacing
from gemma_tui.errors import GemmaTuiError
from gemma_tui.studies.data import Splits, trained_windows, unpacked
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.memorization.bits import sequence_bits, uniform
from gemma_tui.studies.memorization.scores import score
from gemma_tui.studies.memorization.sequences import (
    HELD_OUT,
    TRAIN,
    Sequences,
    distinct,
    draw,
    read_kept,
    read_sequences,
)
from gemma_tui.studies.memorization.summary import supervised
from gemma_tui.studies.training_plan import TrainingPlan

KIND = "memorized"
FOLDER, START = "memorization", "start.npz"
STEP_0, UNIFORM = "model at step 0", "uniform code"

Measuring = Generator[Event, None, np.ndarray | None]
"""Tells how far it is; ends with a log-likelihood for each sequence, nats, or with nothing after a stop."""


@dataclass
class Watch:
    """The sequences of a run, and the memorised bits of them at some of its steps.

    Attributes:
        folder: where the sequences and the log-likelihoods at step 0 are kept.
        seconds: spent on measuring so far.
        last: the step of the newest measurement.
    """

    plan: TrainingPlan
    folder: Path
    sequences: Sequences
    vocabulary: int
    seconds: float = 0.0
    last: int | None = None
    _start: np.ndarray | None = field(default=None, repr=False)

    @property
    def facts(self) -> dict[str, object]:
        """What the run tells of it when it begins."""
        sets = self.sequences.sets
        return {
            "memorization_reference": UNIFORM if self.plan.fresh else STEP_0,
            "memorization_train": len(sets[TRAIN]),
            "memorization_held_out": len(sets.get(HELD_OUT, ())),
        }

    @property
    def warnings(self) -> list[str]:
        """What a person should know before."""
        if HELD_OUT in self.sequences.sets:
            return []
        return ["no validation rows but those that are trained on: memorised bits are told without held-out ones"]

    def due(self, step: int) -> bool:
        """Whether bits are measured after this step."""
        return step % self.plan.memorization_every == 0 or step == self.plan.steps

    def begin(self, engine: Engine, control: Control, step: int, trainable: int) -> Iterator[Event]:
        """Measure the model before the first step, or read what was kept of it.

        The engine holds that model, also where the run goes on and its state is not loaded yet.

        Args:
            step: where the run is; the bits of step 0 are told only there.
            trainable: parameters that are trained.
        """
        began = time.perf_counter()
        self._start = _read_start(self.folder / START, len(self.sequences))
        if self._start is None:
            self._start = yield from self._measure(engine, control, 0)
            if self._start is None:
                return
            with replacing(self.folder / START) as file:
                np.savez(file, log_likelihoods=self._start)
        if step == 0:
            self.last = 0
            yield Event(KIND, 0, self._row(self._start, self._start, trainable, time.perf_counter() - began, 0.0))

    def look(
        self, engine: Engine, control: Control, step: int, trainable: int, training_seconds: float
    ) -> Iterator[Event]:
        """Measure the bits after a step; nothing is told after a stop.

        Args:
            trainable: parameters that are trained.
            training_seconds: spent in steps so far.
        """
        began = time.perf_counter()
        now = yield from self._measure(engine, control, step)
        if now is None or self._start is None:
            return
        self.last = step
        seconds = time.perf_counter() - began
        yield Event(KIND, step, self._row(now, self._start, trainable, seconds, training_seconds))

    def _measure(self, engine: Engine, control: Control, step: int) -> Measuring:
        windows, order = self.sequences.windows, self.sequences.by_length
        size = self.plan.batch_size
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        found = np.zeros(len(windows))
        pace = Pace("measuring", step, len(batches), sum(map(len, windows)))
        yield pace.now()
        for numbers in batches:
            yield from wait_while_paused(control, step)
            if control.stop.is_set():
                return None
            for number, scored in zip(numbers, score(engine, [windows[i] for i in numbers]), strict=True):
                found[number] = scored.log_probs[windows[number].supervised[1:]].sum(dtype=np.float64)
            yield from pace.advance(sum(len(windows[i]) for i in numbers))
        return found

    def _row(
        self, now: np.ndarray, start: np.ndarray, trainable: int, seconds: float, training_seconds: float
    ) -> dict[str, Any]:
        """Bits, losses (nats per token), and what the measurement took."""
        tokens = supervised(self.sequences)
        reference = uniform(tokens, self.vocabulary) if self.plan.fresh else start
        bits, row = sequence_bits(now, reference), dict[str, Any]()
        for name, numbers in self.sequences.sets.items():
            chosen = slice(numbers.start, numbers.stop)
            count, prefix = int(tokens[chosen].sum()), "memorized" if name == TRAIN else "held_out"
            row[f"{prefix}_bits"] = float(bits.clipped[chosen].sum())
            row[f"{prefix}_signed_bits"] = float(bits.signed[chosen].sum())
            row[f"{prefix}_loss"] = -float(now[chosen].sum()) / count
            if name == HELD_OUT:
                row["generalisation"] = float((now - start)[chosen].sum()) / count
        if trainable:
            row["memorized_bits_per_parameter"] = row["memorized_bits"] / trainable
            row["memorized_signed_bits_per_parameter"] = row["memorized_signed_bits"] / trainable
        self.seconds += seconds
        row["memorization_seconds"] = seconds
        if training_seconds:
            row["memorization_share"] = self.seconds / (self.seconds + training_seconds)
        return row


def watch_of(plan: TrainingPlan, splits: Splits, vocabulary: int, folder: Path, seconds: float) -> Watch:
    """What measures a run; its sequences are drawn by its seed, or read where they were kept.

    Of the training set only what the run comes to in its steps counts, since the rest is not trained on. Windows are
    whole, as they are trained on, each once.

    Args:
        folder: of the run.
        seconds: spent on measuring before it was resumed.
    """
    folder = folder / FOLDER
    try:
        return Watch(plan, folder, read_sequences(folder), vocabulary, seconds)
    except GemmaTuiError:  # a run that begins, or whose files were lost: what was measured of others is of no use
        (folder / START).unlink(missing_ok=True)
    seen = trained_windows(splits.train, plan.batch_size, plan.seed, plan.steps * plan.accumulate)
    every = distinct([window for packed in splits.train for window in unpacked(packed)])
    train = distinct([window for packed in seen for window in unpacked(packed)])
    held = distinct([window for packed in splits.valid for window in unpacked(packed)], every)
    pairs = draw(train, plan.memorization_rows, plan.seed)
    trained = len(pairs)
    pairs += draw(held, plan.memorization_rows, plan.seed)
    sequences = Sequences([window for _, window in pairs], np.array([number for number, _ in pairs]), trained)
    folder.mkdir(parents=True, exist_ok=True)
    sequences.write(folder)
    return Watch(plan, folder, sequences, vocabulary, seconds)


def in_words(values: Mapping[str, Any]) -> str:
    """A measurement on one line, for a person."""
    parts = [f"memorised bits {values['memorized_bits']:,.1f} (signed {values['memorized_signed_bits']:,.1f}"]
    parts[0] += f", {each:.3g} per trained parameter)" if (each := values.get("memorized_bits_per_parameter")) else ")"
    if "held_out_bits" in values:
        parts.append(f"held-out bits {values['held_out_bits']:,.1f}")
        parts.append(f"held-out loss {values['held_out_loss']:.4f} ({0 - values['generalisation']:+.4f} since step 0)")
    share = values.get("memorization_share")
    took = f"{values['memorization_seconds']:.2g} s"
    parts.append(took if share is None else f"{took}, measuring takes {share:.0%} of the time")
    return "  ".join(parts)


def _read_start(path: Path, count: int) -> np.ndarray | None:
    try:
        found = read_kept(path, ("log_likelihoods",))["log_likelihoods"]
    except GemmaTuiError:
        return None
    return found if found.shape == (count,) else None
