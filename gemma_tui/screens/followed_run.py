"""A sweep, a measurement of memorization, its study of parts, a curve or a benchmark, as a screen follows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engines.errors import EngineError
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure
from gemma_tui.output import duration
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.runs.tail import Tail
from gemma_tui.studies.bench.measuring import STUDY as BENCH
from gemma_tui.studies.bench.results import read_bench
from gemma_tui.studies.capacity.results import Sweep, sweep_figure
from gemma_tui.studies.capacity.sweep import STUDY as SWEEP
from gemma_tui.studies.capacity.sweep import sweep_plan
from gemma_tui.studies.curve.measure import STUDY as CURVE
from gemma_tui.studies.curve.measure import plan_of as curve_plan
from gemma_tui.studies.curve.results import Curve, curve_figure
from gemma_tui.studies.memorization.held import parts_figure
from gemma_tui.studies.memorization.inquiry import FURTHER
from gemma_tui.studies.memorization.meter import STUDY as MEASUREMENT
from gemma_tui.studies.memorization.results import memorization_figure, read_measured
from gemma_tui.studies.memorization.where import STUDY as WHERE
from gemma_tui.studies.memorization.where import Search, parts_in, prepare, where_plan

if TYPE_CHECKING:
    from gemma_tui.session import Job

COUNTED = {SWEEP: "cells", MEASUREMENT: "sequences", WHERE: "parts", CURVE: "rows", BENCH: "cells"}
"""What the steps of a run are, by its study."""

LISTED = 200

REST = 9
"""Times what reading takes that are left to other threads before the next one."""


@dataclass
class FollowedRun:
    """What is known of one run, read by a thread of its own.

    Attributes:
        figure: of what was found so far; None before there is anything.
    """

    name: str
    figure: Figure | None = None
    _seen: Run | None = None
    _reading: bool = False
    _rested: float = 0.0
    _tail: Tail | None = None
    _sweep: Sweep | None = None
    _curve: Curve | None = None
    _search: Search | None = None
    _parts: dict[str, np.ndarray] = field(default_factory=dict)

    def follow(self, run: Run, grown: Callable[[str], object]) -> None:
        """Let a thread read the run, if it has changed and it is time.

        Args:
            run: as it is now.
            grown: called in the thread after it, with what was wrong or nothing.
        """
        if run == self._seen or self._reading or time.monotonic() < self._rested:
            return

        def read() -> None:
            began, error = time.monotonic(), ""
            try:
                self._read()
            except EngineError as wrong:
                error = str(wrong)
            now = time.monotonic()
            self._rested, self._reading = now + REST * (now - began), False
            grown(error)

        self._seen, self._reading = run, True
        threading.Thread(target=read, daemon=True).start()  # no worker, because leaving would wait for one

    def _read(self) -> None:
        """Read what is new, and make the figure again if there is something to see in that."""
        with closing(RunStore()) as store:
            run = store.run(self.name)
            self._tail = self._tail or Tail(run.run_id)
            readers = {
                SWEEP: self._read_sweep,
                MEASUREMENT: self._read_measurement,
                WHERE: self._read_parts,
                CURVE: self._read_curve,
                BENCH: self._read_bench,
            }
            readers[run.study](store, run, self._tail.read(store))

    def _read_measurement(self, store: RunStore, run: Run, rows: Sequence[Row]) -> None:
        if any(row.kind in (MEASUREMENT, *FURTHER) for row in rows):
            self.figure = memorization_figure(read_measured(store, run))

    def _read_parts(self, store: RunStore, run: Run, rows: Sequence[Row]) -> None:
        self._search = self._search or prepare(where_plan(run), store)
        if new := parts_in(rows):
            self._parts |= new
            self.figure = parts_figure(self._search, self._parts)

    def _read_curve(self, _: RunStore, run: Run, rows: Sequence[Row]) -> None:
        curve = self._curve = self._curve or Curve(curve_plan(run))
        curve.add(rows)
        self.figure = curve_figure(curve) if curve.rows else None

    def _read_bench(self, store: RunStore, run: Run, rows: Sequence[Row]) -> None:
        if any(row.kind == "cell" for row in rows):
            self.figure = read_bench(store, run)

    def _read_sweep(self, _: RunStore, run: Run, rows: Sequence[Row]) -> None:
        plan = sweep_plan(run)
        sweep = self._sweep = self._sweep or Sweep(plan)
        if rows or self.figure is None or (sweep.plan, sweep.active) != (plan, run.active):
            sweep.plan, sweep.active = plan, run.active  # cells may have been added
            sweep.add(rows)
            self.figure = sweep_figure(sweep)


def in_words(run: Run, job: Job | None) -> str:
    """A run and how far it is, for a person: what its job is at, or its state.

    Args:
        job: its own, if it is of this app.
    """
    left = job.seconds_left if job is not None and job.share < 1 else None
    at = (job.passing if job is not None else "") or ("" if left is None else f"{duration(left)} left")
    state = at if at and run.state == "running" else run.state
    return f"{run.run_id} · {state} · {run.step:,}/{run.steps:,} {COUNTED[run.study]}"


def check_idle(run: Run, engine: str = "") -> None:
    """Refuse to go on with a run that goes on already, or that another engine computed.

    Args:
        engine: that is chosen; empty if it makes no difference.

    Raises:
        UsageError: it is so.
    """
    if run.active:
        raise UsageError(f"{run.run_id} is {run.state}: x stops it")
    if engine and run.engine != engine:
        raise UsageError(f"{run.run_id} was computed with {run.engine}: e switches to it")
