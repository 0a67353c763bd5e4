"""Adapters merged into the weights below them, and the updates that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import inside
import numpy as np
import pytest
from oracles import batch, changes, close, train

from engines import UnsupportedError
from engines.base import Engine
from engines.checkpoints import as_bfloat16, as_float32, iterate_model
from engines.gemma3 import Gemma3Config
from engines.training import LoRASettings, OptimizerSettings, TrainingSettings

TinyFolder = Callable[..., Path]
Tokens = Callable[..., np.ndarray]

LORA = LoRASettings(rank=3, alpha=6.0)
MERGING = TrainingSettings(LORA, merging=True, seed=4)


def start(
    engine: Engine, folder: Path, settings: TrainingSettings = MERGING, steps: int = 2, dtype: str = "float32"
) -> None:
    engine.load(folder, dtype)
    engine.start_training(settings)
    train(engine, [batch()], steps)


def factors(engine: Engine, leaf: str) -> dict[str, np.ndarray]:
    """``lora_A`` or ``lora_B`` of every adapted linear, by its name."""
    found = inside.weights(engine)
    return {n.removesuffix(f".{leaf}"): value for n, value in found.items() if n.endswith(leaf)}


def products(engine: Engine, scale: float) -> dict[str, np.ndarray]:
    b = factors(engine, "lora_B")
    return {name: scale * b[name].astype(np.float64) @ a for name, a in factors(engine, "lora_A").items()}


def rounded(array: np.ndarray) -> np.ndarray:
    return as_float32(as_bfloat16(array))


# ------------------------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("reset", ["fresh", "keep"])
def test_a_merge_moves_the_product_into_the_weight(
    engine: Engine, folder: Path, tokens: Tokens, reset: str, tmp_path: Path
) -> None:
    start(engine, folder)
    before, logits, a = inside.weights(engine), engine.logits(tokens(12)), factors(engine, "lora_A")
    moved, learnt = products(engine, LORA.scale), changes(engine)
    engine.merge(reset, seed=9)
    close(engine.logits(tokens(12)), logits, 1e-5)
    after = inside.weights(engine)
    for name, product in moved.items():
        close(after[f"{name}.weight"] - before[f"{name}.weight"], product, 1e-3, name)
        assert not after[f"{name}.lora_B"].any()
        assert after[f"{name}.lora_A"].any()
        assert np.array_equal(after[f"{name}.lora_A"], a[name]) == (reset == "keep")
    for name, change in changes(engine).items():
        close(change, learnt[name], 1e-3, name)


def test_fresh_factors_follow_their_seed(engine: Engine, folder: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        start(engine, folder, steps=1)
        engine.merge("fresh", seed)
        drawn.append(factors(engine, "lora_A"))
    for name, a in drawn[0].items():
        assert np.array_equal(a, drawn[1][name])
        assert not np.array_equal(a, drawn[2][name])
        assert np.abs(a).max() <= 1 / np.sqrt(a.shape[1])


def test_the_direction_of_a_rank_1_merge_goes_on(engine: Engine, folder: Path, tokens: Tokens) -> None:
    lora = LoRASettings(rank=1, alpha=2.0)
    start(engine, folder, replace(MERGING, lora=lora), steps=3)
    logits, merged = engine.logits(tokens(12)), products(engine, lora.scale)
    engine.merge("direction", seed=9)
    close(engine.logits(tokens(12)), logits, 1e-5)
    for name, a in factors(engine, "lora_A").items():
        right = np.linalg.svd(merged[name])[2][0]
        assert abs(right @ a[0]) == pytest.approx(np.linalg.norm(a), rel=1e-5)
        # As long as a fresh one: a row of in entries, uniform within ±1/√in.
        assert np.linalg.norm(a) == pytest.approx(3**-0.5, rel=0.25)


@pytest.mark.parametrize("reset", ["fresh", "keep"])
def test_b_has_a_gradient_from_the_first_step_and_after_each_merge(engine: Engine, folder: Path, reset: str) -> None:
    """The reference of ReLoRA starts with both factors zero, and its linears do not learn until the first merge."""
    start(engine, folder, steps=0)
    for seed in range(3):
        for name, gradient in inside.gradients(engine, batch(seed=seed)).items():
            if name.endswith("lora_B"):
                assert np.linalg.norm(gradient) > 0, name
        train(engine, [batch(seed=seed)], 1)
        engine.merge(reset, seed)


def test_starting_again_keeps_what_was_learnt(engine: Engine, folder: Path, tokens: Tokens) -> None:
    start(engine, folder)
    logits, learnt = engine.logits(tokens(12)), changes(engine)
    engine.start_training(MERGING)
    close(engine.logits(tokens(12)), logits, 1e-5)
    for name, change in changes(engine).items():
        close(change, learnt[name], 1e-3, name)


# ------------------------------------------------------------------------------------------------ what is told


def test_a_merge_tells_the_norm_of_all_it_merged(engine: Engine, folder: Path) -> None:
    start(engine, folder)
    squares = sum((product**2).sum() for product in products(engine, LORA.scale).values())
    result = engine.merge("fresh", seed=0)
    assert result.norm == pytest.approx(np.sqrt(squares), rel=1e-4)
    assert result.changed is None
    assert engine.merge("fresh", seed=1).norm == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_counts_the_weights_that_differ_in_the_dtype_of_the_model(
    engine: Engine, folder: Path, dtype: str
) -> None:
    engine.load(folder, dtype)
    engine.start_training(replace(MERGING, lora=replace(LORA, targets=("q_proj", "down_proj"))))
    engine.train_step([batch()], 1e-3)
    seen = rounded if dtype == "bfloat16" else np.asarray
    before = {name: inside.weights(engine)[f"{name}.weight"] for name in factors(engine, "lora_A")}
    found = engine.merge("fresh", seed=0, count=True).changed
    after = inside.weights(engine)
    differ = [seen(value) != seen(after[f"{name}.weight"]) for name, value in before.items()]
    assert found == pytest.approx(np.mean(np.concatenate([d.ravel() for d in differ])), abs=1e-12)
    assert found is not None
    assert (0 < found < 0.5) if dtype == "bfloat16" else found > 0.9
    assert engine.merge("fresh", seed=1, count=True).changed == 0


# ------------------------------------------------------------------------------------------------ precision


def test_a_hundred_small_merges_keep_their_sum_in_a_bfloat16_model(
    engine: Engine, config: Gemma3Config, tiny_folder: TinyFolder
) -> None:
    folder, module = tiny_folder(config, dtype="bfloat16"), "model.layers.0.self_attn.o_proj"
    engine.load(folder, "bfloat16")
    engine.start_training(replace(MERGING, lora=replace(LORA, targets=("o_proj",), layers=(0,))))
    plain = as_float32(dict(iterate_model(folder, config.parameter_shapes()))[f"{module}.weight"])
    first, exact = plain.copy(), np.zeros(plain.shape)
    for seed in range(100):
        engine.train_step([batch(3, 1, seed % 5)], 5e-5)
        product = products(engine, LORA.scale)[module]
        exact += product
        plain = rounded(plain + product.astype(np.float32))
        engine.merge("keep", seed)
    (name, change, size) = next(engine.updates([module]))
    assert (name, size) == (module, pytest.approx(np.linalg.norm(first), rel=1e-6))
    close(change, exact, 1e-3)
    # The same merges added to the bfloat16 weights themselves are mostly lost.
    assert np.linalg.norm(plain - first - exact) > 0.3 * np.linalg.norm(exact)


# ------------------------------------------------------------------------------------------------ refusals


def test_there_must_be_something_to_merge(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings())
    with pytest.raises(UnsupportedError, match="merging"):
        engine.merge("fresh", seed=0)


def test_adapters_over_bfloat16_weights_are_not_merged(engine: Engine, folder: Path) -> None:
    engine.load(folder, "bfloat16")
    engine.start_training(TrainingSettings(LORA))
    with pytest.raises(UnsupportedError, match="float32"):
        engine.merge("fresh", seed=0)


def test_dora_is_not_merged(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    with pytest.raises(UnsupportedError, match="dora"):
        engine.start_training(replace(MERGING, lora=replace(LORA, dora=True)))
    engine.start_training(TrainingSettings(replace(LORA, dora=True)))
    train(engine, [batch()], 1)
    before = inside.weights(engine)
    with pytest.raises(UnsupportedError, match="dora"):
        engine.merge("fresh", seed=0)
    assert all(np.array_equal(value, before[name]) for name, value in inside.weights(engine).items())


@pytest.mark.parametrize("reset", ["direction", "zero"])
def test_a_merge_that_is_refused_changes_nothing(engine: Engine, folder: Path, tokens: Tokens, reset: str) -> None:
    start(engine, folder)
    logits = engine.logits(tokens(12))
    with pytest.raises(UnsupportedError, match="choose"):
        engine.merge(reset, seed=0)
    np.testing.assert_array_equal(engine.logits(tokens(12)), logits)


# ------------------------------------------------------------------------------------------------ updates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [MERGING, TrainingSettings()], ids=["lora", "full"])
def test_nothing_has_changed_before_the_first_step(
    engine: Engine, folder: Path, settings: TrainingSettings, dtype: str
) -> None:
    """Of a file in float32 too, which a model in bfloat16 rounds."""
    start(engine, folder, settings, steps=0, dtype=dtype)
    assert not any(change.any() for change in changes(engine).values())


def test_nothing_has_changed_in_a_fresh_model(engine: Engine, config: Gemma3Config) -> None:
    engine.initialise(config, 3, "bfloat16")
    engine.start_training(TrainingSettings())
    assert not any(change.any() for change in changes(engine).values())


def test_updates_are_between_the_loaded_and_the_saved_weights(
    engine: Engine, config: Gemma3Config, folder: Path, tmp_path: Path
) -> None:
    settings = TrainingSettings(LORA, merging=True, rest=True, optimizer=OptimizerSettings(weight_decay=0.1))
    start(engine, folder, settings)
    engine.merge("fresh", seed=0)
    train(engine, [batch()], 1)
    engine.save_model(tmp_path, config.to_dict())
    shapes = config.parameter_shapes()
    first, last = (dict(iterate_model(path, shapes)) for path in (folder, tmp_path))
    found = list(engine.updates())
    assert len(found) == 7 * config.num_hidden_layers
    for name, change, size in found:
        close(change, last[f"{name}.weight"] - first[f"{name}.weight"], 1e-6, name)
        assert size == pytest.approx(np.linalg.norm(first[f"{name}.weight"]), rel=1e-5)
    chosen = ["model.layers.2.mlp.up_proj", "model.layers.0.self_attn.v_proj"]
    assert {name for name, _, _ in engine.updates(chosen)} == set(chosen)


# ------------------------------------------------------------------------------------------------ both engines


@pytest.mark.parametrize(("rank", "reset"), [(3, "fresh"), (1, "direction")], ids=["relora", "alternate"])
def test_both_engines_take_the_same_steps_with_merges(
    both_engines: tuple[Engine, Engine], folder: Path, rank: int, reset: str
) -> None:
    losses = []
    for engine in both_engines:
        engine.load(folder, "float32")
        engine.start_training(
            replace(MERGING, lora=LoRASettings(rank, 2.0 * rank), optimizer=OptimizerSettings(epsilon=1e-3))
        )
        found = []
        for step in range(6):
            found.append(engine.train_step([batch(seed=step)], 3e-3).loss)
            if step % 2:
                engine.merge(reset, seed=step)
                engine.prune_optimizer("magnitude", 0.9, seed=step)
        losses.append(found)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
