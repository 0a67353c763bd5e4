"""Adapters on disk: ours load in PEFT and mlx-lm, theirs load here, all with equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest
from oracles import LORA, random_factors, refusal

from engines.adapters import (
    MLX_FOLDER,
    LowRank,
    adapter_base,
    read_adapter,
    write_adapter,
    write_mlx,
    write_peft,
)
from engines.base import Engine
from engines.checkpoints import read_array, read_header, write_arrays
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.training import Batch, LoRASettings, TrainingSettings

TinyFolder = Callable[..., Path]
Tokens = Callable[..., np.ndarray]
Logits = Callable[[Any, np.ndarray], np.ndarray]

# PEFT still asks transformers for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 1e-4
KINDS = {
    "lora": LORA,
    "some targets": replace(LORA, targets=("q_proj", "v_proj", "down_proj")),
    "rslora": replace(LORA, rslora=True),
    "dora": replace(LORA, dora=True),
    "last layers": replace(LORA, layers=(1, 2)),
    "some layers": replace(LORA, layers=(0, 2)),
    "first layer": replace(LORA, layers=(0,), targets=("v_proj",), rslora=True, dora=True),
}
each_kind = pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)


@pytest.fixture
def base(folder: Path) -> Path:
    """What the adapters are for; q_proj and o_proj are square, so that a transposed factor has a valid shape."""
    return folder


def stored(path: Path) -> dict[str, np.ndarray]:
    return {name: read_array(tensor) for name, tensor in read_header(path).items()}


def trained(engine: Engine, base: Path, lora: LoRASettings, text: np.ndarray) -> np.ndarray:
    """Train a few steps, so that no factor is zero; returns the logits then."""
    engine.load(base, "float32")
    plain = engine.logits(text)
    engine.start_training(TrainingSettings(lora))
    some = Batch(text, np.roll(text, -1, axis=1))
    for _ in range(3):
        engine.train_step([some], 2e-2)
    learnt = engine.logits(text)
    assert np.abs(learnt - plain).max() > 0.1
    return learnt


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------ PEFT


@each_kind
def test_a_trained_adapter_loads_in_peft_with_equal_logits(
    engine: Engine,
    base: Path,
    tokens: Tokens,
    reference_model: Callable[[Path], Any],
    reference_logits: Logits,
    tmp_path: Path,
    lora: LoRASettings,
) -> None:
    from peft import PeftModel

    expected = trained(engine, base, lora, tokens(20))
    engine.save_adapter(tmp_path, str(base))
    theirs = PeftModel.from_pretrained(reference_model(base), str(tmp_path)).eval()
    close(reference_logits(theirs, tokens(20)), expected)


def test_peft_finds_every_factor_it_expects(
    adapter: Path, base: Path, reference_model: Callable[[Path], Any], config: Gemma3Config
) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(reference_model(base), str(adapter))
    loaded = {name: p.detach().numpy() for name, p in theirs.named_parameters() if "lora_" in name}
    stored = {name: read_array(tensor) for name, tensor in read_header(adapter / "adapter_model.safetensors").items()}
    assert len(loaded) == len(stored) == 2 * 7 * config.num_hidden_layers
    for name, array in stored.items():
        np.testing.assert_array_equal(loaded[name.replace(".weight", ".default.weight")], array)


def peft_adapter(network: Any, folder: Path, **terms: Any) -> Any:
    """An adapter that PEFT made and saved, with random factors and magnitudes."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = list(LORA.targets)
    made = get_peft_model(
        network, LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **terms)
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    made.save_pretrained(str(folder))
    return made.eval()


THEIRS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"layers_to_transform": [0, 2]},
    {"layers_to_transform": 1, "layers_pattern": "layers", "use_dora": True, "use_rslora": True},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": dict.fromkeys(LORA.targets, 3)},
]
each_of_theirs = pytest.mark.parametrize("terms", THEIRS, ids=lambda terms: " ".join(terms) or "plain")


