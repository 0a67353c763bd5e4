"""``gemma-tui models tree`` and ``gemma-tui models weights``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from gemma_tui.commands.figures import targets_of, tell
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.output import Output
from gemma_tui.studies.architecture import architecture, told
from gemma_tui.studies.fitting import config_named
from gemma_tui.studies.weights import base_of, measure, spectrum_figure, weights_figure


def tree(args: argparse.Namespace, output: Output) -> int:
    """What a model is made of."""
    nodes = list(architecture(config_named(args.model), args.rank))
    for node in nodes:
        output.row("part", **asdict(node))
    rows = [
        (n.label, " x ".join(map(str, n.shape)), f"{n.parameters:,}", f"{n.share:.1%}", f"{n.lora:,}" if n.lora else "")
        for n in told(nodes)
    ]  # fmt: skip
    output.table((args.model, "shape", "parameters", "share", f"LoRA r{args.rank}"), rows)
    output.row("end", status="done", parameters=nodes[0].parameters, lora=nodes[0].lora)
    return 0


def weights(args: argparse.Namespace, output: Output) -> int:
    """Each matrix in numbers, or how it differs from another model's; an adapter's from its base's."""
    targets = targets_of(args)
    with output.progress("opening") as progress:
        model = resolve(args.model, progress)
        against = resolve(args.against, progress) if args.against else None
    if against is not None and (against.folder, against.adapter) == (model.folder, model.adapter):
        raise UsageError(f"against: {args.against} is the same model: name another")
    with output.progress("reading") as progress:
        if args.spectrum:
            figure = spectrum_figure(model, against, args.spectrum, progress)
        else:
            against = against or base_of(model, progress)
            figure = weights_figure(model, against, measure(model, against, progress))
    tell(figure, output, targets)
    output.row("end", status="done", model=model.name)
    return 0
