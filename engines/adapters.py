"""Low-rank adapters on disk: PEFT's layout, mlx-lm's beside it, and how the two relate.

PEFT keeps ``lora_A [rank, in]`` and ``lora_B [out, rank]`` and multiplies by alpha / rank (or alpha / √rank); mlx-lm
keeps the transposes and multiplies by ``scale`` directly. Where in = out a factor that was not transposed would load
all the same, and compute another function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engines.adapter_configs import CONFIG, mlx_config, mlx_settings, peft_config, peft_settings, read_config_file
from engines.checkpoints import (
    StoredTensor,
    as_float32,
    read_array,
    read_header,
    text_model_name,
    write_arrays,
    write_json,
)
from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.training import LoRASettings

PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
MLX_FOLDER = "mlx-lm"
MAGNITUDE = "lora_magnitude_vector"
MLX_LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B", "m": MAGNITUDE}


@dataclass(frozen=True)
class LowRank:
    """What an adapter keeps for one linear, float32.

    Attributes:
        lora_A: ``[rank, in]``.
        lora_B: ``[out, rank]``.
        magnitude: ``[out]``, the length of each row of the adapted weight; DoRA only.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    magnitude: np.ndarray | None = None


Factors = dict[str, LowRank]
"""An adapter by the modules' names, for example ``model.layers.0.self_attn.q_proj``."""


def target_modules(
    config: Gemma3Config, targets: tuple[str, ...], layers: tuple[int, ...] | None = None
) -> dict[str, tuple[int, int]]:
    """Names and ``(out, in)`` shapes of the linears that ``targets`` names, layer by layer.

    Args:
        layers: which layers; None for all.

    Raises:
        UnsupportedError: a target is no linear of Gemma-3, or the model has no such layer.
    """
    shapes, count = config.linear_shapes(), config.num_hidden_layers
    known = {path.split(".")[-1] for path in shapes}
    for target in targets:
        if target not in known:
            raise UnsupportedError(f"target {target!r} is no linear of Gemma-3: choose from {', '.join(sorted(known))}")
    chosen = range(count) if layers is None else sorted(layers)
    for i in chosen:
        if not 0 <= i < count:
            raise UnsupportedError(f"the model has no layer {i}: choose from 0 to {count - 1}")
    return {
        f"model.layers.{i}.{path}": shape
        for i in chosen
        for path, shape in shapes.items()
        if path.split(".")[-1] in targets
    }


def write_adapter(folder: Path, factors: Factors, settings: LoRASettings, config: Gemma3Config, base: str) -> None:
    """Write a PEFT adapter to ``folder`` and the same for mlx-lm to ``folder/mlx-lm``.

    Args:
        base: what ``base_model_name_or_path`` names.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    write_peft(folder, factors, settings, base)
    write_mlx(folder / MLX_FOLDER, factors, settings, config, base)


def write_peft(folder: Path, factors: Factors, settings: LoRASettings, base: str) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT 0.21 reads them.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    arrays = {}
    for module, low_rank in factors.items():
        arrays[f"{PEFT_PREFIX}{module}.lora_A.weight"] = low_rank.lora_A
        arrays[f"{PEFT_PREFIX}{module}.lora_B.weight"] = low_rank.lora_B
        if low_rank.magnitude is not None:
            arrays[f"{PEFT_PREFIX}{module}.{MAGNITUDE}"] = low_rank.magnitude
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / PEFT_WEIGHTS, arrays)
    write_json(folder / CONFIG, peft_config(settings, base))


def write_mlx(folder: Path, factors: Factors, settings: LoRASettings, config: Gemma3Config, base: str) -> None:
    """Write ``adapters.safetensors`` and ``adapter_config.json`` as mlx-lm 0.32 reads them.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    arrays = {}
    for module, low_rank in factors.items():
        arrays[f"{module}.lora_a"] = np.ascontiguousarray(low_rank.lora_A.T)
        arrays[f"{module}.lora_b"] = np.ascontiguousarray(low_rank.lora_B.T)
        if low_rank.magnitude is not None:
            arrays[f"{module}.m"] = low_rank.magnitude
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / MLX_WEIGHTS, arrays)
    write_json(folder / CONFIG, mlx_config(settings, config, base))


