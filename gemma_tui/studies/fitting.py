"""What a model needs on this machine, from its config alone: to be read with, and to be trained by each method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

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

CONTEXT = 2048
"""Tokens, at most, of the inference that is told of a model among its facts."""

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
    for device in places:
        for dtype in device.dtypes:
            yield from (_reading(config, device, dtype, length) for length in _lengths(config))
            yield from (_training(config, device, dtype, method) for method in METHODS)


def main_needs(config: Gemma3Config) -> list[Need]:
    """What is told of a model among its facts, with no engine at hand: the least of ``needs`` on the CPU here, float32.

    Packed weights are MLX's, and take no updates.
    """
    engine = "torch" if config.quantization is None else "mlx"
    device = DeviceInfo(engine, "cpu", "", ("float32",), psutil.virtual_memory().total)
    reading = _reading(config, device, "float32", max(n for n in _lengths(config) if n <= CONTEXT))
    training = [_training(config, device, "float32", method) for method in ("lora", "full")]
    return [reading, *(need for need in training if need.nbytes)]


def use_of(need: Need) -> str:
    """What a need is for, on what, in words."""
    what = need.use if need.use == "inference" else f"{need.use} training"
    return f"{what} of {need.batch} x {need.length:,} tokens, {need.dtype} on {need.device}"


def memory_lines(config: Gemma3Config) -> list[tuple[str, str]]:
    """``main_needs`` as lines of a model's facts."""
    return [("memory", f"{bytes_text(need.nbytes)} for {use_of(need)}: {need.verdict}") for need in main_needs(config)]


def _lengths(config: Gemma3Config) -> list[int]:
    """Those that the model takes; of one that takes none of them its longest."""
    longest = config.max_position_embeddings
    return [length for length in LENGTHS if length <= longest] or [longest]


def _reading(config: Gemma3Config, device: DeviceInfo, dtype: str, length: int) -> Need:
    refused = _unreadable(config, device)
    nbytes = 0 if refused else inference_bytes(config, length, BATCH, dtype, device)
    return _need(device, dtype, "inference", length, nbytes, refused)


def _training(config: Gemma3Config, device: DeviceInfo, dtype: str, method: str) -> Need:
    window, settings = min(WINDOW, config.max_position_embeddings), METHODS[method]
    refused = _unreadable(config, device) or _refusal(config, settings)
    nbytes = 0 if refused else estimate(config, settings, BATCH, window, dtype, device).total
    return _need(device, dtype, method, window, nbytes, refused)


def _need(device: DeviceInfo, dtype: str, use: str, length: int, nbytes: int, refused: str) -> Need:
    available = device.memory_total
    said = refused or band(nbytes, available)
    return Need(device.engine, device.device, dtype, use, length, BATCH, nbytes, available, said)


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


def _unreadable(config: Gemma3Config, device: DeviceInfo) -> str:
    return "quantised weights are MLX's" if config.quantization is not None and device.engine != "mlx" else ""


def _refusal(config: Gemma3Config, settings: TrainingSettings) -> str:
    try:
        check_trainable(config, settings, adapted=False)
    except UnsupportedError:
        return "not on quantised weights"
    return ""
