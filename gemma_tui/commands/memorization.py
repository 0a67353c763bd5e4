"""``gemma-tui memorization``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines import open_engine
from gemma_tui.commands.figures import ROWS, WIDEST, targets_of, tell_rows, write
from gemma_tui.commands.following import counted, follow
from gemma_tui.commands.plans import plan_from, refuse
from gemma_tui.figure import Figure, Table
from gemma_tui.figure_text import cell_text, figure_text, table_lines
from gemma_tui.output import Output
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.events import PASSING, Control, Event
from gemma_tui.studies.memorization.inquiry import FURTHER
from gemma_tui.studies.memorization.meter import STUDY, record_memorization, resume_memorization
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.results import memorization_figure, read_measured
from gemma_tui.studies.memorization.where import WherePlan
from gemma_tui.studies.plan import options
from gemma_tui.studies.recording import Recorded

BROAD = 10
"""Columns above which a table goes in blocks below one another."""


def memorization(args: argparse.Namespace, output: Output) -> int:
    """Measure what a model has memorised of its training data, or find the parts that hold it."""
    given, its_own = set(vars(args)), {o.name for o in options(MemorizationPlan)} - {"model"}
    others = {o.name for o in options(WherePlan)} - {"model"}
    if "where" in given:
        from gemma_tui.commands.where import where

        refuse(given & (its_own - others), "measure with it, then name that run with --where")
        return where(args, output)
    refuse(given & (others - its_own), "it goes with --where")
    plan = plan_from(MemorizationPlan, args, {"model": args.model}, "memorization")
    targets = targets_of(args)
    engine, control = open_engine(args.engine), Control()
    with closing(RunStore()) as store:
        return _follow(record_memorization(engine, plan, control, store), control, output, store, targets)


def resume(run_name: str, output: Output) -> int:
    """Go on with a measurement, or print it again."""
    with closing(RunStore()) as store:
        run, control = store.run(run_name), Control()
        return _follow(resume_memorization(open_engine(run.engine), run, control, store), control, output, store)


def _follow(recorded: Recorded, control: Control, output: Output, store: RunStore, targets: Sequence[Path] = ()) -> int:
    run = recorded.run
    place = counted(run, "sequences")

    def shown(stopped: bool) -> dict[str, Any]:
        if not stopped:
            figure = memorization_figure(read_measured(store, run))
            show(figure, output)
            write(figure, output, targets)
        return {}

    return follow(recorded, control, output, "scoring", place, lambda event: _tell(event, output), shown)


def _tell(event: Event, output: Output) -> None:
    if event.kind in (*PASSING, *FURTHER, "end"):  # the tables of the figure tell the further ones
        return
    row = event.row()
    output.row(row.pop("kind"), **row)
    values = event.values
    if event.kind == "start":
        for name, counts in values["rows"].items():
            output.say(rows_text(name.replace("_", "-"), counts))
    elif event.kind == "warning":
        output.say(f"warning: {values['text']}")
    elif event.kind == STUDY and values["checkpoint"] is not None:
        output.say(f"step {values['checkpoint']}: loss {values['train']['loss']:.4f}")


def rows_text(name: str, counts: dict[str, int]) -> str:
    """What became of the rows of a set, for a person."""
    kinds = {
        "cut": "lost their end",
        "repeated": "are there before",
        "shared": "are in the training set",
        "empty": "hold no text",
        "masked": "have nothing supervised left",
    }
    rest = [f"{counts[kind]:,} {words}" for kind, words in kinds.items() if counts[kind]]
    text = f"{name}: {counts['drawn']:,} sequences of {counts['rows']:,} rows"
    return f"{text} ({', '.join(rest)})" if rest else text


def show(figure: Figure, output: Output, rest: str = "in the run's folder") -> None:
    """A figure, as a terminal shows it or as rows of JSON.

    Args:
        rest: where the rows are that a terminal is not shown.
    """
    if output.as_json:
        tell_rows(figure, output)
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(figure_text(replace(figure, tables=()), min(WIDEST, shutil.get_terminal_size((80, 24)).columns), colour))
    for table in figure.tables:
        _table(table, output, rest)


def _table(table: Table, output: Output, rest: str) -> None:
    if len(table.columns) > BROAD:
        output.say("\n".join(table_lines(table, shutil.get_terminal_size((80, 24)).columns, ROWS)) + "\n")
        return
    output.table(list(table.columns), [[cell_text(cell) for cell in row] for row in table.rows[:ROWS]])
    if len(table.rows) > ROWS:
        output.say(f"… {len(table.rows) - ROWS:,} more {rest}")
    output.say("")
