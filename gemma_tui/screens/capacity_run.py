"""A capacity sweep or a measurement of memorization, as the capacity screen follows it while it grows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from gemma_tui.figure import Figure
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.runs.tail import Tail
from gemma_tui.studies.capacity.results import Sweep, sweep_figure
from gemma_tui.studies.capacity.sweep import STUDY as SWEEP
from gemma_tui.studies.capacity.sweep import sweep_plan
from gemma_tui.studies.memorization.meter import STUDY as MEASUREMENT
from gemma_tui.studies.memorization.results import memorization_figure, read_measured

STUDIES = (SWEEP, MEASUREMENT)
"""Runs that the capacity screen lists."""


@dataclass
class FollowedRun:
    """What is known of one run; read by one thread at a time.

    Attributes:
        figure: of what was found so far; None before there is anything.
    """

    name: str
    figure: Figure | None = None
    _tail: Tail | None = None
    _sweep: Sweep | None = None

    def read(self) -> None:
        """Read what is new, and make the figure again if there is something to see in that.

        Raises:
            EngineError: the store or the run's folder cannot be read.
        """
        with closing(RunStore()) as store:
            run = store.run(self.name)
            self._tail = self._tail or Tail(run.run_id)
            rows = self._tail.read(store)
            if run.study == MEASUREMENT:
                if any(row.kind == MEASUREMENT for row in rows):
                    self.figure = memorization_figure(read_measured(store, run))
                return
        plan = sweep_plan(run)
        sweep = self._sweep = self._sweep or Sweep(plan)
        if rows or sweep.plan != plan or self.figure is None:
            sweep.plan = plan  # cells may have been added
            sweep.add(rows)
            self.figure = sweep_figure(sweep)


def place(run: Run) -> str:
    """How far a run is, for a person."""
    what = "cells" if run.study == SWEEP else "sequences"
    return f"{run.step:,}/{run.steps:,} {what}"
