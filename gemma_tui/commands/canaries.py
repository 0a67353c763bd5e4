"""``gemma-tui canaries``."""

from __future__ import annotations

import argparse

from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output
from gemma_tui.studies.memorization.planting import CanaryPlan, plant_files, repeats_of


def canaries(args: argparse.Namespace, output: Output) -> int:
    """Plant canaries in rows and write down which."""
    plan = plan_from(CanaryPlan, args, {}, "canaries")
    done = plant_files(plan)
    output.row("canaries", out=str(done.out), sidecar=str(done.sidecar), rows=done.rows, planted=done.planted,
               canaries=done.canaries, space=plan.space, repeats=repeats_of(plan))  # fmt: skip
    for sentence in done.told:
        output.say(sentence)
    output.row("end", status="done")
    return 0
