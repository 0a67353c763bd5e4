"""Models in another dtype, or quantised for MLX, with the perplexity before and after on a text of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engines.base import Engine, Progress
from engines.checkpoints import as_bfloat16, as_float32, write_json, write_safetensors
from engines.gemma3 import GROUP_SIZES, Gemma3Config, Quantization
from engines.quantization import iterate_dense
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.adapters import ITEM_BYTES
from gemma_tui.hub.convert import ensure_space, staging
from gemma_tui.hub.models import Model, copy_tokenizer, resolve, summary
from gemma_tui.hub.naming import free_name, name_from
from gemma_tui.hub.set_blocks import set_blocks_of, write_set_blocks
from gemma_tui.output import bytes_text
from gemma_tui.rows import data_path
from gemma_tui.studies.perplexity import TOKENS, Perplexity, perplexity
from gemma_tui.studies.plan import command, option
from gemma_tui.tokenizer import read_tokenizer

TEXT_CHARACTERS = 64 * TOKENS
"""Of a text that are tokenised: the tokens that are read are shorter than 64 characters on average."""


@dataclass(frozen=True)
class ConversionPlan:
    """What is made of a model."""

    model: str = option("", "name, folder, run or hub id", required=True)
    bits: int | None = option(
        None, "quantise the matrices to so many bits, in MLX's layout", unit="bits: 4, 6 or 8", low=4, high=8,
        open_means="plain weights",
    )  # fmt: skip
    group_size: int = option(64, "numbers of a row that share a scale and a bias", unit="numbers: 32, 64 or 128")
    dtype: str | None = option(
        None, "of the weights; quantised, of scales and norms", choices=("float32", "bfloat16"),
        open_means="that of the model",
    )  # fmt: skip
    name: str = option("", "of the new model; the model's with -4bit or the dtype if left out")
    text: str = option("", "a text file, whose perplexity is measured before and after")


@dataclass(frozen=True)
class Converted:
    """The new model, and how well both read the text, if one was given."""

    folder: Path
    bytes_before: int
    bytes_after: int
    before: Perplexity | None = None
    after: Perplexity | None = None


def in_words(plan: ConversionPlan, made: Converted) -> str:
    """What was made, for a person."""
    line = f"{made.folder.name}: {bytes_text(made.bytes_after)}, before {bytes_text(made.bytes_before)}"
    if made.before is None or made.after is None:
        return line
    before, after = made.before.value, made.after.value
    return (
        f"{line}; perplexity over {made.after.tokens:,} tokens of {plan.text}: {before:.3f} before, {after:.3f} after "
        f"({after / before - 1:+.1%})"
    )


def command_of(plan: ConversionPlan, engine: str) -> str:
    """What does the same on the command line.

    Args:
        engine: that is chosen; quantising is MLX's in any case.
    """
    verb = ("models", "convert", plan.model, "--engine", "mlx" if plan.bits is not None else engine)
    return command(verb, replace(plan, model=ConversionPlan.model))


def check(plan: ConversionPlan) -> None:
    """Refuse what cannot be meant.

    Raises:
        UsageError: nothing is to be changed, or the numbers are not MLX's.
    """
    if plan.bits is None and plan.dtype is None:
        raise UsageError("bits: name what it becomes: --bits 4, 6 or 8, or --dtype float32 or bfloat16")
    if plan.bits not in (None, 4, 6, 8):
        raise UsageError(f"bits is {plan.bits}; 4, 6 or 8 is needed")
    if plan.group_size not in GROUP_SIZES:
        raise UsageError(f"group_size is {plan.group_size}; 32, 64 or 128 is needed")
    if plan.bits is None and plan.group_size != 64:
        raise UsageError("group_size: --group-size makes no difference without --bits: leave it out")


def convert(plan: ConversionPlan, engine: Callable[[], Engine], progress: Progress) -> Converted:
    """Write the new model to the data folder.

    Args:
        engine: opens the engine; called only if one is needed, since a change of dtype needs none.

    Raises:
        EngineError: the plan or the model is refused, the name is taken, or the disk is too small.
    """
    check(plan)
    model = resolve(plan.model, _part(progress, 0.0, 0.0))
    if model.adapter is not None:
        raise GemmaTuiError(f"{model.name} is an adapter: make a model of it with `gemma-tui adapters fuse` first")
    item, config = summary(model), model.config()
    if item.problem:
        raise GemmaTuiError(item.problem)
    dtype = plan.dtype or ("float32" if item.dtype == "F32" else "bfloat16")
    how = None if plan.bits is None else Quantization(plan.bits, plan.group_size)
    name = plan.name or f"{name_from(model.name.partition('@')[0].rpartition('/')[2])}-{_kind(plan)}"
    target = paths.models() / free_name(name)
    ids = _ids(plan, model)
    opened = engine() if how is not None or ids else None
    needed = replace(config, quantization=how).weight_bytes(ITEM_BYTES[dtype])
    ensure_space(target.parent, needed + (64 << 20))
    writing = _part(progress, 0.0, 0.4 if ids else 1.0)
    with staging(target) as folder:
        # Before the text is read, since the engine refuses here what it cannot quantise.
        if opened is not None and how is not None:
            opened.quantise(model.folder, folder, config.to_dict(), how, dtype, writing)
        else:
            _write(model.folder, folder, config, dtype, writing)
        copy_tokenizer(model.folder, folder)
        write_set_blocks(folder, set_blocks_of(model))
        # Both before the model has its name, since nothing is left of a conversion that is stopped.
        before = _read(opened, model.folder, ids, model, _part(progress, 0.4, 0.7)) if opened and ids else None
        after = _read(opened, folder, ids, model, _part(progress, 0.7, 1.0)) if opened and ids else None
    made = summary(Model(target.name, target, "data folder"))
    return Converted(target, item.nbytes, made.nbytes, before, after)


def _write(source: Path, target: Path, config: Gemma3Config, dtype: str, progress: Progress) -> None:
    """Plain weights in a dtype; packed ones become what they mean."""
    kind, shapes = "BF16" if dtype == "bfloat16" else "F32", config.parameter_shapes()

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        done, total = 0, config.parameter_count()
        for name, stored in iterate_dense(source, config):
            value = as_float32(stored)
            yield name, as_bfloat16(value) if kind == "BF16" else value
            done += math.prod(shapes[name])
            progress(done / total, f"writing {name}")

    write_safetensors(target / "model.safetensors", arrays(), {name: (kind, shape) for name, shape in shapes.items()})
    write_json(target / "config.json", {**replace(config, quantization=None).to_dict(), "dtype": dtype})


def _ids(plan: ConversionPlan, model: Model) -> list[int]:
    """The tokens of the text's beginning, if there is a text."""
    if not plan.text:
        return []
    path = data_path(plan.text)
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(TEXT_CHARACTERS)
    except OSError as error:
        raise UsageError(f"text: {path} cannot be read ({error.strerror}): check the path") from None
    ids = read_tokenizer(model.folder).encode(text, bos=False)
    if not ids:
        raise UsageError(f"text: {path} is empty: name another")
    return ids


def _read(engine: Engine, folder: Path, ids: list[int], model: Model, progress: Progress) -> Perplexity:
    engine.load(folder, None, lambda share, what: progress(0.3 * share, what))
    found = perplexity(engine, ids, model.config().bos_token_id, lambda s, what: progress(0.3 + 0.7 * s, what))
    engine.unload()
    return found


def _kind(plan: ConversionPlan) -> str:
    return str(plan.dtype) if plan.bits is None else f"{plan.bits}bit"


def _part(progress: Progress, low: float, high: float) -> Progress:
    """A progress that fills only a part of another."""
    return lambda share, what: progress(low + (high - low) * share, what)
