"""A benchmark as a run: its cells one after another, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.runs.processes import environment
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.bench.cell import Cell
from gemma_tui.studies.bench.machine import machine
from gemma_tui.studies.bench.plan import BenchPlan, cells_of, command_of
from gemma_tui.studies.events import Control, Event, Pace, wait_while_paused
from gemma_tui.studies.plan import build
from gemma_tui.studies.recording import Recorded, recorded

STUDY = "bench"
LOOK_SECONDS, TELL_SECONDS = 0.05, 0.5
SAID = 300
"""Characters of what a process that broke said last."""


def record_bench(plan: BenchPlan, control: Control, store: RunStore) -> Recorded:
    """Register a benchmark and make its recorded events; nothing is computed before they are asked for.

    Raises:
        EngineError: the model is not here or is an adapter, or the plan names what is not there.
    """
    cells = _cells(plan)
    engines = ",".join(dict.fromkeys(cell.engine for cell in cells))
    run = store.create(plan.name, STUDY, engines, asdict(plan), command_of(plan), len(cells))
    return Recorded(run, recorded(store, run, lambda _: bench(cells, control), control))


def resume_bench(run: Run, control: Control, store: RunStore) -> Recorded:
    """Go on with a benchmark after the last cell that was kept; cells that failed are not measured again.

    Raises:
        UsageError: the run is another study.
        GemmaTuiError: another process computes it, or what it needs is gone.
    """
    plan = plan_of(run)
    cells = _cells(replace(plan, engines=run.engine))  # those that were there when it began
    run = store.adopt(run.run_id)
    return Recorded(run, recorded(store, run, lambda _: bench(cells, control, run.step), control))


def plan_of(run: Run) -> BenchPlan:
    """The plan a benchmark was started with.

    Raises:
        UsageError: the run is another study.
    """
    if run.study != STUDY:
        raise UsageError(f"{run.run_id} is no benchmark: `gemma-tui runs list` tells what it is")
    return build(BenchPlan, run.plan, run.run_id)


def _cells(plan: BenchPlan) -> list[Cell]:
    model = resolve(plan.model)
    if model.adapter is not None:
        raise GemmaTuiError(f"{model.name} is an adapter, which is as fast as its model: measure that")
    return cells_of(plan, str(model.folder), model.config())


def bench(cells: list[Cell], control: Control, done: int = 0) -> Iterator[Event]:
    """Measure every cell and tell of each; a cell that cannot be measured tells why.

    Args:
        done: cells that were measured before.
    """
    if done == len(cells):
        return
    yield Event("start", done, {"machine": machine(), "cells": len(cells)})
    pace = Pace("measuring", done, len(cells) - done, len(cells) - done)
    for cell in cells[done:]:
        yield from wait_while_paused(control, pace.step)
        if control.stop.is_set():
            return
        began = time.monotonic()
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as wrong:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gemma_tui.studies.bench.cell", json.dumps(asdict(cell))],
                stdin=subprocess.DEVNULL, stdout=said, stderr=wrong, start_new_session=True, env=environment(),
            )  # fmt: skip
            try:
                yield from _wait(process, pace, control)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            if control.stop.is_set():
                return
            found = _result(process.returncode, _text(said), _text(wrong))
        facts = {k: v for k, v in asdict(cell).items() if k != "folder"}
        yield from pace.advance()
        pace.step += 1
        yield Event("cell", pace.step, {**facts, **found, "seconds": time.monotonic() - began})


def _wait(process: subprocess.Popen[bytes], pace: Pace, control: Control) -> Iterator[Event]:
    """Wait for a cell, telling now and then how far the benchmark is, so that it can be steered meanwhile."""
    told = 0.0
    while process.poll() is None and not control.stop.wait(LOOK_SECONDS):
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            yield pace.now()


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode("utf-8", "replace")).strip()


def _result(code: int, said: str, wrong: str) -> dict[str, Any]:
    """What a process measured, or why it did not."""
    try:
        found = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        found = None
    if code == 0 and isinstance(found, dict):
        return found
    if code < 0:
        return {"error": f"the process was ended by signal {-code}, which lack of memory can be the cause of"}
    return {"error": (wrong.splitlines() or [f"the process ended with {code}"])[-1][:SAID]}