@each_of_theirs
def test_an_adapter_of_peft_loads_with_equal_logits(
    engine: Engine,
    base: Path,
    tokens: Tokens,
    reference_model: Callable[[Path], Any],
    reference_logits: Logits,
    tmp_path: Path,
    terms: dict[str, Any],
) -> None:
    theirs = peft_adapter(reference_model(base), tmp_path, **terms)
    engine.load(base, "float32")
    plain = engine.logits(tokens(20))
    engine.load_adapter(tmp_path)
    found = engine.logits(tokens(20))
    close(found, reference_logits(theirs, tokens(20)))
    assert np.abs(found - plain).max() > 0.1


@pytest.mark.parametrize(
    "terms",
    [*THEIRS[:5], {"lora_dropout": 0.3}, {"lora_dropout": 0.3, "use_dora": True}],
    ids=lambda terms: " ".join(terms) or "plain",
)
def test_gradients_are_those_of_peft(
    engine: Engine,
    base: Path,
    tokens: Tokens,
    reference_model: Callable[[Path], Any],
    tmp_path: Path,
    terms: dict[str, Any],
) -> None:
    import torch

    if terms.get("lora_dropout") and engine.name != "torch":
        pytest.skip("only torch draws PEFT's masks")
    text, labels = tokens(12, batch=2), tokens(12, batch=2, seed=1)
    theirs = peft_adapter(reference_model(base), tmp_path, **terms).train()
    torch.manual_seed(3)
    logits = theirs(torch.from_numpy(text).long()).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long().flatten(), reduction="sum").backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if "lora_" in name}
    engine.load(base, "float32")
    engine.load_adapter(tmp_path)
    torch.manual_seed(3)
    found = inside.gradients(engine, Batch(text, labels))
    assert len(found) == len(expected)
    for name, gradient in found.items():
        theirs_too = expected[f"base_model.model.{name}.default.weight"]
        np.testing.assert_allclose(gradient, theirs_too, rtol=0, atol=1e-4 * np.abs(theirs_too).max(), err_msg=name)


