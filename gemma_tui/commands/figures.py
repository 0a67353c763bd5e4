"""A figure on the command line: printed, as JSON rows, and written to files."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from gemma_tui.errors import UsageError
from gemma_tui.exports import check_target, export
from gemma_tui.exports.data import plain
from gemma_tui.figure import Figure
from gemma_tui.figure_text import figure_text
from gemma_tui.output import Output
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.registry import figure_of

FORMATS = ("html", "svg", "png", "npz", "csv")
WIDEST = 100
ROWS = 20
"""Of a table, for a person; JSON and files have all."""


def targets_of(args: argparse.Namespace) -> list[Path]:
    """The files that were asked for.

    Raises:
        UsageError: one of them cannot be written to.
    """
    targets = [Path(path).expanduser() for name in FORMATS if (path := getattr(args, name))]
    for target in targets:
        check_target(target)
    return targets


def figure_shown(run: Run, store: RunStore) -> Figure:
    """What a run has found so far.

    Raises:
        UsageError: it is a training run, which has no figure.
        EngineError: it has found nothing yet, or what it was made from is gone.
    """
    if (figure := figure_of(run, store)) is None:
        raise UsageError(
            f"{run.run_id} is a {run.study} run, which has no figure: `gemma-tui runs export {run.run_id}` writes its "
            "metrics"
        )
    return figure


def tell(figure: Figure, output: Output, targets: list[Path]) -> None:
    """Print a figure, or its rows, and write it."""
    if output.as_json:
        tell_rows(figure, output)
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(figure_text(figure, min(WIDEST, shutil.get_terminal_size((80, 24)).columns), colour, ROWS))
    write(figure, output, targets)


def tell_rows(figure: Figure, output: Output) -> None:
    """A figure as rows of JSON: its notes and facts, then every row of its tables."""
    output.row("figure", title=figure.title, notes=list(figure.notes), facts=plain(figure.facts))
    for table in figure.tables:
        for row in table.rows:
            output.row(table.kind, **dict(zip(table.columns, plain(row), strict=True)))


def write(figure: Figure, output: Output, targets: Sequence[Path]) -> None:
    """Write a figure to files, and say so."""
    for target in targets:
        export(figure, target)
        output.say(f"written: {target}")
        output.row("written", path=str(target))
