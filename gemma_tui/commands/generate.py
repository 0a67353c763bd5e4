"""``gemma-tui generate``."""

from __future__ import annotations

import argparse

from engines import open_engine
from gemma_tui.commands.plans import plan_from
from gemma_tui.output import Output
from gemma_tui.studies.generation import Generation, GenerationPlan, write
from gemma_tui.studies.loading import load
from gemma_tui.tokenizer import read_tokenizer


def generate(args: argparse.Namespace, output: Output) -> int:
    """Load a model and stream what it writes."""
    plan = plan_from(GenerationPlan, args, {}, "generate")
    with output.progress("opening") as progress:
        engine = open_engine(args.engine)
        model = load(engine, args.model, args.dtype, progress)
    tokenizer = read_tokenizer(model.folder)
    generation = Generation()
    for piece in write(engine, tokenizer, plan, generation):
        output.stream(piece)
        output.row("text", text=piece)
    output.say("")
    output.row(
        "end",
        status="done",
        text=generation.text,
        tokens=len(generation.tokens),
        prompt_tokens=generation.prompt_tokens,
        seconds=generation.seconds,
        tokens_per_second=generation.tokens_per_second,
        stopped=generation.stopped,
        engine=engine.name,
    )
    return 0
