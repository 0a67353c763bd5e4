"""``gemma-tui task``."""

from __future__ import annotations

import argparse

from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output
from gemma_tui.rows import data_path
from gemma_tui.studies.tasks import TaskPlan, write


def task(args: argparse.Namespace, output: Output) -> int:
    """Make the rows of a task whose answers can be checked."""
    plan, folder = plan_from(TaskPlan, args, {}, "task"), data_path(args.folder)
    counts = write(plan, folder)
    output.say(f"{folder}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()))
    output.row("end", status="done", folder=str(folder), **counts)
    return 0
