"""``gemma-tui roofline``."""

from __future__ import annotations

import argparse

from engines import open_engine
from gemma_tui.commands.figures import targets_of, tell
from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output
from gemma_tui.studies.loading import load
from gemma_tui.studies.pass_times import PassTimes, RooflinePlan, roofline_figure, time_passes


def roofline(args: argparse.Namespace, output: Output) -> int:
    """Time passes of a model, and show them beside what the machine's peak makes of them."""
    plan, targets = plan_from(RooflinePlan, args, {}, "roofline"), targets_of(args)
    found: list[PassTimes] = []
    with output.progress("passes") as progress:
        engine = open_engine(args.engine)
        load(engine, args.model, args.dtype, progress)
        for share in time_passes(engine, plan, found):
            progress(share, "timing")
    tell(roofline_figure(found[0]), output, targets)
    output.row("end", status="done", engine=engine.name)
    return 0
