"""``gemma-tui models``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from engines import open_engine
from gemma_tui import paths
from gemma_tui.commands.figures import tell
from gemma_tui.commands.hub import about_remote, disk_use
from gemma_tui.commands.plans import plan_from
from gemma_tui.errors import UsageError
from gemma_tui.hub import demo, fit
from gemma_tui.hub.convert import import_gguf, new_model
from gemma_tui.hub.facts import about, facts
from gemma_tui.hub.models import REAL, Model, Summary, is_only_remote, local_models, resolve, summary
from gemma_tui.hub.naming import free_name
from gemma_tui.output import Output, bytes_text, count_text
from gemma_tui.rows import data_path
from gemma_tui.studies.conversion import ConversionPlan, convert, in_words
from gemma_tui.studies.fitting import config_named, devices, main_needs, memory_lines, needs_figure, use_of


def list_models(args: argparse.Namespace, output: Output) -> int:
    """The models on this machine."""
    found = local_models()
    for item in found:
        output.row(
            "model", name=item.model.name, source=item.model.source, folder=str(item.model.folder),
            parameters=item.parameters, dtype=item.dtype, bytes=item.nbytes, state=fit.state(item),
            problem=item.problem,
        )  # fmt: skip
    output.table(("model", "parameters", "dtype", "size", "state", "where"), [_line(item) for item in found])
    for item in found:
        if item.problem:
            output.say(f"{item.model.name}: {item.problem}")
    disk_use(output)
    output.row("end", status="done", models=len(found))
    return 0


def info(args: argparse.Namespace, output: Output) -> int:
    """One model: shape, layers, parameters, memory, and what is known of its origin; of the hub if it is only there."""
    if is_only_remote(args.model):
        return about_remote(args.model, output)
    with output.progress("opening") as progress:
        model = resolve(args.model, progress)
    config, item = model.config(), summary(model)
    if item.problem:
        raise UsageError(item.problem)
    known = facts(model)
    memory = {use_of(need): need.nbytes for need in main_needs(config)}
    output.row("model", name=model.name, folder=str(model.folder), bytes=item.nbytes, dtype=item.dtype,
               parameters=item.parameters, memory=memory, config=config.to_dict(), **asdict(known))  # fmt: skip
    table = config.vocab_size * config.hidden_size
    lines = [
        ("folder", model.folder),
        ("parameters", f"{item.parameters:,}, of which {table:,} ({table / item.parameters:.0%}) are embeddings"),
        ("stored as", f"{item.dtype}, {bytes_text(item.nbytes)}"),
        ("layers", f"{config.num_hidden_layers}, global: {', '.join(map(str, config.global_layers)) or 'none'}"),
        ("window", f"{config.sliding_window} tokens on local layers, context {config.max_position_embeddings:,}"),
        (
            "heads",
            f"{config.num_attention_heads} for {config.num_key_value_heads} keys and values of {config.head_dim}",
        ),
        ("widths", f"{config.hidden_size} residual, {config.intermediate_size} MLP, {config.vocab_size:,} tokens"),
        *memory_lines(config),
        *about(known),
    ]
    output.table(("", model.name), lines)
    if args.card:
        output.say(known.card or f"{model.name} has no model card")
    output.row("end", status="done")
    return 0


def import_model(args: argparse.Namespace, output: Output) -> int:
    """Bring a GGUF, or the packaged 270M, into the data folder."""
    with output.progress("importing") as progress:
        if args.file == REAL:
            folder = demo.ensure_imported(progress)
        else:
            source = data_path(args.file)
            folder = import_gguf(source, paths.models() / free_name(args.name or source.stem), progress)
    output.say(f"{folder.name} is ready: `gemma-tui generate {folder.name} --prompt ...`")
    output.row("end", status="done", model=folder.name, folder=str(folder))
    return 0


def fit_model(args: argparse.Namespace, output: Output) -> int:
    """What a model needs on this machine, from its config alone."""
    config = config_named(args.model)
    bare = config.parameter_count(embeddings=False)
    count, stored = config.parameter_count(), config.weight_bytes(2)
    output.row("model", name=args.model, parameters=count, embeddings=count - bare, bytes=stored,
               bits=config.quantization.bits if config.quantization else 16, config=config.to_dict())  # fmt: skip
    figure = needs_figure(args.model, config, devices())
    for need in figure.facts["needs"]:
        output.row("need", **need)
    if not output.as_json:
        tell(figure, output, [])
    output.row("end", status="done", parameters=count)
    return 0


def convert_model(args: argparse.Namespace, output: Output) -> int:
    """Quantise a model for MLX, or change its dtype."""
    plan = plan_from(ConversionPlan, args, {}, "models convert")
    wanted = "mlx" if args.engine == "auto" and plan.bits is not None else args.engine
    with output.progress("converting") as progress:
        made = convert(plan, lambda: open_engine(wanted), progress)
    name = made.folder.name
    output.say(f"{in_words(plan, made)}; {made.folder}")
    found = {}
    if made.before is not None and made.after is not None:
        found = {"perplexity_before": made.before.value, "perplexity_after": made.after.value}
    engine = " --engine mlx" if plan.bits is not None else ""
    output.say(f"`gemma-tui generate {name}{engine} --prompt ...` lets it write")
    output.row("end", status="done", model=name, folder=str(made.folder), bytes_before=made.bytes_before,
               bytes_after=made.bytes_after, tokens=made.after.tokens if made.after else 0, **found)  # fmt: skip
    return 0


def new(args: argparse.Namespace, output: Output) -> int:
    """Make an untrained model of a given shape, with a tokenizer of its own."""
    folder = new_model(
        args.name,
        data_path(args.data),
        {
            key: getattr(args, key)
            for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings",
            )
        },
    )  # fmt: skip
    count = Model(args.name, folder, "data folder").config().parameter_count()
    output.say(f"{folder}: {count:,} parameters; `gemma-tui train --model {args.name} --fresh --method full` trains it")
    output.row("end", status="done", model=args.name, folder=str(folder), parameters=count)
    return 0


def _line(item: Summary) -> tuple[str, ...]:
    size = bytes_text(item.nbytes) if item.nbytes else ""
    parameters = count_text(item.parameters) if item.parameters else ""
    return item.model.name, parameters, item.dtype, size, fit.state(item), item.model.source
