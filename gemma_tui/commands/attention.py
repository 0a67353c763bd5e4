"""``gemma-tui attention``."""

from __future__ import annotations

import argparse
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines import open_engine
from gemma_tui.commands.figures import ROWS, WIDEST, targets_of, tell
from gemma_tui.commands.following import follow
from gemma_tui.commands.plans import plan_from
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure
from gemma_tui.heat import NARROWEST
from gemma_tui.output import Output
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.attention.heads import check_metric
from gemma_tui.studies.attention.looking import CELLS, look, open_desk, signed
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.attention.survey import (
    STUDY,
    HeadStudyPlan,
    read_study,
    record_heads,
    resume_heads,
    study_figure,
    texts_of,
)
from gemma_tui.studies.events import PASSING, Control, Event
from gemma_tui.studies.plan import check_honoured, options
from gemma_tui.studies.recording import Recorded

LABELS = 16
"""Columns of a map that its labels take."""

OF_A_HEAD = {"layer", "head", "key_position", "queries", "keys"}
"""Options that imply the view of a head."""


def attention(args: argparse.Namespace, output: Output) -> int:
    """Look into a text, or study the heads over many."""
    targets = targets_of(args)
    if "study" in vars(args):
        return _study(args, output, targets)
    plan = plan_of(args)
    engine = open_engine(args.engine)
    with output.progress("opening") as progress:
        desk = open_desk(engine, args.model, args.dtype, progress)
    with output.progress(plan.view) as progress:
        width = min(WIDEST, shutil.get_terminal_size((80, 24)).columns)
        view = look(desk, plan, CELLS if targets else (ROWS, (width - LABELS) // NARROWEST))
        while True:
            try:
                progress(next(view), f"{desk.reading.length:,} tokens" if desk.reading else "")
            except StopIteration as end:
                figure: Figure = end.value
                break
    tell(signed(figure) if targets else figure, output, targets)
    output.row("end", status="done", view=plan.view)
    return 0


def plan_of(args: argparse.Namespace) -> AttentionPlan:
    """What is to be looked at.

    Raises:
        UsageError: an option that is not there, or makes no difference to the view.
    """
    _refuse(args, HeadStudyPlan, ("seed",), "without --study")
    plan = _implied(args, plan_from(AttentionPlan, args, {}, "attention"))
    check_honoured(plan)
    return plan


def _implied(args: argparse.Namespace, plan: AttentionPlan) -> AttentionPlan:
    """The view that other options imply, where none is named."""
    given = vars(args)
    if args.stats and plan.view != "heads":
        raise UsageError(f"stats: --stats is the view heads, and --view {plan.view} another: leave one of them out")
    if "view" in given or args.stats:
        return plan
    if "ablate" in given:
        return replace(plan, view="ablation")
    if given.keys() & OF_A_HEAD:
        return replace(plan, view="head")
    return plan


def _refuse(args: argparse.Namespace, plan: type, shared: tuple[str, ...], beside: str) -> None:
    """Refuse the options of a plan that is not meant."""
    for o in options(plan):
        if o.name in vars(args) and o.name not in (*shared, "model"):
            raise UsageError(f"{o.name}: {o.flag} makes no difference {beside}: leave it out")


def _study(args: argparse.Namespace, output: Output, targets: list[Path]) -> int:
    """Heads over many texts, as a run."""
    _refuse(args, AttentionPlan, ("metric", "seed"), "with --study")
    if args.dtype:
        raise UsageError("dtype: --dtype makes no difference with --study: leave it out")
    plan = plan_from(HeadStudyPlan, args, {"model": args.model}, "attention")
    metric = getattr(args, "metric", AttentionPlan().metric)
    check_metric(metric)
    engine, control = open_engine(args.engine), Control()
    with closing(RunStore()) as store:
        return _follow(record_heads(engine, plan, control, store), control, output, metric, store, targets)


def resume(run_name: str, output: Output) -> int:
    """Go on with a study of heads."""
    with closing(RunStore()) as store:
        run, control = store.run(run_name), Control()
        recorded = resume_heads(open_engine(run.engine), run, control, store)
        return _follow(recorded, control, output, AttentionPlan().metric, store, [])


def _follow(
    recorded: Recorded, control: Control, output: Output, metric: str, store: RunStore, targets: list[Path]
) -> int:
    run = recorded.run

    def place(event: Event) -> tuple[float, str]:
        return event.step / run.steps, f"{event.step}/{run.steps}"

    def told(event: Event) -> None:
        if event.kind not in (*PASSING, STUDY, "end"):
            row = event.row()
            output.row(row.pop("kind"), **row)

    def shown(stopped: bool) -> dict[str, Any]:
        looked_at = texts_of(store, run)
        if looked_at or not stopped:
            tell(study_figure(read_study(store, run), metric), output, targets)
        return {"texts": looked_at}

    return follow(recorded, control, output, "texts", place, told, shown)
