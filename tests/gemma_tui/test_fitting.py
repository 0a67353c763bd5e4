"""``models fit``: sizes known by name, needs by engine and method, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.base import DeviceInfo
from engines.checkpoints import write_json
from engines.gemma3 import Quantization
from engines.official import OFFICIAL, official_config
from gemma_tui import paths
from gemma_tui.cli import USAGE
from gemma_tui.studies.estimate import inference_bytes
from gemma_tui.studies.fitting import needs

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
CPU = DeviceInfo("torch", "cpu", "1", ("float32",), 24 * 10**9)
MLX = DeviceInfo("mlx", "metal", "1", ("bfloat16",), 24 * 10**9)

COUNTS = {
    "gemma-3-270m": (167_772_160, 100_326_016, 268_098_176),
    "gemma-3-1b": (301_989_888, 697_896_064, 999_885_952),
    "gemma-3-4b": (671_252_480, 3_209_010_688, 3_880_263_168),
    "gemma-3-12b": (1_006_878_720, 10_759_155_456, 11_766_034_176),
    "gemma-3-27b": (1_409_630_208, 25_599_716_096, 27_009_346_304),
}
"""Embeddings, the rest and all, as the official configs and arXiv:2503.19786, table 1, give them."""
CACHE = {"gemma-3-270m": 1024, "gemma-3-1b": 1024, "gemma-3-4b": 4096, "gemma-3-12b": 8192, "gemma-3-27b": 8192}
"""Bytes of keys and values per token and layer in bfloat16."""
GLOBAL_LAYERS = {"gemma-3-270m": 3, "gemma-3-1b": 4, "gemma-3-4b": 5, "gemma-3-12b": 8, "gemma-3-27b": 10}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_sizes_are_those_of_the_report(name: str) -> None:
    config = official_config(name)
    embeddings, rest, whole = COUNTS[name]
    assert config.parameter_count(embeddings=False) == rest
    assert config.parameter_count() == whole == embeddings + rest
    assert config.weight_bytes(2) == 2 * whole
    assert len(config.global_layers) == GLOBAL_LAYERS[name]
    grown = config.cache_bytes(60 * 512, 2) - config.cache_bytes(40 * 512, 2)
    assert grown == 20 * 512 * GLOBAL_LAYERS[name] * CACHE[name]


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_model_is_told_by_its_name_alone(name: str, command: Commands) -> None:
    code, rows, error = command("models", "fit", name)
    assert code == 0, error
    assert rows[0]["parameters"] == COUNTS[name][2]
    told = [row for row in rows if row["kind"] == "need"]
    assert {row["use"] for row in told} >= {"inference", "lora", "relora", "rank1", "full"}
    assert {row["engine"] for row in told} == {"torch", "mlx"}


def test_longer_texts_and_larger_methods_need_more() -> None:
    told = {(need.use, need.length): need for need in needs(official_config("gemma-3-4b"), [CPU])}
    at = [told["inference", length].nbytes for length in (512, 2048, 8192, 32_768, 131_072)]
    assert at == sorted(at)
    assert told["full", 512].nbytes > told["rank1", 512].nbytes
    assert told["full", 512].verdict == "too large"
    assert told["inference", 512].verdict == "fits"
    # 5 global layers keep all: 2 x 4 x 256 floats a token. 512 tokens read at a time have a mask, as bytes and floats.
    assert at[4] - at[3] == (131_072 - 32_768) * (5 * 2 * 4 * 256 * 4 + 512 * 5)


def test_packed_weights_take_less_and_learn_only_adapters() -> None:
    config = official_config("gemma-3-1b")
    packed = replace(config, quantization=Quantization(4, 64))
    told = {need.use: need for need in needs(packed, [MLX]) if need.length == 512}
    assert told["inference"].nbytes < 0.4 * inference_bytes(config, 512, 1, "bfloat16", MLX)
    assert told["lora"].verdict == "fits"
    assert (told["full"].nbytes, told["full"].verdict) == (0, "not on quantised weights")
    assert all(need.nbytes == 0 for need in needs(packed, [CPU]))


def test_a_config_file_is_enough(tmp_path: Path, command: Commands) -> None:
    write_json(tmp_path / "config.json", official_config("gemma-3-1b").to_dict())
    code, rows, _ = command("models", "fit", str(tmp_path / "config.json"))
    assert (code, rows[-1]["parameters"]) == (0, 999_885_952)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, error = command("models", "fit", str(tmp_path / "config.json"))
    assert (code, "llama" in error) == (1, True)


def test_a_model_here_comes_before_the_official_one_of_its_name(tiny: str, command: Commands) -> None:
    mine = command("models", "fit", tiny)[1][0]["parameters"]
    (paths.models() / tiny).rename(paths.models() / "gemma-3-1b")
    code, rows, _ = command("models", "fit", "gemma-3-1b")
    assert (code, rows[0]["parameters"]) == (0, mine)
    tree = [row["parameters"] for row in command("models", "tree", "gemma-3-1b")[1] if row.get("name") == "model"]
    assert tree == [mine]
    (paths.models() / "gemma-3-1b" / "config.json").write_text("{")
    assert command("models", "fit", "gemma-3-1b")[0] != 0


def test_an_unknown_name_names_the_known_ones(command: Commands) -> None:
    code, _, error = command("models", "fit", "gemma-3-5b")
    assert (code, "gemma-3-27b" in error) == (USAGE, True)


UNKNOWN = {"no user": "~no-such-user/x", "no home": "~no-such-user/config.json", "long": f"{'x' * 5000}/config.json"}


@pytest.mark.parametrize("name", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("verb", ["fit", "tree"])
def test_a_path_that_cannot_be_is_one_line(verb: str, name: str, command: Commands) -> None:
    code, _, error = command("models", verb, name)
    assert (code, error.count("\n"), "no model" in error) == (USAGE, 1, True)
