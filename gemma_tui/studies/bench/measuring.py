"""A benchmark as a run: its cells one after another, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.models import resolve
from gemma_tui.runs.processes import environment
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.bench.cell import Cell
from gemma_tui.studies.bench.machine import machine
from gemma_tui.studies.bench.plan import BenchPlan, cells_of
from gemma_tui.studies.events import Control, Event
from gemma_tui.studies.plan import command
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
    model = resolve(plan.model)
    if model.adapter is not None:
        raise GemmaTuiError(f"{model.name} is an adapter, which is as fast as its model: measure that")
    cells = cells_of(plan, str(model.folder), model.config().quantization is not None)
    engines = ",".join(dict.fromkeys(cell.engine for cell in cells))
    run = store.create(plan.name, STUDY, engines, asdict(plan), words_of(plan), len(cells))
    return Recorded(run, recorded(store, run, lambda _: bench(cells, control), control))


def words_of(plan: BenchPlan) -> str:
    """The command that measures so."""
    values = asdict(plan)
    model = values.pop("model")
    return command(("bench", model), BenchPlan(**values))


def bench(cells: list[Cell], control: Control) -> Iterator[Event]:
    """Measure every cell and tell of each; a cell that cannot be measured tells why."""
    yield Event("start", 0, {"machine": machine(), "cells": len(cells)})
    for number, cell in enumerate(cells):
        if control.stop.is_set():
            return
        began = time.monotonic()
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as wrong:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gemma_tui.studies.bench.cell", json.dumps(asdict(cell))],
                stdin=subprocess.DEVNULL, stdout=said, stderr=wrong, start_new_session=True, env=environment(),
            )  # fmt: skip
            try:
                yield from _wait(process, number, len(cells), control)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            if control.stop.is_set():
                return
            found = _result(process.returncode, _text(said), _text(wrong))
        facts = {k: v for k, v in asdict(cell).items() if k != "folder"}
        yield Event("cell", number + 1, {**facts, **found, "seconds": time.monotonic() - began})


def _wait(process: subprocess.Popen[bytes], done: int, total: int, control: Control) -> Iterator[Event]:
    told = 0.0
    while process.poll() is None and not control.stop.wait(LOOK_SECONDS):
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            yield Event("measuring", done, {"done": done, "total": total, "seconds_left": None})


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
