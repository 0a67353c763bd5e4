"""What a model needs on this machine, from its config alone: to be read with, and to be trained by each method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engines import available_engines, open_engine
from engines.base import DeviceInfo
from engines.errors import EngineError, UnsupportedError
from engines.gemma3 import Gemma3Config, read_config
from engines.official import OFFICIAL, official_config
from engines.quantization import check_trainable
from engines.training import TrainingSettings
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.figure import Figure, Table
from gemma_tui.hub.fit import band
from gemma_tui.hub.headers import look_inside
from gemma_tui.hub.models import REAL, folder_named, is_only_remote, no_import, resolve
from gemma_tui.output import bytes_text
from gemma_tui.studies.estimate import estimate, inference_bytes
from gemma_tui.studies.methods import usual_settings

LENGTHS = (512, 2048, 8192, 32_768, 131_072)
BATCH, WINDOW = 1, 512
"""Of the training that is told."""
METHODS = {method: usual_settings(method) for method in ("lora", "relora", "rank1", "full")} | {
    "full, recomputing": replace(usual_settings("full"), checkpoint_activations=True)
}


@dataclass(frozen=True)
class Need:
    """What one use of a model takes.

    Attributes:
        use: ``inference`` or a method of training.
        length, batch: tokens of the context or window, and rows of it.
        nbytes: at the peak; 0 where the use is refused.
        verdict: ``fits``, ``tight``, ``too large``, or why it is refused.
    """

    engine: str
    device: str
    dtype: str
    use: str
    length: int
    batch: int
    nbytes: int
    available: int
    verdict: str


def config_named(name: str) -> Gemma3Config:
    """The config that a name means: a ``config.json``, a model that is here or on the hub, or an official size.

    Raises:
        EngineError: it is none of these, or the file is broken.
    """
    if name in OFFICIAL and not _is_mine(name):
        return official_config(name)
    path = Path(name)
    if path.name == "config.json" and (folder := folder_named(str(path.parent))) is not None:
        return read_config(folder)
    if is_only_remote(name):
        return _remote_config(name)
    try:
        return resolve(name).config()
    except EngineError as error:
        raise UsageError(f"{error}; known by name are {', '.join(OFFICIAL)}") from None


def _is_mine(name: str) -> bool:
    """Whether an official size's name is that of another model here; the built-in one is of that size."""
    if name == REAL:
        return False
    with suppress(GemmaTuiError):
        resolve(name, no_import)
        return True
    return False


def _remote_config(name: str) -> Gemma3Config:
    repo, _, revision = name.partition("@")
    inside = look_inside(repo, revision or "main")
    if inside.config is None:
        raise UsageError(f"{repo} has GGUF, whose shape is known once it is here: name an official size")
    return inside.config


def devices() -> list[DeviceInfo]:
    """Of the engines that are here."""
    return [open_engine(name).device() for name in available_engines()]


def needs(config: Gemma3Config, places: Sequence[DeviceInfo]) -> Iterator[Need]:
    """Every use on every engine, in the dtype that its device takes by default and the other one."""
    lengths = [length for length in LENGTHS if length <= config.max_position_embeddings] or [
        config.max_position_embeddings
    ]
    window = min(WINDOW, config.max_position_embeddings)
    for device in places:
        for dtype in device.dtypes:
            shared = (device.engine, device.device, dtype)
            packed = config.quantization is not None and device.engine != "mlx"
            for length in lengths:
                nbytes = inference_bytes(config, length, BATCH, dtype, device)
                said = "quantised weights are MLX's" if packed else band(nbytes, device.memory_total)
                yield Need(*shared, "inference", length, BATCH, 0 if packed else nbytes, device.memory_total, said)
            for method, settings in METHODS.items():
                refused = "quantised weights are MLX's" if packed else _refusal(config, settings)
                told = estimate(config, settings, BATCH, window, dtype, device)
                said = refused or band(told.total, device.memory_total)
                nbytes = 0 if refused else told.total
                yield Need(*shared, method, window, BATCH, nbytes, device.memory_total, said)


def needs_figure(name: str, config: Gemma3Config, places: Sequence[DeviceInfo]) -> Figure:
    """A table of all uses for each engine."""
    whole, bare = config.parameter_count(), config.parameter_count(embeddings=False)
    kind = "bfloat16" if config.quantization is None else f"{config.quantization.bits} bits"
    notes = [f"{whole:,} parameters, {whole - bare:,} are embeddings; {bytes_text(config.weight_bytes(2))} in {kind}"]
    notes += [f"{d.engine} on {d.device}: {bytes_text(d.memory_total)} of memory" for d in places]
    found = list(needs(config, places))
    tables = [
        Table(device.engine, ("engine", "dtype", "use", "batch x tokens", "memory", "here"), [
            (n.engine, n.dtype, n.use, f"{n.batch} x {n.length:,}", bytes_text(n.nbytes) if n.nbytes else "", n.verdict)
            for n in found if n.engine == device.engine
        ])
        for device in places
    ]  # fmt: skip
    facts = {"model": name, "parameters": whole, "needs": [asdict(need) for need in found]}
    return Figure(f"what {name} needs here", notes, tables=tables, facts=facts)


def _refusal(config: Gemma3Config, settings: TrainingSettings) -> str:
    try:
        check_trainable(config, settings, adapted=False)
    except UnsupportedError:
        return "not on quantised weights"
    return ""
