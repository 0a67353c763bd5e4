"""Which parts hold what a model has memorised: each is taken away, and the same sequences are scored again.

Every part is one event of a run, so a study that was broken off goes on with the part after.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from engines.adapters import read_adapter
from engines.base import Engine
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.memorization.bits import uniform
from gemma_tui.studies.memorization.meter import plan_of as measurement_plan
from gemma_tui.studies.memorization.parts import INTACT, Part, kinds_of, parts_of
from gemma_tui.studies.memorization.results import Measured, read_measured
from gemma_tui.studies.memorization.scores import SCORES, Scores, score
from gemma_tui.studies.memorization.sequences import TRAIN
from gemma_tui.studies.memorization.subjects import Subject, subjects_of
from gemma_tui.studies.plan import build, command, option
from gemma_tui.studies.recording import Recorded, check_engine, recorded
from gemma_tui.studies.turns import Window

STUDY = "where"
PART = "part"
"""The kind of the event of a part; its step is its number, from 1 on, the intact model being the first."""


@dataclass(frozen=True)
class WherePlan:
    """Which parts are taken away; every field is an option of ``gemma-tui memorization RUN --where``."""

    model: str = option("", "measurement: a run of gemma-tui memorization", required=True)
    where: str = option(
        "", "take parts of the model away: layers, heads or adapters, several with commas; M is a measurement then",
        required=True,
    )  # fmt: skip
    most: int = option(16, "training sequences that most is held of, and as many held-out ones", low=1, high=10_000_000)
    batch_size: int = option(16, "sequences in a batch", low=1, high=4096)
    name: str = option("", "name of the run; empty for where")


@dataclass(frozen=True, eq=False)
class Chosen:
    """The sequences that are scored: those of the training set first.

    Attributes:
        numbers: among those of the measurement.
        trained: how many are of the training set.
        reference: ln p of each under the reference, nats; under the uniform code where there is none.
    """

    numbers: list[int]
    windows: list[Window]
    trained: int
    reference: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """How many of each count, int ``[n]``."""
        return np.array([int(window.supervised[1:].sum()) for window in self.windows])


@dataclass(frozen=True, eq=False)
class Search:
    """What is to be done: a model that was measured, the parts it loses, and the sequences it is scored on."""

    plan: WherePlan
    measured: Measured
    subject: Subject
    dtype: str | None
    parts: list[Part]
    chosen: Chosen

    @property
    def batches(self) -> list[np.ndarray]:
        """The places of the sequences that are scored together, of rising length."""
        order = np.argsort([len(window) for window in self.chosen.windows], kind="stable")
        return [order[start : start + self.plan.batch_size] for start in range(0, len(order), self.plan.batch_size)]


def record_where(engine: Engine, plan: WherePlan, control: Control, store: RunStore) -> Recorded:
    """Register a study of parts and make its recorded events; nothing is computed before they are asked for.

    Raises:
        EngineError: the measurement is not there or not finished, its model is gone, or there are no such parts.
    """
    search, words = prepare(plan, store), words_of(engine.name, plan)
    run = store.create(plan.name or STUDY, STUDY, engine.name, asdict(plan), words, len(search.parts))
    return Recorded(run, recorded(store, run, lambda _: study_where(engine, search, {}, control), control))


def words_of(engine: str, plan: WherePlan) -> str:
    """The command of a study of parts."""
    return command(("memorization", plan.model, "--engine", engine), replace(plan, model=WherePlan.model))


def resume_where(engine: Engine, run: Run, control: Control, store: RunStore) -> Recorded:
    """Go on with a study after the last part that was kept.

    Raises:
        UsageError: the run is another study or another engine's.
        GemmaTuiError: another process computes it, or what it needs is gone.
    """
    plan = where_plan(run)
    check_engine(run, engine)
    search, known = prepare(plan, store), kept_parts(store, run)
    run = store.adopt(run.run_id)
    return Recorded(run, recorded(store, run, lambda _: study_where(engine, search, known, control), control))


def where_plan(run: Run) -> WherePlan:
    """The plan a study of parts was started with.

    Raises:
        UsageError: the run is another study.
    """
    if run.study != STUDY:
        raise UsageError(f"{run.run_id} does not tell which parts hold what: `gemma-tui runs list` tells what it is")
    return build(WherePlan, dict(run.plan), run.run_id)


def kept_parts(store: RunStore, run: Run) -> dict[str, np.ndarray]:
    """As ``parts_in`` of all that the run has told."""
    return parts_in(store.events(run.run_id, limit=1_000_000))


def parts_in(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """ln p of the chosen sequences without each part, by the part's name, float64 ``[n]``."""
    return {row.values["part"]: np.array(row.values["log_likelihoods"], float) for row in rows if row.kind == PART}


