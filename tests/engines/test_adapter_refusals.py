"""Adapters that are neither LoRA nor DoRA, or broken, are refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import refusal

from engines.adapters import read_adapter
from engines.base import Engine
from engines.checkpoints import read_array, read_header, write_arrays, write_safetensors
from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import MAX_CONFIG_BYTES, Gemma3Config

TinyFolder = Callable[..., Path]
Tokens = Callable[..., np.ndarray]


def change(folder: Path, **terms: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | terms))
    return folder


@pytest.mark.parametrize(
    "terms",
    [
        {"peft_type": "LOHA"},
        {"peft_type": "IA3"},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": None},
        {"use_dora": True},
        {"use_dora": "yes"},
        {"use_rslora": 2},
        {"rank_pattern": {"q_proj": 8}},
        {"rank_pattern": {".*": 3, "(a+)+$": 8}},
        {"rank_pattern": [3]},
        {"alpha_pattern": {"q_proj": 8}},
        {"layers_to_transform": [0, 1, 2, 3]},
        {"layers_to_transform": [-1]},
        {"layers_to_transform": [0.5]},
        {"layers_to_transform": "all"},
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        {"modules_to_save": ["embed_tokens"]},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [1, 2]},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "x" * 100_000},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": [["q_proj"]]},
        {"target_modules": ["\x1b[2J"]},
        {"r": 0},
        {"r": -3},
        {"r": 3.0},
        {"r": True},
        {"r": 1 << 70},
        {"lora_alpha": None},
        {"lora_alpha": "5"},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_dropout": 5.0},
        {"lora_dropout": -0.1},
        {"lora_dropout": float("nan")},
        {"lora_dropout": True},
        {"lora_dropout": "0.1"},
    ],
    ids=lambda terms: str(terms)[:50],
)
def test_a_config_that_is_not_plain_lora_is_refused(adapter: Path, config: Gemma3Config, terms: dict[str, Any]) -> None:
    refusal(change(adapter, **terms), config)


def test_an_adapter_on_other_modules_than_the_seven_linears_is_refused(adapter: Path, config: Gemma3Config) -> None:
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        read_adapter(change(adapter, target_modules=["q_proj", "embed_tokens"]), config)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "[" * 100_000, '{"r":' * 100_000, '{"r": ' + "9" * 5000 + "}", b'{"peft_type": "\xff"}'],
    ids=["empty", "list", "null", "cut", "lists", "objects", "5000 digits", "not UTF-8"],
)
def test_a_file_that_is_no_adapter_config_is_refused(adapter: Path, config: Gemma3Config, text: str | bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refusal(adapter, config)


def test_a_config_without_an_end_is_not_read(adapter: Path, config: Gemma3Config) -> None:
    path = adapter / "adapter_config.json"
    path.write_bytes(path.read_bytes() + b" " * MAX_CONFIG_BYTES)
    refusal(adapter, config)
    path.unlink()
    os.mkfifo(path)
    refusal(adapter, config)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, config: Gemma3Config, name: str) -> None:
    (adapter / name).unlink()
    assert name in refusal(adapter, config)


def test_pickled_factors_are_not_read(adapter: Path, config: Gemma3Config) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.safetensors" in refusal(adapter, config)


def with_factors(adapter: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> Path:
    path = adapter / "adapter_model.safetensors"
    arrays = {name: read_array(tensor) for name, tensor in read_header(path).items()}
    edit(arrays)
    write_arrays(path, arrays)
    return adapter


A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def test_packed_factors_are_refused(adapter: Path, config: Gemma3Config) -> None:
    path = adapter / "adapter_model.safetensors"
    stored = read_header(path)
    arrays = [(n, read_array(t).astype(np.uint32) if n == A else read_array(t)) for n, t in stored.items()]
    shapes = {name: ("U32" if name == A else tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    write_safetensors(path, arrays, shapes)
    assert "is U32" in refusal(adapter, config)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda arrays: arrays.pop(A), "model.layers.1.mlp.up_proj"),
        (lambda arrays: arrays.update({A: arrays[A].T.copy()}), "model.layers.1.mlp.up_proj"),
        (lambda arrays: arrays.update({A: arrays[A][:2].copy()}), "model.layers.1.mlp.up_proj"),
        (lambda arrays: arrays.update({A.replace(".1.", ".7."): arrays[A]}), "model.layers.7"),
        (lambda arrays: arrays.update({A.replace("lora_A", "lora_magnitude_vector"): arrays[A]}), "magnitude"),
        (lambda arrays: arrays.update({"\x1b]0;title\x07": arrays[A]}), "title"),
    ],
    ids=["one missing", "one transposed", "another rank", "one layer more", "dora", "escape sequence"],
)
def test_factors_that_do_not_fit_are_refused(
    adapter: Path, config: Gemma3Config, edit: Callable[[dict[str, np.ndarray]], object], named: str
) -> None:
    assert named in refusal(with_factors(adapter, edit), config)


def test_an_adapter_of_another_model_is_refused(adapter: Path, four_to_one: Gemma3Config) -> None:
    refusal(adapter, four_to_one)


def test_a_refused_adapter_leaves_the_model_as_it_was(
    engine: Engine, folder: Path, adapter: Path, tokens: Tokens
) -> None:
    engine.load(folder, "float32")
    expected = engine.logits(tokens(6))
    with pytest.raises(CheckpointError):
        engine.load_adapter(with_factors(adapter, lambda arrays: arrays.pop(A)))
    np.testing.assert_array_equal(engine.logits(tokens(6)), expected)
