"""Adapters by name: import, export, blend, and fuse into models of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.adapters import Factors, read_adapter, read_settings, write_adapter, write_mlx, write_peft
from engines.base import Progress
from engines.blending import WAYS, Blend, blend, fuse
from engines.errors import EngineError
from engines.training import LoRASettings
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.convert import ensure_space, staging
from gemma_tui.hub.models import (
    Model,
    base_model,
    copy_tokenizer,
    imported_adapters,
    newest_runs,
    no_import,
    resolve,
    run_adapter,
    summary,
    whole_model,
)
from gemma_tui.hub.naming import free_name
from gemma_tui.hub.set_blocks import SetBlocks, set_blocks_of, write_set_blocks

FORMATS = ("peft", "mlx")
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Listed:
    """An adapter in a list. ``problem`` says why it cannot be used, if so; then what is not known is left empty.

    Attributes:
        source: ``adapter`` for one of the data folder, or ``run``.
        base: the folder of its model.
    """

    name: str
    source: str
    folder: Path
    nbytes: int
    base: Path | None = None
    settings: LoRASettings | None = None
    problem: str = ""


def find(name: str) -> tuple[Model, Path]:
    """The adapter that a name means, a run's, an imported one's or a folder: its base, and where the adapter lies.

    Raises:
        EngineError: nothing of that name is here, it is a whole model, or the adapter's base is not here.
    """
    model = resolve(name)
    if model.adapter is None:
        raise GemmaTuiError(f"{name[:80]} is a whole model, no adapter: see `gemma-tui adapters list`")
    return base_model(model.adapter), model.adapter


def read(name: str) -> tuple[Model, Factors, LoRASettings]:
    """An adapter by its name, read and checked against its base, which comes first.

    Raises:
        EngineError: as ``find`` and ``engines.adapters.read_adapter`` do.
    """
    base, folder = find(name)
    return base, *read_adapter(folder, base.config())


def listed() -> Iterator[Listed]:
    """The adapters here: those of the data folder, and those of the newest runs."""
    places = [(folder.name, "adapter", folder) for folder in imported_adapters()]
    places += [(run.name, "run", folder) for run in newest_runs() if (folder := run_adapter(run)) is not None]
    for name, source, folder in places:
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        try:
            base, settings = base_model(folder, no_import).folder, read_settings(folder)
            yield Listed(name, source, folder, nbytes, base, settings)
        except EngineError as error:
            yield Listed(name, source, folder, nbytes, problem=str(error))


def import_adapter(source: Path, name: str, base: str | None = None) -> Model:
    """Bring an adapter of PEFT or mlx-lm into the data folder, where models are found by name.

    Args:
        base: the model it goes on; None takes the one it names.

    Raises:
        EngineError: the name is taken or not valid, the files are broken or of another model, or the base is not here.
    """
    target = paths.adapters() / free_name(name)
    if not source.is_dir():
        raise GemmaTuiError(f"{source} is no folder: name one that holds an adapter of PEFT or mlx-lm")
    model = base_model(source) if base is None else whole_model(base)
    factors, settings = read_adapter(source, model.config())
    trained = set_blocks_of(Model(name, model.folder, "adapter", source))
    return _store(target, factors, settings, model, trained)


def export(name: str, format: str, out: Path) -> Path:
    """Write an adapter to a folder of its own, as PEFT or as mlx-lm reads it.

    Raises:
        EngineError: there is no such adapter, ``out`` is there already, or the disk is full.
    """
    model, factors, settings = read(name)
    if out.exists():
        raise GemmaTuiError(f"{out} is there already: name a new folder")
    with staging(out) as folder:
        if format == "mlx":
            write_mlx(folder, factors, settings, model.config(), _reference(model))
        else:
            write_peft(folder, factors, settings, _reference(model))
        write_set_blocks(folder, set_blocks_of(resolve(name)))
    return out


def blend_adapters(
    names: Sequence[str], weights: Sequence[float], name: str, how: str = "svd", rank: int | None = None
) -> tuple[Model, Blend]:
    """Make one adapter of several of one model; see ``engines.blending.blend`` for the ways.

    Raises:
        UsageError: fewer than two adapters, not one finite weight for each, or a rank that is not positive or not used.
        EngineError: the adapters cannot be put together, or as ``read`` does.
    """
    if len(names) < 2:
        raise UsageError("a blend takes two adapters or more: name another")
    if len(weights) != len(names):
        raise UsageError(f"{len(names)} adapters and {len(weights)} weights: give each adapter one weight")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError("weights must be finite numbers")
    if how not in WAYS:
        raise UsageError(f"how is {how[:40]!r}; choose {' | '.join(WAYS)}")
    if rank is not None and how != "svd":
        raise UsageError(f"rank goes with svd; {how} decides it itself")
    if rank is not None and rank < 1:
        raise UsageError(f"rank is {rank}; 1 or more is needed")
    target = paths.adapters() / free_name(name)
    found = [read(some) for some in names]
    model = found[0][0]
    for some, (other, _, _) in zip(names, found, strict=True):
        if other.folder.resolve() != model.folder.resolve():
            raise GemmaTuiError(
                f"{some[:80]} stands on {other.name}, {names[0][:80]} on {model.name}: "
                "only adapters of one model can be blended"
            )
    made = blend([(factors, settings) for _, factors, settings in found], weights, model.config(), how, rank)
    notes = {set_blocks_of(resolve(some)) for some in names} - {None}
    # Of adapters for different mask tokens or blocks, what they know together was trained by none.
    return _store(target, made.factors, made.settings, model, notes.pop() if len(notes) == 1 else None), made


def fuse_adapter(name: str, new: str, dtype: str | None = None, progress: Progress | None = None) -> Path:
    """Write an adapter and its base as one model to the data folder, with the base's tokenizer.

    Args:
        dtype: of the weights; None takes bfloat16 if the base is kept in it, else float32.

    Raises:
        EngineError: the name is taken or not valid, or as ``read`` does, or the disk is too small.
    """
    target = paths.models() / free_name(new)
    model, factors, settings = read(name)
    kept = dtype or ("bfloat16" if summary(model).dtype == "BF16" else "float32")
    ensure_space(paths.models(), ITEM_BYTES[kept] * model.config().parameter_count() + (64 << 20))
    with staging(target) as folder:
        fuse(model.folder, factors, settings, folder, kept, progress)
        copy_tokenizer(model.folder, folder)
        write_set_blocks(folder, set_blocks_of(resolve(name)))
    return target


def _store(target: Path, factors: Factors, settings: LoRASettings, model: Model, trained: SetBlocks | None) -> Model:
    # By its name a base is found even after the data folder or the program has moved.
    base = str(model.folder) if model.source == "folder" else model.name
    with staging(target) as folder:
        write_adapter(folder, factors, settings, model.config(), base)
        write_set_blocks(folder, trained)
    return Model(target.name, model.folder, "adapter", target)


def _reference(model: Model) -> str:
    """What an exported adapter names as its base, so that other programs find it: a hub id, or a folder."""
    return model.name if model.source == "hub cache" else str(model.folder)