@each_of_theirs
def test_an_adapter_of_peft_comes_back_from_us_unchanged(
    engine: Engine, base: Path, reference_model: Callable[[Path], Any], tmp_path: Path, terms: dict[str, Any]
) -> None:
    peft_adapter(reference_model(base), tmp_path / "theirs", **terms)
    engine.load(base, "float32")
    engine.load_adapter(tmp_path / "theirs")
    engine.save_adapter(tmp_path / "ours", str(base))
    theirs, ours = (read_header(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(read_array(ours[name]), read_array(tensor))


@pytest.mark.parametrize("terms", [{"alpha_pattern": {"v_proj": 8}}, {"rank_pattern": {"q_proj": 8}}], ids=str)
def test_kinds_of_peft_that_compute_otherwise_are_refused(
    base: Path, config: Gemma3Config, reference_model: Callable[[Path], Any], tmp_path: Path, terms: dict[str, Any]
) -> None:
    peft_adapter(reference_model(base), tmp_path, **terms)
    with pytest.raises(UnsupportedError, match=next(iter(terms))):
        read_adapter(tmp_path, config)


# ------------------------------------------------------------------------------------------------ mlx-lm


def mlx_lm_model(base: Path) -> Any:
    import mlx.core as mx
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    raw = json.loads((base / "config.json").read_text())
    theirs = Model(ModelArgs.from_dict(raw))
    weights = {name: mx.array(read_array(tensor)) for name, tensor in read_header(base / "model.safetensors").items()}
    theirs.load_weights(list(theirs.sanitize(weights).items()))
    return theirs.eval()


def mlx_lm_logits(theirs: Any, text: np.ndarray) -> np.ndarray:
    import mlx.core as mx

    return np.array(theirs(mx.array(text)))


def test_mlx_lm_reads_our_model_with_equal_logits(engine: Engine, base: Path, tokens: Tokens) -> None:
    pytest.importorskip("mlx_lm")
    engine.load(base, "float32")
    close(mlx_lm_logits(mlx_lm_model(base), tokens(20)), engine.logits(tokens(20)))


@each_kind
def test_a_trained_adapter_loads_in_mlx_lm_with_equal_logits(
    engine: Engine, base: Path, tokens: Tokens, tmp_path: Path, lora: LoRASettings
) -> None:
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    expected = trained(engine, base, lora, tokens(20))
    engine.save_adapter(tmp_path, str(base))
    theirs = utils.load_adapters(mlx_lm_model(base), str(tmp_path / MLX_FOLDER)).eval()
    close(mlx_lm_logits(theirs, tokens(20)), expected)


@pytest.mark.parametrize("lora", [LORA, replace(LORA, layers=(0, 2), dora=True, rslora=True)], ids=["lora", "dora"])
def test_an_adapter_goes_through_every_format_unchanged(
    both_engines: tuple[Engine, Engine],
    config: Gemma3Config,
    base: Path,
    tokens: Tokens,
    tmp_path: Path,
    lora: LoRASettings,
) -> None:
    """PEFT's layout, mlx-lm's, PEFT's again: every one loads in both engines with the same logits."""
    factors = random_factors(config, lora)
    write_peft(tmp_path / "first", factors, lora, str(base))
    write_mlx(tmp_path / "second", *read_adapter(tmp_path / "first", config), config, str(base))
    write_peft(tmp_path / "third", *read_adapter(tmp_path / "second", config), str(base))
    found = []
    for place in ("first", "second", "third"):
        assert adapter_base(tmp_path / place) == str(base)
        for engine in both_engines:
            engine.load(base, "float32")
            engine.load_adapter(tmp_path / place)
            found.append(engine.logits(tokens(20)))
    for other in found[1:]:
        close(found[0], other)
    last, settings = read_adapter(tmp_path / "third", config)
    assert settings == replace(lora, alpha=settings.alpha, rslora=False)
    assert settings.scale == pytest.approx(lora.scale)
    for module, low_rank in factors.items():
        np.testing.assert_array_equal(last[module].lora_A, low_rank.lora_A)
        np.testing.assert_array_equal(last[module].lora_B, low_rank.lora_B)


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw.update(fine_tune_type="full"),
        lambda raw: raw.pop("lora_parameters"),
        lambda raw: raw["lora_parameters"].update(rank=0),
        lambda raw: raw["lora_parameters"].update(rank=4),
        lambda raw: raw["lora_parameters"].pop("scale"),
        lambda raw: raw["lora_parameters"].update(scale=float("nan")),
        lambda raw: raw["lora_parameters"].update(dropout=1),
        lambda raw: raw.update(fine_tune_type="dora"),
    ],
    ids=["full", "no parameters", "no rank", "another rank", "no scale", "nan", "dropout", "no magnitudes"],
)
def test_a_config_of_mlx_lm_that_is_not_right_is_refused(
    adapter: Path, config: Gemma3Config, edit: Callable[[dict[str, Any]], object]
) -> None:
    path = adapter / MLX_FOLDER / "adapter_config.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    refusal(adapter / MLX_FOLDER, config)


@pytest.mark.parametrize(
    ("name", "becomes", "named"),
    [
        ("model.layers.1.mlp.up_proj.lora_a", "model.layers.1.mlp.up_proj.lora_c", "lora_c"),
        ("model.layers.1.mlp.up_proj.lora_a", "model.layers.7.mlp.up_proj.lora_a", "in one layer"),
        ("model.layers.1.mlp.up_proj.lora_a", None, "no lora_A for model.layers.1.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj.lora_a", "model.embed_tokens.lora_a", "embed_tokens"),
    ],
)
def test_factors_of_mlx_lm_that_do_not_fit_are_refused(
    adapter: Path, config: Gemma3Config, name: str, becomes: str | None, named: str
) -> None:
    path = adapter / MLX_FOLDER / "adapters.safetensors"
    arrays = {key: read_array(tensor) for key, tensor in read_header(path).items()}
    moved = arrays.pop(name)
    write_arrays(path, arrays | ({} if becomes is None else {becomes: moved}))
    assert named in refusal(adapter / MLX_FOLDER, config)


# ------------------------------------------------------------------------------------------------ the factors


