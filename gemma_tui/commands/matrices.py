"""``gemma-tui runs matrices``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import closing

from gemma_tui.errors import UsageError
from gemma_tui.heat import heatmap_text
from gemma_tui.output import Output
from gemma_tui.runs.matrices import MEASURES, Matrices
from gemma_tui.runs.store import RunStore


def matrices(args: argparse.Namespace, output: Output) -> int:
    """Maps of a run's matrices, and the means of local and global layers."""
    if args.measure not in (*MEASURES, "all"):
        raise UsageError(f"measure {args.measure[:40]!r} is not there: choose {', '.join(MEASURES)} or all")
    with closing(RunStore()) as store:
        found = Matrices(store.run(args.run_name))
        found.read(store)
    if not found.facts:
        raise UsageError(f"{found.run.run_id} has no diagnosis: train with --diagnose-every N")
    width = min(100, shutil.get_terminal_size((80, 24)).columns)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for measure in MEASURES if args.measure == "all" else [args.measure]:
        kinds = found.by_kind(measure)
        if not output.as_json:
            print(heatmap_text(found.heat(measure), width, colour))
            output.say("  ".join(f"mean of {kind} layers {value:.4g}" for kind, value in kinds.items()) + "\n")
        output.row("means", measure=measure, **kinds)
    for (layer, linear), facts in sorted(found.facts.items()):
        output.row("matrix", layer=layer, linear=linear, **facts)
    output.row("end", status="done", run=found.run.run_id, step=found.step)
    return 0
