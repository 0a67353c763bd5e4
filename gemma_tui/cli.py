"""The command line: one parser, whose options come from the plans, and a dispatch to ``gemma_tui.commands``.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from engines.errors import EngineError
from engines.memory import is_out_of_memory
from gemma_tui import VERSION
from gemma_tui.errors import UsageError
from gemma_tui.output import Output, error_line
from gemma_tui.text import clean, without_tokens

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
OUT_OF_MEMORY = "not enough memory: choose a smaller model, batch or sequence length"
FRAMES_PER_SECOND = "120"
"""Textual draws at fixed ticks and a key passes through two of them; at its usual 60 that alone is 33 ms."""

EXPORTS = (
    ("html", "a page that needs nothing else"),
    ("svg", "pictures"),
    ("png", "one picture"),
    ("npz", "arrays"),
    ("csv", "tables"),
)
COMMANDS = (
    "models list, generate, roofline, data, train, attention, capacity sweep, memorization, canaries, adapters list, "
    "runs list, bench, doctor"
)


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        error_line(f"{message}; `{self.prog} --help` shows what there is")
        Output("--json" in sys.argv).row("end", status="failed", error=message)
        sys.exit(USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, or the app without one; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        return _app()
    args = _parser(given).parse_args(given)
    if args.run is None:
        _parser(given).error("name what to do")
    output = Output(args.json)
    module, _, function = args.run.partition(":")
    try:
        code = getattr(importlib.import_module(f"gemma_tui.commands.{module}"), function)(args, output)
    except EngineError as error:
        return _failed(output, error, USAGE if isinstance(error, UsageError) else FAILED, args.debug)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(output, EngineError(OUT_OF_MEMORY), FAILED, args.debug)
    except KeyboardInterrupt:
        output.row("end", status="interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone; there is no one to tell. Closing stderr keeps Python from complaining at exit.
        sys.stderr.close()
        return FAILED
    return int(code)


def console() -> None:
    """The console script."""
    sys.exit(main())


def _failed(output: Output, error: Exception, code: int, debug: bool) -> int:
    if debug:
        import traceback

        # An exception carries foreign text, as a file's name may be.
        print(clean(without_tokens("".join(traceback.format_exception(error)))), end="", file=sys.stderr)
    error_line(str(error))
    output.row("end", status="failed", error=str(error))
    return code


def _app() -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        error_line(f"the app needs a terminal; without one use the commands: {COMMANDS} (`gemma-tui --help`)")
        return USAGE
    os.environ.setdefault("TEXTUAL_FPS", FRAMES_PER_SECOND)
    from gemma_tui.app import run

    return run()


def _parser(given: Sequence[str]) -> Parser:
    parser = Parser(
        prog="gemma-tui",
        description="A terminal workbench for studying Gemma-3 from the inside. Without a command the app starts.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gemma-tui {VERSION}")
    parser.set_defaults(run=None, json=False, debug=False)
    groups = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    _models(groups, wanted="convert" in given)
    _generate(groups, wanted="generate" in given)
    _roofline(groups, wanted="roofline" in given)
    _data(groups, wanted="data" in given)
    _task(groups, wanted="task" in given)
    _train(groups, wanted="train" in given)
    _attention(groups, wanted="attention" in given)
    _capacity(groups, wanted="capacity" in given)
    _memorization(groups, wanted="memorization" in given)
    _canaries(groups, wanted="canaries" in given)
    _adapters(groups)
    _runs(groups)
    _queue(groups)
    _sweep(groups)
    _bench(groups, wanted="bench" in given)
    _command(groups, "doctor", "engines, devices, memory, versions, store health", "doctor:doctor")
    return parser


def _command(groups: argparse._SubParsersAction, name: str, help: str, run: str) -> argparse.ArgumentParser:
    command = groups.add_parser(name, help=help, description=help, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="one JSON object per line, the last of kind end")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _group(groups: argparse._SubParsersAction, name: str, help: str) -> argparse._SubParsersAction:
    return groups.add_parser(name, help=help, description=help, allow_abbrev=False).add_subparsers(
        metavar="COMMAND", required=True, parser_class=Parser
    )


def _models(groups: argparse._SubParsersAction, wanted: bool) -> None:
    group = _group(groups, "models", "models here and on the hub: list, fetch, check, remove, import")
    _command(group, "list", "the models on this machine", "models:list_models")
    info = _command(group, "info", "one model: shape, layers, parameters, memory", "models:info")
    info.add_argument("model", metavar="M", help="name, folder, run or hub id, here or on the hub")
    info.add_argument("--card", action="store_true", help="the model card as plain text")
    imported = _command(group, "import", "bring a GGUF into the data folder", "models:import_model")
    imported.add_argument(
        "file", metavar="FILE.gguf", help="a Gemma-3 text model; or gemma-3-270m for the packaged one"
    )
    imported.add_argument("--name", help="the model's name; the file's name without .gguf if left out")
    _hub(group)
    fit = _command(group, "fit", "what a model needs here, from its config alone", "models:fit_model")
    fit.add_argument(
        "model", metavar="M", help="gemma-3-270m, -1b, -4b, -12b or -27b, a config.json, or a model's name"
    )
    tree = _command(group, "tree", "the architecture: shapes, parameters, what LoRA would add", "inspect:tree")
    tree.add_argument("model", metavar="M", help="name, folder, run, hub id or an official size")
    tree.add_argument("--rank", type=int, default=8, metavar="R", help="of the LoRA that is counted (default 8)")
    weights = _command(
        group, "weights", "each matrix in numbers, or how it differs from another model's", "inspect:weights"
    )
    weights.add_argument("model", metavar="M", help="name, folder, run or hub id")
    weights.add_argument(
        "--against",
        default="",
        metavar="N",
        help="a model of the same shape, as the one it was tuned from; without it all matrices of an adapter are "
        "told against its base's",
    )
    weights.add_argument(
        "--spectrum", default="", metavar="NAME", help="singular values of one matrix, as 3.self_attn.q_proj"
    )
    for name, what in EXPORTS:
        weights.add_argument(f"--{name}", metavar="FILE", help=f"write them as {what}")
    convert = _command(group, "convert", "quantise a model for MLX, or change its dtype", "models:convert_model")
    convert.add_argument("model", metavar="M", help="name, folder, run or hub id")
    _engine_option(convert)
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.conversion import ConversionPlan

        add_options(convert, ConversionPlan, ("model",))
    new = _command(group, "new", "an untrained model of a given shape, with its own tokenizer", "models:new")
    new.add_argument("name", metavar="NAME", help="a folder of this name is made in the data folder")
    new.add_argument("--data", required=True, help="text for the tokenizer: .jsonl, .txt or a folder with train")
    for flag, default, help in (
        ("vocab-size", 3072, "token ids, 363 of them special or bytes"),
        ("hidden-size", 192, "width of the residual stream"),
        ("intermediate-size", 512, "width of the MLP"),
        ("num-hidden-layers", 6, "layers; every sixth is global"),
        ("num-attention-heads", 4, "query heads"),
        ("num-key-value-heads", 2, "key and value heads"),
        ("head-dim", 48, "width of a head"),
        ("sliding-window", 64, "keys a local layer sees"),
        ("max-position-embeddings", 1024, "context length"),
    ):
        new.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"{help} (default {default})")


def _hub(group: argparse._SubParsersAction) -> None:
    search = _command(group, "search", "Gemma-3 models on the hub", "hub:search")
    search.add_argument("query", metavar="Q", nargs="?", default="", help="words of the name; all if left out")
    search.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many (default 50)")
    download = _command(group, "download", "fetch models from the hub into its cache", "hub:download")
    download.add_argument("repos", nargs="+", metavar="REPO", help="owner/name; several are fetched in turn")
    download.add_argument("--revision", default="main", metavar="REV", help="branch, tag or commit (default main)")
    download.add_argument("--include", action="append", default=[], metavar="GLOB", help="files beside the usual ones")
    download.add_argument("--detach", action="store_true", help="go on in a process of its own and return at once")
    verify = _command(group, "verify", "hold a model's files against their checksums", "hub:verify")
    verify.add_argument("model", metavar="M", help="name, folder or hub id")
    verify.add_argument("--offline", action="store_true", help="against the names of the cache's files alone")
    remove = _command(group, "remove", "delete a model, after a look at what goes", "hub:remove")
    remove.add_argument("model", metavar="M", help="name, hub id, or owner/name@commit for one commit")
    clean = _command(group, "clean", "delete what broken downloads have left in the cache", "hub:clean")
    for command in (remove, clean):
        command.add_argument("--yes", action="store_true", help="delete without asking")
    adopt = _command(group, "adopt", "give a folder from elsewhere a name here, without a copy", "hub:adopt")
    adopt.add_argument("folder", metavar="FOLDER", help="a model's folder; it stays where it is")
    adopt.add_argument("--name", help="the name it gets; the folder's if left out")


def _generate(groups: argparse._SubParsersAction, wanted: bool) -> None:
    command = _command(groups, "generate", "let a model write", "generate:generate")
    command.add_argument("model", metavar="M", help="name, folder, run or hub id")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights; the device's default")
    _engine_option(command)
    if wanted:  # a plan's fields are read only for the command that takes them
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.curve.plan import SHARED, CurvePlan
        from gemma_tui.studies.generation import GenerationPlan

        add_options(command, GenerationPlan)
        over = command.add_argument_group("speed and quality over data")
        add_options(over, CurvePlan, ("model", "dtype", *SHARED))
        for name, what in EXPORTS:
            over.add_argument(f"--{name}", metavar="FILE", help=f"write the curve as {what}")


def _roofline(groups: argparse._SubParsersAction, wanted: bool) -> None:
    help = "what passes of several tokens cost on this machine, measured and by the roofline"
    command = _command(groups, "roofline", help, "roofline:roofline")
    command.add_argument("model", metavar="M", help="name, folder, run or hub id")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights; the device's default")
    for name, what in EXPORTS:
        command.add_argument(f"--{name}", metavar="FILE", help=f"write it as {what}")
    _engine_option(command)
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.pass_times import RooflinePlan

        add_options(command, RooflinePlan)


def _data(groups: argparse._SubParsersAction, wanted: bool) -> None:
    command = _command(groups, "data", "look at data before a run: counts, lengths, what the loss sees", "data:data")
    command.add_argument("model", metavar="M", help="name, folder, run or hub id; its tokenizer is used")
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.survey import SurveyPlan

        add_options(command, SurveyPlan)


def _train(groups: argparse._SubParsersAction, wanted: bool) -> None:
    command = _command(groups, "train", "train a model and keep the run", "train:train_command")
    command.add_argument("plan", nargs="?", metavar="PLAN.toml", help="a file with any of the options below")
    command.add_argument("--detach", action="store_true", help="run in a process of its own and return at once")
    command.add_argument("--quiet", action="store_true", help="tell only the run's name, warnings and the end")
    _engine_option(command)
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.training_plan import TrainingPlan

        add_options(command, TrainingPlan)


def _attention(groups: argparse._SubParsersAction, wanted: bool) -> None:
    help = "what a model does inside a text: heads, sinks, lens, attribution, ablation"
    command = _command(groups, "attention", help, "attention:attention")
    command.add_argument("model", metavar="M", help="name, folder, run or hub id")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights; the device's default")
    command.add_argument("--stats", action="store_true", help="every head's metrics: the view heads, the default")
    for name, what in EXPORTS:
        command.add_argument(f"--{name}", metavar="FILE", help=f"write the view as {what}")
    _engine_option(command)
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.attention.plan import AttentionPlan
        from gemma_tui.studies.attention.survey import HeadStudyPlan

        add_options(command, AttentionPlan)
        add_options(command.add_argument_group("heads over many texts"), HeadStudyPlan, ("model", "seed"))


def _memorization(groups: argparse._SubParsersAction, wanted: bool) -> None:
    help = "how many bits of its training data a model has memorised, against a reference"
    command = _command(groups, "memorization", help, "memorization:memorization")
    command.add_argument("model", metavar="M", help="name, folder, run or hub id")
    _engine_option(command)
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.memorization.plan import MemorizationPlan
        from gemma_tui.studies.memorization.where import WherePlan

        add_options(command, MemorizationPlan, ("model",))
        for name, what in EXPORTS:
            command.add_argument(f"--{name}", metavar="FILE", help=f"write the result as {what}")
        held = command.add_argument_group("parts that hold it")
        add_options(held, WherePlan, ("model", "batch_size", "name"))


def _capacity(groups: argparse._SubParsersAction, wanted: bool) -> None:
    group = _group(groups, "capacity", "how many bits small networks hold of random tokens")
    sweep = _command(group, "sweep", "train networks over a grid of data sets, as a run", "capacity:sweep")
    sweep.add_argument("plan", nargs="?", metavar="PLAN.toml", help="a file with any of the options below")
    sweep.add_argument(
        "--preset", default="", metavar="NAME", help="quick: a plateau in minutes; smallest: the paper's"
    )
    sweep.add_argument("--add", metavar="RUN", help="more --sizes or --seeds for a sweep that there is")
    show = _command(group, "show", "what such a run has found so far", "capacity:show")
    show.add_argument("run_name", metavar="RUN", help="a sweep, or a run of memorization")
    for command in (sweep, show):
        for name, what in EXPORTS:
            command.add_argument(f"--{name}", metavar="FILE", help=f"write it as {what}")
    _engine_option(sweep)
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.capacity.plan import CapacityPlan

        add_options(sweep, CapacityPlan)


def _canaries(groups: argparse._SubParsersAction, wanted: bool) -> None:
    help = "plant random strings in data, to measure later how exposed training has left them"
    command = _command(groups, "canaries", help, "canaries:canaries")
    command.add_argument("data", metavar="DATA", help="rows to plant them in: .jsonl or .txt, a folder or hf:REPO")
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.memorization.planting import CanaryPlan

        add_options(command, CanaryPlan, ("data",))


def _task(groups: argparse._SubParsersAction, wanted: bool) -> None:
    command = _command(groups, "task", "make rows whose answers follow from their questions", "tasks:task")
    command.add_argument("folder", metavar="FOLDER", help="gets train, valid and test.jsonl; not there yet")
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.tasks import TaskPlan

        add_options(command, TaskPlan)


def _adapters(groups: argparse._SubParsersAction) -> None:
    group = _group(groups, "adapters", "what training with LoRA leaves: import, export, blend, fuse")
    named: dict[str, Any] = {"metavar": "A", "help": "an adapter: a run, an imported adapter or a folder"}
    _command(group, "list", "the adapters on this machine", "adapters:list_adapters")
    export = _command(group, "export", "write an adapter as PEFT or mlx-lm reads it", "adapters:export")
    export.add_argument("adapter", **named)
    export.add_argument("--format", required=True, choices=("peft", "mlx"), help="whose layout")
    export.add_argument("--out", metavar="DIR", help="a folder that is not there yet (default A-FORMAT, in this one)")
    imported = _command(group, "import", "bring an adapter of PEFT or mlx-lm here", "adapters:import_adapter")
    imported.add_argument("folder", metavar="DIR", help="a folder with adapter_config.json and .safetensors factors")
    imported.add_argument("--name", required=True, help="the name it gets")
    imported.add_argument("--base", metavar="M", help="the model it goes on; the one it names if left out")
    blend = _command(group, "blend", "make one adapter of several", "adapters:blend")
    blend.add_argument("adapters", nargs="+", **named)
    blend.add_argument("--weights", required=True, nargs="+", type=float, metavar="W", help="one for each adapter")
    blend.add_argument(
        "--how",
        default="svd",
        choices=("svd", "cat", "linear"),
        help="svd: the best of one rank for the weighted sum of the updates; cat: exactly that sum, ranks add up; "
        "linear: sums the factors, as PEFT's linear does, which is another thing (default svd)",
    )
    blend.add_argument("--rank", type=int, metavar="R", help="of the result of svd; the largest one given if left out")
    blend.add_argument("--name", help="the name it gets (default blend- and those of the adapters)")
    fuse = _command(group, "fuse", "make one model of an adapter and its base", "adapters:fuse")
    fuse.add_argument("adapter", **named)
    fuse.add_argument("--name", required=True, help="the model's name in the data folder")
    fuse.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; the base's if left out")


def _engine_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--engine", default="auto", choices=("auto", "torch", "mlx"), help="which engine computes")


def _runs(groups: argparse._SubParsersAction) -> None:
    group = _group(groups, "runs", "past and present runs")
    _command(group, "list", "all runs, the newest first", "runs:list_runs")
    for name, help in (
        ("show", "one run: plan, chart, events"),
        ("pause", "ask a run to wait after its step"),
        ("resume", "let a paused run go on"),
        ("stop", "ask a run to save and end"),
    ):
        command = _command(group, name, help, f"runs:{name}")
        command.add_argument("run_name", metavar="R", help="the run's name, or enough of it")
        if name == "show":
            for kind, what in EXPORTS:
                command.add_argument(f"--{kind}", metavar="FILE", help=f"write what it found as {what}")
    matrices = _command(group, "matrices", "what diagnoses tell of each matrix, as maps", "matrices:matrices")
    matrices.add_argument("run_name", metavar="R", help="the run's name, or enough of it")
    matrices.add_argument("--measure", default="relative", metavar="NAME", help="what is shown; all for everything")
    compare = _command(group, "compare", "runs side by side: a chart, what differs, results", "compare:compare")
    compare.add_argument("run_names", nargs="*", metavar="R", help="the runs' names, or enough of them")
    compare.add_argument("--group", default="", metavar="NAME", help="all runs of a group as well")
    compare.add_argument(
        "--measure", default="loss", metavar="NAME", help="what is drawn: loss, valid_loss, grad_norm…"
    )
    compare.add_argument(
        "--x",
        default="step",
        metavar="NAME",
        help="what it is drawn against: step, tokens, seconds, or the one number in which the plans differ",
    )
    compare.add_argument("--log", action="store_true", help="logarithmic axis of the measure")
    compare.add_argument("--smooth", type=int, default=20, metavar="N", help="points the mean goes over; 1 for none")
    export = _command(group, "export", "a run's metrics and events as a file", "compare:export")
    export.add_argument("run_name", metavar="R", help="the run's name, or enough of it")
    export.add_argument("--format", default="csv", choices=("csv", "json"), help="the format (default csv)")
    export.add_argument("--output", metavar="FILE", help="where to; the run's name in this folder if left out")


def _bench(groups: argparse._SubParsersAction, wanted: bool) -> None:
    command = _command(groups, "bench", "both engines side by side on this machine: speed and memory", "bench:bench")
    command.add_argument("model", metavar="M", help="name, folder, run or hub id")
    for name, what in EXPORTS:
        command.add_argument(f"--{name}", metavar="FILE", help=f"write the result as {what}")
    if wanted:
        from gemma_tui.commands.plans import add_options
        from gemma_tui.studies.bench.plan import BenchPlan

        add_options(command, BenchPlan, ("model",))


def _queue(groups: argparse._SubParsersAction) -> None:
    group = _group(groups, "queue", "plans that are run one after another")
    add = _command(group, "add", "append plans", "queue:add")
    add.add_argument("plans", nargs="*", metavar="PLAN.toml", help="files with any of the options of `train`")
    _settings(add, "an option of `train`, in place of the files' own")
    _command(group, "list", "all plans, the newest first", "queue:list_queue")
    run = _command(group, "run", "work through the queue until it is empty", "queue:run")
    run.add_argument("--detach", action="store_true", help="work in a process of its own and return at once")
    cancel = _command(group, "cancel", "take a plan out; one that is computed saves and ends", "queue:cancel")
    cancel.add_argument("id", type=int, metavar="ID", help="its number in `queue list`")


def _sweep(groups: argparse._SubParsersAction) -> None:
    sweep = _command(groups, "sweep", "queue a plan in every combination of some values", "queue:sweep")
    sweep.add_argument("plan", nargs="?", metavar="PLAN.toml", help="a file with any of the options of `train`")
    _settings(sweep, "values to take in turn, with commas between; with semicolons if a value has commas in it")
    how = sweep.add_mutually_exclusive_group()
    how.add_argument("--run", action="store_true", dest="at_once", help="work through the queue now")
    how.add_argument("--detach", action="store_true", help="work through it in a process of its own")


def _settings(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="values", help=help)
    command.add_argument("--group", default="", metavar="NAME", help="name shared by runs that are compared")
    _engine_option(command)
