"""``gemma-tui adapters``."""

from __future__ import annotations

import argparse
from pathlib import Path

from engines.training import LoRASettings
from gemma_tui.hub import adapters
from gemma_tui.output import Output, bytes_text


def list_adapters(args: argparse.Namespace, output: Output) -> int:
    """The adapters on this machine."""
    found = list(adapters.listed())
    for item in found:
        facts = {} if item.settings is None else {"rank": item.settings.rank, "type": _kind(item.settings)}
        output.row(
            "adapter", name=item.name, source=item.source, folder=str(item.folder),
            base=None if item.base is None else str(item.base), bytes=item.nbytes, problem=item.problem, **facts,
        )  # fmt: skip
    if found:
        output.table(("adapter", "type", "rank", "base", "size", "where"), [_line(item) for item in found])
    else:
        output.say("no adapters yet: `gemma-tui train --method lora` makes one, `adapters import` brings one")
    for item in found:
        if item.problem:
            output.say(f"{item.name}: {item.problem}")
    output.row("end", status="done", adapters=len(found))
    return 0


def export(args: argparse.Namespace, output: Output) -> int:
    """Write an adapter to a folder, as PEFT or as mlx-lm reads it."""
    out = Path(args.out or f"{Path(args.adapter).name}-{args.format}").expanduser()
    folder = adapters.export(args.adapter, args.format, out)
    output.say(f"{folder} holds {args.adapter} as {'PEFT' if args.format == 'peft' else 'mlx-lm'} reads it")
    output.row("end", status="done", folder=str(folder), format=args.format)
    return 0


def import_adapter(args: argparse.Namespace, output: Output) -> int:
    """Bring an adapter of PEFT or mlx-lm into the data folder."""
    model = adapters.import_adapter(Path(args.folder).expanduser(), args.name, args.base)
    output.say(f"{model.name} is ready: `gemma-tui generate {model.name} --prompt ...`")
    output.row("end", status="done", adapter=model.name, folder=str(model.adapter), base=str(model.folder))
    return 0


def blend(args: argparse.Namespace, output: Output) -> int:
    """Make one adapter of several."""
    name = args.name or "-".join(("blend", *(Path(adapter).name for adapter in args.adapters)))
    model, made = adapters.blend_adapters(args.adapters, args.weights, name, args.how, args.rank)
    output.say(f"{model.name} is ready, of rank {made.settings.rank}: `gemma-tui generate {model.name} --prompt ...`")
    if made.kept is None:
        output.say("linear mixes the factors, and is no weighted sum of the updates; svd and cat are")
    elif made.worst is not None:
        output.say(
            f"{made.kept:.2%} of the energy of the weighted sum is kept, at least {made.worst[0]:.2%} of a linear"
        )
    output.row(
        "end", status="done", adapter=model.name, folder=str(model.adapter), rank=made.settings.rank, kept=made.kept,
        worst=None if made.worst is None else {"kept": made.worst[0], "linear": made.worst[1]},
    )  # fmt: skip
    return 0


def fuse(args: argparse.Namespace, output: Output) -> int:
    """Make one model of an adapter and its base."""
    with output.progress("fusing") as progress:
        folder = adapters.fuse_adapter(args.adapter, args.name, args.dtype, progress)
    output.say(f"{folder.name} is ready: `gemma-tui generate {folder.name} --prompt ...`")
    output.row("end", status="done", model=folder.name, folder=str(folder))
    return 0


def _kind(settings: LoRASettings) -> str:
    name = "dora" if settings.dora else "lora"
    return f"{name}, scaled by √rank" if settings.rslora else name


def _line(item: adapters.Listed) -> tuple[str, ...]:
    kind, rank = ("", "") if item.settings is None else (_kind(item.settings), str(item.settings.rank))
    base = "" if item.base is None else item.base.name
    return item.name, kind, rank, base, bytes_text(item.nbytes), item.source
