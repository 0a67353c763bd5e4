"""Low-rank adapters on disk: PEFT's layout, mlx-lm's beside it, and how the two relate.

PEFT keeps ``lora_A [rank, in]`` and ``lora_B [out, rank]`` and multiplies by alpha / rank; mlx-lm keeps the transposes
and multiplies by ``scale`` directly. Where in = out a factor that was not transposed would load all the same, and
compute another function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from engines.base import LoRASettings
from engines.checkpoints import as_float32, read_array, read_header, write_arrays, write_json
from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import Gemma3Config

PEFT_PREFIX = "base_model.model."
MLX_FOLDER = "mlx-lm"

Factors = dict[str, tuple[np.ndarray, np.ndarray]]
"""``lora_A`` and ``lora_B``, float32, by the module's name, for example ``model.layers.0.self_attn.q_proj``."""


def target_modules(config: Gemma3Config, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Names and ``(out, in)`` shapes of the linears that ``targets`` names, layer by layer.

    Raises:
        UnsupportedError: a target is no linear of Gemma-3.
    """
    shapes = config.linear_shapes()
    known = {path.split(".")[-1] for path in shapes}
    for target in targets:
        if target not in known:
            raise UnsupportedError(f"target {target!r} is no linear of Gemma-3: choose from {', '.join(sorted(known))}")
    return {
        f"model.layers.{i}.{path}": shape
        for i in range(config.num_hidden_layers)
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
    (folder / MLX_FOLDER).mkdir(parents=True, exist_ok=True)
    peft, mlx = {}, {}
    for module, (lora_a, lora_b) in factors.items():
        peft[f"{PEFT_PREFIX}{module}.lora_A.weight"] = lora_a
        peft[f"{PEFT_PREFIX}{module}.lora_B.weight"] = lora_b
        mlx[f"{module}.lora_a"] = np.ascontiguousarray(lora_a.T)
        mlx[f"{module}.lora_b"] = np.ascontiguousarray(lora_b.T)
    write_arrays(folder / "adapter_model.safetensors", peft)
    write_json(folder / "adapter_config.json", _peft_config(settings, base))
    write_arrays(folder / MLX_FOLDER / "adapters.safetensors", mlx)
    write_json(folder / MLX_FOLDER / "adapter_config.json", _mlx_config(settings, config, base))


def read_adapter(folder: Path, config: Gemma3Config) -> tuple[Factors, LoRASettings]:
    """Read a PEFT adapter for a model of this config.

    Raises:
        CheckpointError: files are missing or broken, or a factor does not fit the model.
        UnsupportedError: the adapter is of a kind that is not plain LoRA.
    """
    settings = _read_peft_config(folder / "adapter_config.json")
    arrays = {name: as_float32(read_array(t)) for name, t in read_header(folder / "adapter_model.safetensors").items()}
    factors: Factors = {}
    for module, (out, inner) in target_modules(config, settings.targets).items():
        lora_a = arrays.pop(f"{PEFT_PREFIX}{module}.lora_A.weight", None)
        lora_b = arrays.pop(f"{PEFT_PREFIX}{module}.lora_B.weight", None)
        if lora_a is None or lora_b is None:
            raise CheckpointError(f"{folder} has no factors for {module}: it was made for another model")
        if lora_a.shape != (settings.rank, inner) or lora_b.shape != (out, settings.rank):
            raise CheckpointError(f"{folder}: the factors of {module} do not fit this model; load the model it names")
        factors[module] = (lora_a, lora_b)
    if arrays:
        raise CheckpointError(
            f"{folder} has {next(iter(arrays))[:80]!r}, which this model does not: load its own model"
        )
    return factors, settings


def _peft_config(settings: LoRASettings, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _mlx_config(settings: LoRASettings, config: Gemma3Config, base: str) -> dict[str, Any]:
    paths = [path for path in config.linear_shapes() if path.split(".")[-1] in settings.targets]
    scale = settings.scale
    return {
        "model": base,
        "fine_tune_type": "lora",
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": settings.rank, "scale": scale, "dropout": settings.dropout, "keys": paths},
    }


def adapter_base(folder: Path) -> str:
    """The model that an adapter was trained on, as its config names it.

    Raises:
        CheckpointError: the config is missing or broken, or names none.
    """
    base = _adapter_config(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder} names no base model: load that model, and the adapter onto it")
    return base


def _adapter_config(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: name a folder that holds a PEFT adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): fetch the adapter again") from None
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} is not a JSON object: fetch the adapter again")
    return raw


def _read_peft_config(path: Path) -> LoRASettings:
    raw = _adapter_config(path)
    if raw.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path} is no LoRA adapter: only peft_type LORA is supported")
    for key in (
        "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
        "layer_replication", "alora_invocation_tokens",
    ):  # fmt: skip
        if raw.get(key):
            raise UnsupportedError(f"{path}: {key} is set; only one plain rank for all layers is supported")
    if raw.get("bias", "none") != "none" or raw.get("fan_in_fan_out"):
        raise UnsupportedError(f"{path}: bias or fan_in_fan_out is set, which Gemma-3's linears do not have")
    if raw.get("init_lora_weights") not in (True, False, None, "gaussian"):
        raise UnsupportedError(f"{path}: init_lora_weights {raw['init_lora_weights']!r:.40} changes the base weights")
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if type(rank) is not int or not 0 < rank <= 65536:
        raise CheckpointError(f"{path} has no valid r: fetch the adapter again")
    if not _within(alpha, -1e6, 1e6):
        raise CheckpointError(f"{path} has no valid lora_alpha: fetch the adapter again")
    if not isinstance(targets, list) or not all(
        isinstance(t, str) and re.fullmatch(r"[\w.]{1,80}", t) for t in targets
    ):
        raise UnsupportedError(f"{path}: target_modules must be a list of module names")
    dropout = raw.get("lora_dropout", 0.0)
    if not _within(dropout, 0, 0.999):
        raise CheckpointError(f"{path} has no valid lora_dropout: fetch the adapter again")
    return LoRASettings(rank, float(alpha), float(dropout), tuple(targets))


def _within(value: Any, low: float, high: float) -> TypeGuard[float]:
    return type(value) in (int, float) and low <= value <= high
