"""``adapter_config.json`` in PEFT's and in mlx-lm's words; both files have this name and share no key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from engines.errors import CheckpointError, UnsupportedError
from engines.foreign_json import read_file
from engines.gemma3 import MAX_CONFIG_BYTES, Gemma3Config
from engines.training import LINEARS, LoRASettings

CONFIG = "adapter_config.json"
MAX_RANK = 65536
MAX_ALPHA = 1e6
MLX_FACTOR = re.compile(r"model\.layers\.(\d{1,5})\.(?:self_attn|mlp)\.(\w{1,40})\.(?:lora_a|lora_b|m)")


def read_config_file(folder: Path) -> Mapping[str, Any]:
    """The JSON object of an adapter's config.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(read_file(path, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: name a folder that holds an adapter of PEFT or mlx-lm") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): fetch the adapter again") from None
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} is not a JSON object: fetch the adapter again")
    return raw


def peft_config(settings: LoRASettings, base: str) -> dict[str, Any]:
    """What PEFT needs to load an adapter of these settings; ``base`` names its model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "layers_to_transform": None if settings.layers is None else list(settings.layers),
        "layers_pattern": None if settings.layers is None else "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }


def mlx_config(settings: LoRASettings, config: Gemma3Config, base: str) -> dict[str, Any]:
    """What mlx-lm needs to load an adapter of these settings; ``base`` names its model.

    ``num_layers`` counts from the last block, and ``keys`` are names inside each of those blocks, or names in the whole
    model. So the last n layers, which is what mlx-lm itself trains, are written by number, and any others by name.
    """
    count = config.num_hidden_layers
    layers = list(range(count)) if settings.layers is None else sorted(settings.layers)
    paths = [path for path in config.linear_shapes() if path.split(".")[-1] in settings.targets]
    if layers == list(range(count - len(layers), count)):
        keys, number = paths, len(layers)
    else:
        keys, number = [f"model.layers.{i}.{path}" for i in layers for path in paths], count
    return {
        "model": base,
        "fine_tune_type": "dora" if settings.dora else "lora",
        "num_layers": number,
        "lora_parameters": {
            "rank": settings.rank, "scale": settings.scale, "dropout": settings.dropout, "keys": keys,
        },
    }  # fmt: skip


def peft_settings(folder: Path) -> LoRASettings:
    """The settings of a PEFT adapter.

    Raises:
        CheckpointError: the config is missing or broken.
        UnsupportedError: it asks for something that ``LoRASettings`` cannot say.
    """
    raw, path = read_config_file(folder), folder / CONFIG
    if raw.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path} is no LoRA adapter: only peft_type LORA is supported")
    for key in ("modules_to_save", "layer_replication", "alora_invocation_tokens"):
        if raw.get(key):
            raise UnsupportedError(f"{path}: {key} is set, which is not supported: only adapters of linears are")
    if raw.get("bias", "none") != "none" or raw.get("fan_in_fan_out"):
        raise UnsupportedError(f"{path}: bias or fan_in_fan_out is set, which Gemma-3's linears do not have")
    if raw.get("init_lora_weights") not in (True, False, None, "gaussian"):
        raise UnsupportedError(f"{path}: init_lora_weights {raw['init_lora_weights']!r:.40} changes the base weights")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not all(
        isinstance(t, str) and re.fullmatch(r"[\w.]{1,80}", t) for t in targets
    ):
        raise UnsupportedError(f"{path}: target_modules must be a list of module names")
    rank = _uniform(raw, path, "rank_pattern", targets, raw.get("r"))
    alpha = _uniform(raw, path, "alpha_pattern", targets, raw.get("lora_alpha"))
    rank, dropout = _rank(rank, path, "r"), _dropout(raw.get("lora_dropout", 0.0), path, "lora_dropout")
    if not _within(alpha, -MAX_ALPHA, MAX_ALPHA):
        raise CheckpointError(f"{path} has no valid lora_alpha: fetch the adapter again")
    flags = [_flag(raw, path, key) for key in ("use_rslora", "use_dora")]
    return LoRASettings(rank, float(alpha), dropout, tuple(targets), _peft_layers(raw, path), *flags)


def mlx_settings(folder: Path, names: Iterable[str]) -> LoRASettings:
    """The settings of an mlx-lm adapter; which linears of which layers it has, its tensors say.

    Args:
        names: of its tensors, as in ``Gemma3ForCausalLM``.

    Raises:
        CheckpointError: the config is missing or broken.
        UnsupportedError: it is a full fine-tune, or has other linears in one layer than in another.
    """
    raw, path = read_config_file(folder), folder / CONFIG
    kind, terms = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(f"{path}: fine_tune_type {kind!r:.40} is no adapter: only lora and dora are")
    if not isinstance(terms, Mapping):
        raise CheckpointError(f"{path} has no lora_parameters: fetch the adapter again")
    rank, dropout = _rank(terms.get("rank"), path, "rank"), _dropout(terms.get("dropout", 0.0), path, "dropout")
    scale = terms.get("scale")
    if not _within(scale, -MAX_ALPHA / rank, MAX_ALPHA / rank):
        raise CheckpointError(f"{path} has no valid scale: fetch the adapter again")
    layers: dict[int, set[str]] = {}
    for name in names:
        found = MLX_FACTOR.fullmatch(name)
        if found is None:
            raise UnsupportedError(f"{folder} has {name[:80]!r}, which is no factor of a linear of Gemma-3")
        layers.setdefault(int(found[1]), set()).add(found[2])
    if not layers:
        raise CheckpointError(f"{folder} holds no factors: fetch the adapter again")
    targets = next(iter(layers.values()))
    if any(some != targets for some in layers.values()):
        raise UnsupportedError(f"{folder} adapts other linears in one layer than in another: only alike ones are read")
    ordered = sorted(targets, key=lambda t: (LINEARS.index(t) if t in LINEARS else len(LINEARS), t))
    return LoRASettings(rank, scale * rank, dropout, tuple(ordered), tuple(sorted(layers)), dora=kind == "dora")


def _uniform(raw: Mapping[str, Any], path: Path, key: str, targets: list[str], plain: Any) -> Any:
    """The one value of a pattern that changes nothing, or that gives all targets the same; else it is refused."""
    pattern = raw.get(key)
    if not pattern:
        return plain
    values = list(pattern.values()) if isinstance(pattern, Mapping) else []
    if values and all(value == plain for value in values):
        return plain
    if values and set(pattern) == set(targets) and all(value == values[0] for value in values):
        return values[0]
    raise UnsupportedError(f"{path}: {key} is set; only one rank and one alpha for all linears are supported")


def _peft_layers(raw: Mapping[str, Any], path: Path) -> tuple[int, ...] | None:
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise UnsupportedError(f"{path}: layers_pattern is set to something else than Gemma-3's `layers`")
    listed = [layers] if type(layers) is int else layers
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < MAX_RANK for i in listed):
        raise CheckpointError(f"{path} has no valid layers_to_transform: fetch the adapter again")
    return tuple(sorted(set(listed)))


def _rank(value: Any, path: Path, key: str) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise CheckpointError(f"{path} has no valid {key}: fetch the adapter again")
    return value


def _dropout(value: Any, path: Path, key: str) -> float:
    if not _within(value, 0, 0.999):
        raise CheckpointError(f"{path} has no valid {key}: fetch the adapter again")
    return float(value)


def _flag(raw: Mapping[str, Any], path: Path, key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False):
        raise CheckpointError(f"{path}: {key} is neither true nor false: fetch the adapter again")
    return bool(value)


def _within(value: Any, low: float, high: float) -> TypeGuard[float]:
    return type(value) in (int, float) and low <= value <= high
