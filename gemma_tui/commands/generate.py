"""``gemma-tui generate``."""

from __future__ import annotations

import argparse

from engines import open_engine
from gemma_tui.commands.plans import plan_from
from gemma_tui.hub.models import resolve
from gemma_tui.output import Output
from gemma_tui.studies.generation import Generation, GenerationPlan, settled, write
from gemma_tui.studies.loading import load
from gemma_tui.studies.plan import check_honoured
from gemma_tui.tokenizer import read_tokenizer


def generate(args: argparse.Namespace, output: Output) -> int:
    """Load a model and stream what it writes."""
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