def prepare(plan: WherePlan, store: RunStore) -> Search:
    """Find the measurement, its model, the parts and the sequences.

    Raises:
        EngineError: as ``record_where``.
    """
    kinds = kinds_of(plan.where)
    measured = read_measured(store, store.run(plan.model))
    subjects = subjects_of(measurement_plan(measured.run), store)
    name = measured.summaries[-1]["target"]
    subject = next((s for s in subjects.targets if s.name == name), None)
    if subject is None or not measured.rows:
        raise GemmaTuiError(f"{name} is not there any more, or has no bits: measure again")
    adapter = subject.model.adapter if subject.checkpoint is None else None
    if "adapters" in kinds and subject.checkpoint is not None:
        raise UsageError("where: adapters are taken from a result, not a checkpoint: measure without --checkpoints")
    config = subject.model.config()
    adapted = list(read_adapter(adapter, config)[0]) if adapter and "adapters" in kinds else []
    return Search(plan, measured, subject, subjects.dtype, parts_of(kinds, config, adapted), choose(measured, plan))


def choose(measured: Measured, plan: WherePlan) -> Chosen:
    """The training sequences with the most signed bits, and as many held-out ones, drawn by the measurement's seed."""
    sequences, rows = measured.sequences, measured.rows
    kind = "signed" if "signed" in rows[0] else "signed_against_uniform"
    train = sorted(sequences.sets[TRAIN], key=lambda i: -rows[i][kind])[: plan.most]
    held = range(sequences.trained, len(sequences))
    draw = np.random.default_rng(measurement_plan(measured.run).seed).permutation(len(held))[: len(train)]
    numbers = [*train, *(held[i] for i in sorted(draw.tolist()))]
    windows = [sequences.windows[i] for i in numbers]
    if rows[0]["reference"] is None:
        reference = uniform(np.array([rows[i]["tokens"] for i in numbers]), measured.facts["vocabulary"])
    else:
        reference = np.array([rows[i]["reference"] for i in numbers])
    return Chosen(numbers, windows, len(train), reference)


def study_where(engine: Engine, search: Search, known: Mapping[str, np.ndarray], control: Control) -> Iterator[Event]:
    """Score the sequences without each part that is not known yet; runs on the engine's thread.

    Args:
        known: as ``kept_parts`` gives it.

    Raises:
        EngineError: the model is not usable or has changed since it was measured.
    """
    missing = [part for part in search.parts if part.name not in known]
    pace = Pace("scoring", 0, len(missing) * len(search.batches), len(missing) * int(search.chosen.tokens.sum()))
    yield Event("start", values=_facts(engine, search))
    yield from (Event("warning", values={"text": text}) for text in warnings(search))
    if missing:
        yield Event("load", values={"model": search.subject.name})
        digest = search.subject.digest()
        Scores(search.measured.run.folder / SCORES / search.subject.key, search.measured.sequences).claim(
            search.subject.name, digest
        )
        search.subject.load(engine, search.dtype)
    for step, part in enumerate(search.parts, 1):
        if part not in missing:
            continue
        pace.step = step - 1
        found = yield from _score(engine, search, part, control, pace)
        if found is None:
            return
        values = {"part": part.name, "log_likelihoods": found.tolist(), "memory": engine.memory()}
        yield Event(PART, step, values)


def _score(
    engine: Engine, search: Search, part: Part, control: Control, pace: Pace
) -> Generator[Event, None, np.ndarray | None]:
    """ln p of the chosen sequences without a part; None if it is stopped before the end."""
    windows, found = search.chosen.windows, np.zeros(len(search.chosen.windows))
    for places in search.batches:
        yield from wait_while_paused(control, pace.step)
        if control.stop.is_set():
            return None
        batch = [windows[i] for i in places]
        with nullcontext() if part.name == INTACT else engine.without(part.removal):
            scored = score(engine, batch)
        for i, one in zip(places, scored, strict=True):
            found[i] = one.log_probs[windows[i].supervised[1:]].sum(dtype=np.float64)
        yield from pace.advance(float(search.chosen.tokens[places].sum()))
    return found


def warnings(search: Search) -> list[str]:
    """One line for each thing a person should know before believing the numbers."""
    found = []
    if search.chosen.trained == len(search.chosen.numbers):
        found.append(
            "nothing is held out, so a part that everything needs cannot be told from one that holds what was memorised"
        )
    if search.measured.facts["reference"] is None:
        found.append(
            "the measurement has no reference: bits are against log2 V a token, so all that was learned counts"
        )
    return found


def _facts(engine: Engine, search: Search) -> dict[str, Any]:
    chosen = search.chosen
    return {
        "measurement": search.measured.run.run_id,
        "target": search.subject.name,
        "reference": search.measured.facts["reference"],
        "engine": engine.name,
        "parts": len(search.parts) - 1,
        "passes": len(search.parts) * len(search.batches),
        "sequences": {"train": chosen.trained, "held_out": len(chosen.numbers) - chosen.trained},
        "tokens": int(chosen.tokens.sum()),
    }
