"""``gemma-tui runs compare`` and ``gemma-tui runs export``."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from gemma_tui.errors import UsageError
from gemma_tui.output import Output
from gemma_tui.plots import Series, draw, legend
from gemma_tui.runs.comparison import AXES, COLUMNS, Comparison, cells, differences, option_text, title
from gemma_tui.runs.store import METRIC_KINDS, Row, Run, RunStore
from gemma_tui.text import one_line

ROWS = 2000
WIDEST, HEIGHT = 120, 20


def compare(args: argparse.Namespace, output: Output) -> int:
    """Runs side by side: one measure as a chart, what differs in their plans, and where they stand."""
    with closing(RunStore()) as store:
        named = [store.run(name) for name in args.run_names]
        runs = {run.run_id: run for run in (*named, *(store.group(args.group) if args.group else ()))}
        if not runs:
            raise UsageError("name runs to compare, or a --group that has some: `gemma-tui runs list` shows them")
        return compare_runs(store, list(runs.values()), args, output)


def compare_runs(store: RunStore, runs: Sequence[Run], args: argparse.Namespace, output: Output) -> int:
    """The comparison of some runs, printed.

    Args:
        args: ``x``, ``measure``, ``log`` and ``smooth``.

    Raises:
        UsageError: none of the runs has the measure, or the window or the axis is none.
    """
    if args.smooth < 1:
        raise UsageError(f"--smooth is {args.smooth}; a number of points from 1 on is needed")
    comparison = Comparison(runs)
    comparison.read_all(store)
    measures = comparison.measures()
    if args.measure not in measures and (measures or args.measure != "loss"):
        raise UsageError(
            f"no run has {args.measure[:40]!r}; choose from {', '.join(measures) or 'nothing: no metrics'}"
        )
    if args.x not in comparison.axes():
        raise UsageError(
            f"--x is {args.x[:40]!r}; choose from {', '.join(comparison.axes())}"
            " (an option of the plans where it is a number and runs differ in it alone)"
        )
    _curves(comparison, args, output)
    names = [compared.run.run_id for compared in comparison.runs]
    found = differences([compared.run for compared in comparison.runs])
    for key, values in found.items():
        output.row("difference", option=key, values=values)
    if found:
        rows = [(key, *(option_text(values, name) for name in names)) for key, values in found.items()]
        output.say("\nwhat differs")
        _table(output, [("option", *names), *rows])
    elif len(names) > 1:
        output.say("\nthe plans do not differ")
    results = [compared.result(args.smooth) for compared in comparison.runs]
    for result in results:
        output.row("result", **asdict(result))
    output.say("\nresults")
    _table(output, [("run", *(heading for heading, _ in COLUMNS.values())), *((r.run, *cells(r)) for r in results)])
    output.row("end", status="done", runs=names)
    return 0


def _curves(comparison: Comparison, args: argparse.Namespace, output: Output) -> None:
    evaluated = any(curve.evaluated for _, curve in comparison.shown(args.measure))
    series = []
    for name, x, y, number in comparison.lines(args.measure, args.x, args.smooth):
        series.append(Series(one_line(name, 60), x, y, number))
        points = {"x": x.tolist(), "y": y.tolist()} if output.as_json else {}
        of = {"run": name} if args.x in AXES else {"line": name} if name != args.x else {}
        output.row("curve", **of, measure=args.measure, axis=args.x, **points)
    without = [c.run.run_id for c in comparison.runs if args.measure not in c.curves]
    if without:
        output.say(f"no {args.measure} in {', '.join(without)}")
    if output.as_json or not series:
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = min(shutil.get_terminal_size((80, 24)).columns, WIDEST)
    heading = title(args.measure, evaluated, args.smooth) + (" (log)" if args.log else "")
    x_title, log_x = comparison.axes()[args.x], comparison.log_x(args.x)
    print(draw(series, width, HEIGHT, heading, args.log, colour, x_title, named=False, log_x=log_x))
    if args.x in AXES or len(series) > 1:
        print("\n".join(legend(series, width, colour)))


def _table(output: Output, rows: Sequence[Sequence[str]]) -> None:
    """Rows under the first, turned on their side if they are too wide for the terminal so."""
    width = sum(max(map(len, column)) + 1 for column in zip(*rows, strict=True))
    if width > shutil.get_terminal_size((80, 24)).columns:
        rows = list(zip(*rows, strict=True))
    output.table(rows[0], rows[1:])


def export(args: argparse.Namespace, output: Output) -> int:
    """The metrics and events of a run in a file that other programs read.

    Raises:
        UsageError: the file is there already, or cannot be written.
    """
    with closing(RunStore()) as store:
        run = store.run(args.run_name)
        metrics = list(_all(lambda after: store.metrics(run.run_id, after, ROWS)))
        events = list(_all(lambda after: store.events(run.run_id, after, ROWS)))
    path = Path(args.output or f"{run.run_id}.{args.format}")
    write = _write_csv if args.format == "csv" else _write_json
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            write(file, run, metrics, events)
    except FileExistsError:
        raise UsageError(f"{path} is there already: name another file with --output") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another file with --output") from None
    output.say(f"{path}: {len(metrics)} metrics, {len(events)} events")
    output.row("end", status="done", run=run.run_id, path=str(path), metrics=len(metrics), events=len(events))
    return 0


def _all(read: Callable[[int], list[Row]]) -> Iterator[Row]:
    after = 0
    while rows := read(after):
        yield from rows
        after = rows[-1].cursor


def _write_csv(file: TextIO, run: Run, metrics: Sequence[Row], events: Sequence[Row]) -> None:
    """A row for each metric and event in the order of time; a column for each measure, and one for an event's facts."""
    measures = list(dict.fromkeys(key for row in metrics for key in row.values))
    table = csv.DictWriter(file, ["kind", "step", "time", *(f"metric.{m}" for m in measures), "event"])
    table.writeheader()
    for row in sorted([*metrics, *events], key=lambda row: row.time):
        is_metric = row.kind in METRIC_KINDS
        facts = {f"metric.{k}": v for k, v in row.values.items()} if is_metric else {"event": json.dumps(row.values)}
        table.writerow({"kind": row.kind, "step": row.step, "time": row.time, **facts})


def _write_json(file: TextIO, run: Run, metrics: Sequence[Row], events: Sequence[Row]) -> None:
    """One object with the run and its plan, its metrics and its events."""
    rows = {
        name: [{"kind": r.kind, "step": r.step, "time": r.time, "values": dict(r.values)} for r in found]
        for name, found in (("metrics", metrics), ("events", events))
    }
    json.dump({"run": asdict(run), **rows}, file, indent=1)
