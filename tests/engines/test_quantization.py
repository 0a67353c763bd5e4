"""Weights packed for MLX: mlx-lm reads what is written and computes the same; torch refuses; adapters lie beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engines.base import Engine, Sampling
from engines.checkpoints import ARRAYS, as_float32, iterate_model, read_array, read_header, write_arrays, write_json
from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import Gemma3Config, Quantization, parse_config, read_config, read_config_dict
from engines.quantization import Packed, iterate_dense, iterate_quantized, quantized_names
from engines.training import Batch, LoRASettings, Rank1Settings, TrainingSettings
from tests.conftest import TinyFolder, opened

FOUR = Quantization(4, 32)


@pytest.fixture
def mlx_engine() -> Engine:
    return opened("mlx")


@pytest.fixture
def even(two_to_one: Gemma3Config) -> Gemma3Config:
    """The MLP's 80 columns are cut into no groups of 32, so that down_proj stays plain."""
    return two_to_one


def packed_folder(engine: Engine, source: Path, target: Path, how: Quantization = FOUR, dtype: str = "float32") -> Path:
    target.mkdir()
    engine.quantise(source, target, read_config_dict(source), how, dtype)
    return target


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mlx_lm_reads_the_folder_and_has_its_logits(
    mlx_engine: Engine, even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path, tokens: Callable[..., np.ndarray],
    bits: int,
) -> None:  # fmt: skip
    from mlx_lm.utils import load_model

    folder = packed_folder(mlx_engine, tiny_folder(even), tmp_path / "packed", Quantization(bits, 32))
    model, config = load_model(folder)
    assert config["quantization"]["bits"] == bits
    ids = tokens(24)
    theirs = np.array(model(mx.array(ids)).astype(mx.float32))
    mlx_engine.load(folder, "float32")
    # √64 is exact in bfloat16, so that mlx-lm's rounding of the embedding's scale changes nothing.
    np.testing.assert_allclose(mlx_engine.logits(ids), theirs, rtol=0, atol=2e-3 * np.abs(theirs).max())


def test_mlx_lm_quantises_to_the_same_numbers(
    mlx_engine: Engine, even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model, quantize_model

    source = tiny_folder(even)
    model, config = load_model(source)
    model, _ = quantize_model(model, config, 32, 4)
    from mlx.utils import tree_flatten

    theirs = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    folder = packed_folder(mlx_engine, source, tmp_path / "packed")
    ours = {n: read_array(tensor, tuple(ARRAYS)) for n, tensor in read_header(folder / "model.safetensors").items()}
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], name)
    assert read_config(folder).quantization == FOUR


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_unpacked_numbers_are_those_of_mlx(bits: int) -> None:
    array = mx.random.normal((7, 128))
    weight, scales, biases = mx.quantize(array, group_size=64, bits=bits)
    expected = mx.dequantize(weight, scales, biases, group_size=64, bits=bits)
    packed = Packed(np.array(weight), np.array(scales), np.array(biases), Quantization(bits, 64))
    np.testing.assert_allclose(packed.unpacked(), np.array(expected), rtol=0, atol=1e-6)


def test_bytes_are_those_of_the_file(
    mlx_engine: Engine, even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = packed_folder(mlx_engine, tiny_folder(even), tmp_path / "packed", FOUR, "bfloat16")
    stored = sum(tensor.nbytes for tensor in read_header(folder / "model.safetensors").values())
    assert read_config(folder).weight_bytes(2) == stored


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_model_computes_as_what_its_numbers_mean(
    mlx_engine: Engine, even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path, tokens: Callable[..., np.ndarray],
    dtype: str,
) -> None:  # fmt: skip
    folder = packed_folder(mlx_engine, tiny_folder(even), tmp_path / "packed")
    config = read_config(folder)
    dense = tmp_path / "dense"
    dense.mkdir()
    write_arrays(dense / "model.safetensors", dict(iterate_dense(folder, config)))
    write_json(dense / "config.json", replace(config, quantization=None).to_dict())
    ids, seen = tokens(24), []
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy())
    for place in (folder, dense):
        mlx_engine.load(place, dtype)
        attribution = mlx_engine.inspect(ids[0]).attribution(9, 3)
        seen.append((
            mlx_engine.logits(ids), mlx_engine.log_probs(ids), np.array(mlx_engine.loss(batch) / 23),
            attribution.sources, mlx_engine.token_scores(ids).means,
        ))  # fmt: skip
    for ours, expected in zip(*seen, strict=True):
        tolerance = (2e-5 if dtype == "float32" else 0.1) * max(1, np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)
    mlx_engine.load(folder, "float32")
    packed = list(mlx_engine.generate([2, 5, 9], Sampling(max_tokens=12)))
    mlx_engine.load(dense, "float32")
    assert list(mlx_engine.generate([2, 5, 9], Sampling(max_tokens=12))) == packed


