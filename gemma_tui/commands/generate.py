"""``gemma-tui generate``."""

from __future__ import annotations

import argparse

from engines import open_engine
from gemma_tui.commands.curve import curve
from gemma_tui.commands.figures import FORMATS
from gemma_tui.commands.plans import plan_from, refuse
from gemma_tui.hub.models import resolve
from gemma_tui.output import Output
from gemma_tui.studies.curve.plan import CurvePlan
from gemma_tui.studies.generation import Generation, GenerationPlan, settled, write
from gemma_tui.studies.loading import load
from gemma_tui.studies.plan import check_honoured, options
from gemma_tui.tokenizer import read_tokenizer


def generate(args: argparse.Namespace, output: Output) -> int:
    """Load a model and stream what it writes, or decode rows in several ways."""
    its_own, of_curves = ({o.name for o in options(plan)} - {"model"} for plan in (GenerationPlan, CurvePlan))
    given = {name for name, value in vars(args).items() if value is not None}
    if "data" in given:
        refuse(given & (its_own - of_curves), "rows are gone on from greedily: leave it out with --data")
        return curve(args, output)
    refuse(given & ((of_curves | set(FORMATS)) - its_own - {"dtype"}), "it goes with --data")
    plan = plan_from(GenerationPlan, args, {}, "generate")
    check_honoured(plan)
    with output.progress("opening") as progress:
        plan, warnings = settled(plan, resolve(args.model, progress))
        engine = open_engine(args.engine)
        model = load(engine, args.model, args.dtype, progress)
    for text in warnings:
        output.say(f"warning: {text}")
        output.row("warning", text=text)
    generation = Generation(warnings=warnings)
    for piece in write(engine, read_tokenizer(model.folder), plan, generation):
        if piece:
            output.stream(piece)
            output.row("text", text=piece)
    output.say("")
    if plan.blocks():
        output.say(_told(generation))
    output.row(
        "end",
        status="done",
        text=generation.text,
        tokens=len(generation.tokens),
        prompt_tokens=generation.prompt_tokens,
        passes=len(generation.passes),
        tokens_per_pass=generation.tokens_per_pass,
        seconds=generation.seconds,
        tokens_per_second=generation.tokens_per_second,
        stopped=generation.stopped,
        ended=generation.ended,
        decoder=plan.decoder,
        engine=engine.name,
    )
    return 0


def _told(generation: Generation) -> str:
    return (
        f"{len(generation.tokens):,} tokens in {len(generation.passes):,} passes ({generation.tokens_per_pass:.2f} a "
        f"pass), {generation.tokens_per_second:.1f} tokens/s"
    )
