"""Blended and fused adapters against dense sums and against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.adapters import Factors, LowRank, read_adapter, target_modules, write_peft
from engines.base import Engine
from engines.blending import Blend, blend, fuse
from engines.checkpoints import as_float32, read_array, read_header
from engines.errors import CheckpointError, UnsupportedError
from engines.gemma3 import Gemma3Config, read_config
from engines.training import LoRASettings

TinyFolder = Callable[..., Path]
Tokens = Callable[..., np.ndarray]
Logits = Callable[[Any, np.ndarray], np.ndarray]
Adapter = tuple[Factors, LoRASettings]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = LoRASettings(rank=3, alpha=5.0)
WEIGHTS = (0.7, -1.3)


@pytest.fixture
def config(two_to_one: Gemma3Config) -> Gemma3Config:
    return two_to_one


@pytest.fixture
def base(config: Gemma3Config, tiny_folder: TinyFolder) -> Path:
    return tiny_folder(config)


def adapter(config: Gemma3Config, lora: LoRASettings, seed: int) -> Adapter:
    generator = np.random.default_rng(seed)

    def small(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32) * np.float32(0.2)

    modules = target_modules(config, lora.targets, lora.layers)
    return {
        module: LowRank(small(lora.rank, inner), small(out, lora.rank), 1 + small(out) if lora.dora else None)
        for module, (out, inner) in modules.items()
    }, lora


@pytest.fixture
def two(config: Gemma3Config) -> list[Adapter]:
    """Two adapters of other ranks, scales, targets and layers."""
    return [
        adapter(config, replace(LORA, targets=("q_proj", "up_proj")), 0),
        adapter(config, replace(LORA, rank=2, rslora=True, targets=("q_proj", "down_proj"), layers=(0, 2)), 1),
    ]


def update(some: Adapter, module: str, shape: tuple[int, int]) -> np.ndarray:
    """scale · B A, float64; zero where an adapter has nothing."""
    factors, settings = some
    if module not in factors:
        return np.zeros(shape)
    return settings.scale * factors[module].lora_B.astype(np.float64) @ factors[module].lora_A


def dense_sum(adapters: list[Adapter], module: str, shape: tuple[int, int]) -> np.ndarray:
    return sum(w * update(some, module, shape) for w, some in zip(WEIGHTS, adapters, strict=True))


def test_cat_is_the_weighted_sum_of_the_updates(config: Gemma3Config, two: list[Adapter]) -> None:
    made = blend(two, WEIGHTS, config, "cat")
    assert (made.settings.rank, made.settings.scale, made.kept) == (5, 1.0, 1.0)
    assert set(made.settings.targets) == {"q_proj", "up_proj", "down_proj"}
    assert made.settings.layers is None
    for module, shape in target_modules(config, made.settings.targets).items():
        found = update((made.factors, made.settings), module, shape)
        np.testing.assert_allclose(found, dense_sum(two, module, shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5, 90])
def test_svd_is_the_nearest_of_its_rank(config: Gemma3Config, two: list[Adapter], rank: int) -> None:
    made = blend(two, WEIGHTS, config, "svd", rank)
    assert made.settings.rank == rank
    kept = total = 0.0
    shares = {}
    for module, shape in target_modules(config, made.settings.targets).items():
        u, values, vt = np.linalg.svd(dense_sum(two, module, shape), full_matrices=False)
        nearest = (u[:, :rank] * values[:rank]) @ vt[:rank]
        found = update((made.factors, made.settings), module, shape)
        np.testing.assert_allclose(found, nearest, rtol=0, atol=1e-5)
        kept, total = kept + (values[:rank] ** 2).sum(), total + (values**2).sum()
        if values[0]:
            shares[module] = (values[:rank] ** 2).sum() / (values**2).sum()
    assert made.kept == pytest.approx(kept / total)
    assert made.worst is not None
    assert made.worst[0] == pytest.approx(min(shares.values()))


def test_the_rank_of_svd_is_the_largest_if_none_is_given(config: Gemma3Config, two: list[Adapter]) -> None:
    assert blend(two, WEIGHTS, config, "svd").settings.rank == 3


def test_layers_are_those_that_one_of_them_has(config: Gemma3Config) -> None:
    some = [adapter(config, replace(LORA, layers=layers), 0) for layers in ((0,), (2,))]
    assert blend(some, WEIGHTS, config, "cat").settings.layers == (0, 2)


@pytest.mark.parametrize("weights", [WEIGHTS, (0.0, 2.0)], ids=str)
@pytest.mark.parametrize("how", ["linear", "svd", "cat"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_makes_the_same_of_two_adapters(
    config: Gemma3Config,
    base: Path,
    reference_model: Callable[[Path], Any],
    tmp_path: Path,
    how: str,
    weights: tuple[float, ...],
) -> None:
    from peft import PeftModel

    some = [adapter(config, lora, i) for i, lora in enumerate((LORA, replace(LORA, alpha=2.0, rslora=True)))]
    for i, (factors, settings) in enumerate(some):
        write_peft(tmp_path / str(i), factors, settings, str(base))
    theirs = PeftModel.from_pretrained(reference_model(base), str(tmp_path / "0"), adapter_name="0")
    theirs.load_adapter(str(tmp_path / "1"), adapter_name="1")
    theirs.add_weighted_adapter(["0", "1"], list(weights), "both", combination_type=how)
    made = blend(some, weights, config, how)
    for module in made.factors:
        layer = theirs.base_model.model.get_submodule(module)
        found = update((made.factors, made.settings), module, (0, 0))
        np.testing.assert_allclose(found, layer.get_delta_weight("both").detach().numpy(), rtol=0, atol=1e-5)


def test_linear_is_no_weighted_sum(config: Gemma3Config) -> None:
    some = [adapter(config, LORA, seed) for seed in (0, 1)]
    made: Blend = blend(some, WEIGHTS, config, "linear")
    module = "model.layers.0.self_attn.q_proj"
    difference = update((made.factors, made.settings), module, (0, 0)) - dense_sum(some, module, (0, 0))
    assert np.abs(difference).max() > 0.1
    assert made.kept is None


def test_what_cannot_be_blended_is_refused(config: Gemma3Config, two: list[Adapter]) -> None:
    dora = adapter(config, replace(LORA, dora=True), 0)
    with pytest.raises(UnsupportedError, match="DoRA"):
        blend([two[0], dora], WEIGHTS, config, "svd")
    with pytest.raises(UnsupportedError, match="3, 2"):
        blend(two, WEIGHTS, config, "linear")


# ------------------------------------------------------------------------------------------------ fuse


@pytest.mark.parametrize(
    "lora",
    [LORA, replace(LORA, rslora=True, layers=(0, 2)), replace(LORA, dora=True)],
    ids=["lora", "rslora, some layers", "dora"],
)
def test_a_fused_model_is_what_peft_merges(
    engine: Engine,
    config: Gemma3Config,
    base: Path,
    tokens: Tokens,
    reference_model: Callable[[Path], Any],
    reference_logits: Logits,
    tmp_path: Path,
    lora: LoRASettings,
) -> None:
    from peft import PeftModel

    factors, _ = adapter(config, lora, 0)
    write_peft(tmp_path / "adapter", factors, lora, str(base))
    (tmp_path / "fused").mkdir()
    seen: list[float] = []
    fuse(base, factors, lora, tmp_path / "fused", "float32", lambda share, text: seen.append(share))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    merged = PeftModel.from_pretrained(reference_model(base), str(tmp_path / "adapter")).merge_and_unload()
    stored = read_header(tmp_path / "fused" / "model.safetensors")
    for name, parameter in merged.named_parameters():
        np.testing.assert_allclose(read_array(stored[name]), parameter.detach().numpy(), rtol=0, atol=1e-5)
    engine.load(base, "float32")
    engine.load_adapter(tmp_path / "adapter")
    expected = engine.logits(tokens(20))
    engine.load(tmp_path / "fused", "float32")
    np.testing.assert_allclose(engine.logits(tokens(20)), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(reference_logits(tmp_path / "fused", tokens(20)), expected, rtol=0, atol=1e-4)


def test_weights_of_bfloat16_are_fused_in_float32(
    config: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """An update too small for bfloat16 moves the weights that lie near the middle between two of its numbers."""
    base = tiny_folder(config, dtype="bfloat16")
    factors, lora = adapter(config, LORA, 0)
    fuse(base, factors, lora, tmp_path, "bfloat16")
    assert read_config(tmp_path) == config
    name = "model.layers.1.mlp.up_proj"
    before = as_float32(read_array(read_header(base / "model.safetensors")[f"{name}.weight"]))
    tensor = read_header(tmp_path / "model.safetensors")[f"{name}.weight"]
    assert tensor.dtype == "BF16"
    exact = before + update((factors, lora), name, (0, 0))
    # Half a unit in the last place, of eight bits.
    np.testing.assert_array_less(np.abs(as_float32(read_array(tensor)) - exact), np.abs(exact) * 2**-8 + 1e-7)


def test_an_adapter_of_another_model_is_not_fused(
    config: Gemma3Config, four_to_one: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    factors, lora = adapter(config, LORA, 0)
    with pytest.raises(CheckpointError, match="fuse it with its own model"):
        fuse(tiny_folder(four_to_one), factors, lora, tmp_path, "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_blend_is_an_adapter_like_any_other(config: Gemma3Config, two: list[Adapter], tmp_path: Path) -> None:
    made = blend(two, WEIGHTS, config, "svd", 4)
    write_peft(tmp_path, made.factors, made.settings, "base")
    factors, settings = read_adapter(tmp_path, config)
    assert settings == made.settings
    for module, low_rank in factors.items():
        np.testing.assert_array_equal(low_rank.lora_A, made.factors[module].lora_A)