def test_both_engines_load_an_adapter_alike(
    both_engines: tuple[Engine, Engine], base: Path, adapter: Path, tokens: Tokens
) -> None:
    found = []
    for engine in both_engines:
        engine.load(base, "float32")
        engine.load_adapter(adapter)
        found.append(engine.logits(tokens(20)))
    close(*found)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj"])
def test_a_transposed_update_would_show(
    engine: Engine, config: Gemma3Config, base: Path, adapter: Path, tokens: Tokens, tmp_path: Path, name: str
) -> None:
    """Where in = out, ``lora_A`` and ``lora_B`` can be swapped for each other's transposes without a shape error."""
    factors, lora = read_adapter(adapter, config)
    module = f"model.layers.1.{name}"
    swapped = np.ascontiguousarray(factors[module].lora_B.T), np.ascontiguousarray(factors[module].lora_A.T)
    factors[module] = LowRank(*swapped)
    write_adapter(tmp_path / "transposed", factors, lora, config, str(base))
    found = []
    for folder in (adapter, tmp_path / "transposed"):
        engine.load(base, "float32")
        engine.load_adapter(folder)
        found.append(engine.logits(tokens(20)))
    assert np.abs(found[0] - found[1]).max() > 100 * TOLERANCE


def test_the_update_is_scaled_by_alpha_over_rank(
    engine: Engine, config: Gemma3Config, base: Path, tokens: Tokens, tmp_path: Path
) -> None:
    """Twice alpha with half of B is the same function."""
    factors = random_factors(config, LORA)
    halved = {module: LowRank(some.lora_A, some.lora_B / 2) for module, some in factors.items()}
    found = []
    for i, (some, lora) in enumerate([(factors, LORA), (halved, replace(LORA, alpha=2 * LORA.alpha))]):
        write_adapter(tmp_path / str(i), some, lora, config, str(base))
        engine.load(base, "float32")
        engine.load_adapter(tmp_path / str(i))
        found.append(engine.logits(tokens(9)))
    close(*found)


@each_kind
def test_a_saved_model_has_the_adapter_merged(
    engine: Engine, config: Gemma3Config, base: Path, tokens: Tokens, tmp_path: Path, lora: LoRASettings
) -> None:
    write_adapter(tmp_path / "adapter", random_factors(config, lora), lora, config, str(base))
    engine.load(base, "float32")
    engine.load_adapter(tmp_path / "adapter")
    expected = engine.logits(tokens(20))
    engine.save_model(tmp_path / "merged", config.to_dict())
    engine.load(tmp_path / "merged", "float32")
    close(engine.logits(tokens(20)), expected)