def read_adapter(folder: Path, config: Gemma3Config) -> tuple[Factors, LoRASettings]:
    """Read an adapter of PEFT or of mlx-lm, whichever is there, for a model of this config.

    Raises:
        CheckpointError: files are missing or broken, or a factor does not fit the model.
        UnsupportedError: the adapter is of a kind that ``LoRASettings`` cannot describe.
    """
    settings, stored = read_settings(folder), _stored(folder)
    if settings.layers and settings.layers[-1] >= config.num_hidden_layers:
        raise CheckpointError(f"{folder} adapts layer {settings.layers[-1]}, which this model does not have")
    if settings.layers == tuple(range(config.num_hidden_layers)):
        settings = replace(settings, layers=None)
    factors: Factors = {}
    for module, (out, inner) in target_modules(config, settings.targets, settings.layers).items():
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (settings.rank, inner), "lora_B": (out, settings.rank)}
        if settings.dora:
            shapes[MAGNITUDE] = (out,)
        arrays = []
        for leaf, shape in shapes.items():
            if (tensor := stored.pop(f"{module}.{leaf}", None)) is None:
                raise CheckpointError(f"{folder} has no {leaf} for {module}: it was made for another model")
            array = as_float32(read_array(tensor))
            # The names of mlx-lm's factors are in lower case, and they are the transposes.
            arrays.append(np.ascontiguousarray(array.T) if tensor.name.endswith((".lora_a", ".lora_b")) else array)
            if arrays[-1].shape != shape:
                raise CheckpointError(
                    f"{folder}: the factors of {module} do not fit this model; load the model it names"
                )
        factors[module] = LowRank(*arrays)
    if stored:
        raise CheckpointError(
            f"{folder} has {next(iter(stored))[:80]!r}, which this model does not: load its own model"
        )
    return factors, settings


def read_settings(folder: Path) -> LoRASettings:
    """What kind of adapter a folder holds; of an mlx-lm adapter ``layers`` is always told.

    Raises:
        CheckpointError: files are missing or broken.
        UnsupportedError: the adapter is of a kind that ``LoRASettings`` cannot describe.
    """
    if _is_mlx(folder):
        return mlx_settings(folder, (text_model_name(name) or name for name in read_header(folder / MLX_WEIGHTS)))
    return peft_settings(folder)


def adapter_base(folder: Path) -> str:
    """The model that an adapter was trained on, as its config names it.

    Raises:
        CheckpointError: the config is missing or broken, or names none.
    """
    base = read_config_file(folder).get("model" if _is_mlx(folder) else "base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder} names no base model: load that model, and the adapter onto it")
    return base


def _is_mlx(folder: Path) -> bool:
    return (folder / MLX_WEIGHTS).is_file() and not (folder / PEFT_WEIGHTS).is_file()


def _stored(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of an adapter by ``module.lora_A``, ``module.lora_B`` and ``module.lora_magnitude_vector``."""
    if _is_mlx(folder):
        header, rename = read_header(folder / MLX_WEIGHTS), _name_from_mlx
    else:
        header, rename = read_header(folder / PEFT_WEIGHTS), _name_from_peft
    stored = {rename(name): tensor for name, tensor in header.items()}
    if len(stored) != len(header):
        raise CheckpointError(f"{folder} has two tensors for one factor: fetch the adapter again")
    return stored


def _name_from_peft(name: str) -> str:
    bare = name.removeprefix(PEFT_PREFIX)
    if bare.endswith((".lora_A.weight", ".lora_B.weight")):
        bare = bare.removesuffix(".weight")
    return text_model_name(bare) or name


def _name_from_mlx(name: str) -> str:
    module, _, leaf = (text_model_name(name) or name).rpartition(".")
    return f"{module}.{MLX_LEAVES.get(leaf, leaf)}"