def test_lora_on_a_packed_model_learns_and_lies_beside_it(
    mlx_engine: Engine, even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path, tokens: Callable[..., np.ndarray]
) -> None:
    folder = packed_folder(mlx_engine, tiny_folder(even), tmp_path / "packed")
    before = dict(iterate_quantized(folder, read_config(folder)))
    mlx_engine.load(folder, "float32")
    ids = tokens(33, 2)
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy())
    mlx_engine.start_training(TrainingSettings(LoRASettings(4, 8)))
    losses = [mlx_engine.train_step([batch], 1e-2).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3
    logits = mlx_engine.logits(ids)
    name, update, norm = next(iter(mlx_engine.updates()))
    first = before[f"{name}.weight"]
    assert isinstance(first, Packed)
    assert norm == pytest.approx(np.linalg.norm(first.unpacked()), rel=1e-5)
    assert 0 < np.linalg.matrix_rank(update, tol=1e-4) <= 4
    mlx_engine.save_adapter(tmp_path / "adapter", str(folder))
    mlx_engine.load(folder, "float32")
    mlx_engine.load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(mlx_engine.logits(ids), logits, rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        mlx_engine.start_training(TrainingSettings(LoRASettings(4, 8)))
    with pytest.raises(UnsupportedError, match="keep the adapter"):
        mlx_engine.save_model(tmp_path / "whole", {})
    with pytest.raises(UnsupportedError, match="keep the adapter"):
        mlx_engine.merge("fresh", 0)


@pytest.mark.parametrize(
    "settings",
    [
        TrainingSettings(),
        TrainingSettings(rank1=Rank1Settings()),
        TrainingSettings(LoRASettings(2, 4), merging=True),
        TrainingSettings(LoRASettings(2, 4), rest=True),
    ],
)
def test_what_would_change_packed_weights_is_refused(
    mlx_engine: Engine, even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path, settings: TrainingSettings
) -> None:
    mlx_engine.load(packed_folder(mlx_engine, tiny_folder(even), tmp_path / "packed"), "float32")
    with pytest.raises(UnsupportedError, match="4 bits take no updates"):
        mlx_engine.start_training(settings)


def test_torch_refuses_with_the_remedy(
    both_engines: tuple[Engine, Engine], even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    torch, mlx = both_engines
    source = tiny_folder(even)
    folder = packed_folder(mlx, source, tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="--engine mlx"):
        torch.load(folder)
    with pytest.raises(UnsupportedError, match="--engine mlx"):
        torch.quantise(source, tmp_path, {}, FOUR)


def test_a_model_is_quantised_once_and_only_in_even_groups(
    mlx_engine: Engine, even: Gemma3Config, four_to_one: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    assert "model.layers.0.mlp.down_proj" not in quantized_names(even, FOUR)
    folder = packed_folder(mlx_engine, tiny_folder(even), tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="4 bits already"):
        packed_folder(mlx_engine, folder, tmp_path / "twice")
    with pytest.raises(UnsupportedError, match="evenly into groups of 128"):
        packed_folder(mlx_engine, tiny_folder(four_to_one), tmp_path / "uneven", Quantization(4, 128))


def test_tensors_that_do_not_fit_are_refused(
    mlx_engine: Engine, even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = packed_folder(mlx_engine, tiny_folder(even), tmp_path / "packed")
    raw = read_config_dict(folder)
    for block, said in (({"bits": 8, "group_size": 32}, "need U32"), ({"bits": 4, "group_size": 64}, "scales is")):
        write_json(folder / "config.json", raw | {"quantization": block, "quantization_config": block})
        with pytest.raises(CheckpointError, match=said):
            mlx_engine.load(folder)
    plain = {key: value for key, value in raw.items() if not key.startswith("quantization")}
    write_json(folder / "config.json", plain)
    with pytest.raises(CheckpointError, match="packed"):
        next(iterate_model(folder, read_config(folder).parameter_shapes()))


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "7 bits"),
        ({"quantization": {"bits": 4, "group_size": 64, "model.layers.0.mlp.up_proj": {"bits": 8}}}, "up_proj"),
        ({"quantization": 4}, "MLX"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization": {"bits": True, "group_size": 64}}, "bits"),
    ],
)
def test_other_quantisations_are_refused_by_name(even: Gemma3Config, block: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        parse_config(even.to_dict() | block)


def test_fusing_an_adapter_makes_a_plain_model(
    both_engines: tuple[Engine, Engine], even: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path,
    tokens: Callable[..., np.ndarray],
) -> None:  # fmt: skip
    from engines.adapters import read_adapter
    from engines.blending import fuse

    torch, mlx = both_engines
    folder, ids = packed_folder(mlx, tiny_folder(even), tmp_path / "packed"), tokens(17)
    mlx.load(folder, "float32")
    mlx.start_training(TrainingSettings(LoRASettings(2, 4)))
    mlx.train_step([Batch(ids[:, :-1].copy(), ids[:, 1:].copy())], 1e-2)
    mlx.save_adapter(tmp_path / "adapter", str(folder))
    (tmp_path / "fused").mkdir()
    fuse(folder, *read_adapter(tmp_path / "adapter", read_config(folder)), tmp_path / "fused", "float32")
    torch.load(tmp_path / "fused", "float32")
    np.testing.assert_allclose(torch.logits(ids), mlx.logits(ids), rtol=0, atol=1e-4)
    plain = dict(iterate_model(tmp_path / "fused", even.parameter_shapes()))
    assert as_float32(plain["model.embed_tokens.weight"]).shape == (64, 64)