def test_merging_is_done_in_float32(
    engine: Engine, config: Gemma3Config, tiny_folder: TinyFolder, adapter: Path, tmp_path: Path
) -> None:
    engine.load(tiny_folder(config, dtype="bfloat16"), "bfloat16")
    before = inside.weights(engine)["model.layers.0.mlp.up_proj.weight"]
    engine.load_adapter(adapter)
    engine.save_model(tmp_path / "merged", config.to_dict(), "float32")
    low_rank = read_adapter(adapter, config)[0]["model.layers.0.mlp.up_proj"]
    expected = before + np.float32(LORA.alpha / LORA.rank) * (low_rank.lora_B @ low_rank.lora_A)
    merged = read_array(read_header(tmp_path / "merged" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)


def test_an_adapter_replaces_the_one_before_it(
    engine: Engine, config: Gemma3Config, base: Path, adapter: Path, tokens: Tokens, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "other", random_factors(config, LORA, seed=1), LORA, config, str(base))
    engine.load(base, "float32")
    engine.load_adapter(adapter)
    expected = engine.logits(tokens(9))
    engine.load_adapter(tmp_path / "other")
    assert np.abs(engine.logits(tokens(9)) - expected).max() > 0.1
    engine.load_adapter(adapter)
    np.testing.assert_array_equal(engine.logits(tokens(9)), expected)


def test_dropout_is_of_what_an_adapter_sees(
    engine: Engine, config: Gemma3Config, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask that is known: W x + (m / ‖V‖ - 1) W d + m / ‖V‖ · scale · B A d for the dropped input d."""
    lora = replace(LORA, dora=True, dropout=0.5)
    write_adapter(tmp_path, random_factors(config, lora), lora, config, str(base))
    engine.load(base, "float32")
    engine.load_adapter(tmp_path)
    module = "model.layers.1.self_attn.o_proj"
    layer = inside.module(engine, "adapters").lora_layers(inside.model(engine))[module]
    x = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    mask = np.where(np.arange(64) % 2, 2, 0).astype(np.float32)
    layer.train()
    found = inside.masked_layer(engine, layer, x, mask, monkeypatch)
    low_rank, weight = read_adapter(tmp_path, config)[0][module], inside.weights(engine)[f"{module}.weight"]
    update = lora.scale * low_rank.lora_B @ low_rank.lora_A
    factor = low_rank.magnitude / np.linalg.norm(weight + update, axis=1)
    dropped = x * mask
    expected = x @ weight.T + (factor - 1) * (dropped @ weight.T) + factor * (dropped @ update.T)
    close(found, expected)


def test_a_small_change_of_a_magnitude_shows_in_bfloat16(
    engine: Engine, config: Gemma3Config, base: Path, tmp_path: Path
) -> None:
    """A factor of 1.003 would be 1 in bfloat16; of the outputs, those that are near their next number move."""
    lora = replace(LORA, dora=True)
    engine.load(base, "bfloat16")
    module, factors = "model.layers.1.mlp.up_proj", random_factors(config, lora)
    update = lora.scale * factors[module].lora_B @ factors[module].lora_A
    lengths = np.linalg.norm(inside.weights(engine)[f"{module}.weight"] + update, axis=1)
    x = np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32)
    found = []
    for change in (1.0, 1.003):
        factors[module] = replace(factors[module], magnitude=(change * lengths).astype(np.float32))
        write_adapter(tmp_path, factors, lora, config, str(base))
        engine.load(base, "bfloat16")
        engine.load_adapter(tmp_path)
        layer = inside.module(engine, "adapters").lora_layers(inside.model(engine))[module]
        found.append(inside.bfloat16_layer(engine, layer, x))
    assert (found[0] * found[1]).sum() / (found[0] ** 2).sum() == pytest.approx(1.003, abs=1e-3)


@pytest.mark.parametrize("tower", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_multimodal_models_text_tower_is_read(adapter: Path, config: Gemma3Config, tower: str) -> None:
    expected, _ = read_adapter(adapter, config)
    path = adapter / "adapter_model.safetensors"
    arrays = {
        name.replace("base_model.model.model.", f"base_model.model.{tower}"): a for name, a in stored(path).items()
    }
    write_arrays(path, arrays)
    found, _ = read_adapter(adapter, config)
    assert found.keys() == expected.keys()
    vision = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    write_arrays(path, arrays | {vision: np.zeros((3, 8), np.float32)})
    assert "vision_tower" in refusal(adapter, config)


def test_dora_starts_as_its_model(engine: Engine, base: Path, tokens: Tokens) -> None:
    engine.load(base, "float32")
    expected = engine.logits(tokens(9))
    engine.start_training(TrainingSettings(replace(LORA, dora=True)))
    close(engine.logits(tokens(9)), expected)


def test_a_layer_that_is_not_there_is_refused(engine: Engine, base: Path) -> None:
    engine.load(base)
    with pytest.raises(UnsupportedError, match="no layer 3"):
        engine.start_training(TrainingSettings(replace(LORA, layers=(1, 3))))


def test_a_model_without_adapters_has_none_to_save(engine: Engine, base: Path, tmp_path: Path) -> None:
    engine.load(base)
    with pytest.raises(UnsupportedError, match="no adapters"):
        engine.save_adapter(tmp_path, "base")


def test_an_unknown_target_is_refused(engine: Engine, base: Path) -> None:
    engine.load(base)
    with pytest.raises(UnsupportedError, match="lm_head"):
        engine.start_training(TrainingSettings(LoRASettings(2, 2.0, targets=("q_proj", "lm_head"))))
