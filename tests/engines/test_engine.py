"""The contract of ``engines.base.Engine``: every test here holds for both engines, and between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest
from safetensors import safe_open

from engines import UnsupportedError, open_engine
from engines.base import Engine, Sampling
from engines.checkpoints import iterate_model, write_arrays
from engines.gemma3 import Gemma3Config
from engines.training import IGNORED, Batch, LoRASettings, OptimizerSettings, StepResult, TrainingSettings

TinyFolder = Callable[..., Path]
Tokens = Callable[..., np.ndarray]

LORA = LoRASettings(rank=3, alpha=6.0)
METHODS = {"full": None, "lora": LORA}


def batch(length: int = 10, rows: int = 2, seed: int = 0, skip: int = 0) -> Batch:
    """Random text, of which every row's first ``skip`` targets and the last position are not supervised."""
    text = np.random.default_rng(seed).integers(0, 64, (rows, length + 1), dtype=np.int32)
    labels = text[:, 1:].copy()
    labels[:, :skip] = IGNORED
    return Batch(text[:, :-1].copy(), labels)


def padded(source: Batch, length: int) -> Batch:
    """The same rows with padding to the right."""
    extra = ((0, 0), (0, length - source.tokens.shape[1]))
    return Batch(np.pad(source.tokens, extra), np.pad(source.labels, extra, constant_values=IGNORED))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def train(engine: Engine, batches: list[Batch], steps: int, rate: float = 1e-2) -> list[StepResult]:
    return [engine.train_step(batches, rate) for _ in range(steps)]


def same_weights(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)


# ------------------------------------------------------------------------------------------------ models


def test_fresh_weights_are_equal_on_both_engines(
    both_engines: tuple[Engine, Engine], tiny_config: Gemma3Config, tokens: Tokens
) -> None:
    for engine in both_engines:
        engine.initialise(tiny_config, seed=3, dtype="float32")
    torch, mlx = both_engines
    same_weights(inside.weights(torch), inside.weights(mlx), 0)
    text = tokens(20, batch=2)
    np.testing.assert_allclose(torch.log_probs(text), mlx.log_probs(text), rtol=0, atol=1e-5)


def test_fresh_weights_follow_their_seed(engine: Engine, config: Gemma3Config, tokens: Tokens) -> None:
    made = []
    for seed in (1, 1, 2):
        engine.initialise(config, seed)
        made.append(engine.logits(tokens(4)))
    assert np.array_equal(made[0], made[1])
    assert not np.allclose(made[0], made[2])


def test_fresh_matrices_have_the_published_deviation(engine: Engine, config: Gemma3Config) -> None:
    engine.initialise(config, 0)
    found = inside.weights(engine)
    assert found["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert all((value == 0).all() for value in found.values() if value.ndim == 1)


def test_the_loaded_model_is_described(engine: Engine, config: Gemma3Config, folder: Path) -> None:
    info = engine.load(folder, "float32")
    assert info == engine.model()
    assert (info.folder, info.config, info.dtype) == (str(folder), config, "float32")
    assert info.parameters == sum(value.size for value in inside.weights(engine).values())


def test_loading_tells_its_progress_up_to_the_end(engine: Engine, folder: Path) -> None:
    told: list[float] = []
    engine.load(folder, progress=lambda share, text: told.append(share))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_a_saved_model_loads_with_equal_logits(
    engine: Engine, config: Gemma3Config, folder: Path, tokens: Tokens, tmp_path: Path
) -> None:
    engine.load(folder, "float32")
    expected = engine.logits(tokens(12))
    engine.save_model(tmp_path / "saved", config.to_dict())
    engine.load(tmp_path / "saved")
    np.testing.assert_array_equal(engine.logits(tokens(12)), expected)


def test_a_model_saved_by_one_engine_loads_in_the_other(
    both_engines: tuple[Engine, Engine], config: Gemma3Config, folder: Path, tokens: Tokens, tmp_path: Path
) -> None:
    for source, target in (both_engines, both_engines[::-1]):
        source.load(folder, "float32")
        source.save_model(tmp_path / source.name, config.to_dict())
        target.load(tmp_path / source.name, "float32")
        np.testing.assert_allclose(target.logits(tokens(12)), source.logits(tokens(12)), rtol=0, atol=1e-4)


def test_a_bfloat16_model_is_saved_as_such_bit_for_bit(
    engine: Engine, config: Gemma3Config, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    source = tiny_folder(config, dtype="bfloat16")
    engine.load(source, "bfloat16")
    engine.save_model(tmp_path, config.to_dict())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert stored_bits(tmp_path) == stored_bits(source)


def stored_bits(folder: Path) -> dict[str, tuple[str, bytes]]:
    import torch

    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {name: (str(t.dtype), t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def test_float32_masters_are_saved_in_the_dtype_asked_for(
    engine: Engine, config: Gemma3Config, folder: Path, tmp_path: Path
) -> None:
    engine.load(folder, "bfloat16")
    engine.start_training(TrainingSettings(None))
    engine.save_model(tmp_path, config.to_dict(), "float32")
    assert {dtype for dtype, _ in stored_bits(tmp_path).values()} == {"torch.float32"}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_dtype_that_gemma_does_not_run_in_is_refused(
    engine: Engine, config: Gemma3Config, folder: Path, dtype: str
) -> None:
    assert dtype not in engine.device().dtypes
    with pytest.raises(UnsupportedError, match=dtype):
        engine.load(folder, dtype)
    with pytest.raises(UnsupportedError, match=dtype):
        engine.initialise(config, 0, dtype)


USES: dict[str, Callable[[Engine, Path], Any]] = {
    "logits": lambda engine, path: engine.logits(np.zeros((1, 2), np.int32)),
    "log_probs": lambda engine, path: engine.log_probs(np.zeros((1, 2), np.int32)),
    "token_scores": lambda engine, path: engine.token_scores(np.zeros((1, 2), np.int32)),
    "generate": lambda engine, path: next(engine.generate([2], Sampling())),
    "loss": lambda engine, path: engine.loss(batch()),
    "start_training": lambda engine, path: engine.start_training(TrainingSettings(None)),
    "train_step": lambda engine, path: engine.train_step([batch()], 1e-3),
    "save_model": lambda engine, path: engine.save_model(path, {}),
    "save_adapter": lambda engine, path: engine.save_adapter(path, "base"),
    "load_adapter": lambda engine, path: engine.load_adapter(path),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_works_after_unload(engine: Engine, folder: Path, tmp_path: Path, use: str) -> None:
    engine.load(folder)
    engine.start_training(TrainingSettings(LORA))
    engine.unload()
    assert engine.model() is None
    with pytest.raises(UnsupportedError):
        USES[use](engine, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="jax"):
        open_engine("jax")


# ------------------------------------------------------------------------------------------------ probabilities


def test_log_probs_are_those_of_the_logits(
    engine: Engine, folder: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside.module(engine, "scoring"), "ROWS", 7)
    text = tokens(13, batch=3)
    engine.load(folder, "float32")
    scores = log_softmax(engine.logits(text))[:, :-1]
    expected = np.take_along_axis(scores, text[:, 1:, None].astype(np.int64), axis=-1)[..., 0]
    found = engine.log_probs(text)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_rows_of_a_batch_do_not_see_one_another(engine: Engine, folder: Path, tokens: Tokens) -> None:
    text = tokens(9, batch=3)
    engine.load(folder, "float32")
    alone = np.concatenate([engine.logits(row[None]) for row in text])
    np.testing.assert_allclose(engine.logits(text), alone, rtol=0, atol=1e-5)


def test_the_loss_sums_the_log_probs_of_supervised_tokens(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    some = batch(skip=4)
    scores = log_softmax(engine.logits(some.tokens))
    expected = -sum(
        scores[row, t, some.labels[row, t]] for row in range(2) for t in range(10) if some.labels[row, t] != IGNORED
    )
    assert some.supervised == 12
    assert engine.loss(some) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_nothing_supervised_is_zero(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    assert engine.loss(batch(skip=10)) == 0.0


# ------------------------------------------------------------------------------------------------ generation


def test_greedy_takes_the_arg_max(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    made: list[int] = []
    for token in engine.generate([2, 7, 9], Sampling(max_tokens=6)):
        assert token == engine.logits(np.array([[2, 7, 9, *made]], np.int32))[0, -1].argmax()
        made.append(token)
    assert len(made) == 6


def test_generation_ends_at_max_tokens(engine: Engine, folder: Path) -> None:
    engine.load(folder)
    assert len(list(engine.generate([2], Sampling(max_tokens=5)))) == 5
    assert list(engine.generate([2], Sampling(max_tokens=0))) == []


def test_generation_ends_after_a_stop_id(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    free = list(engine.generate([2], Sampling(max_tokens=30, temperature=1.0, seed=4)))
    stop = free[9]
    stopped = list(engine.generate([2], Sampling(max_tokens=30, temperature=1.0, seed=4, stop_ids=(stop,))))
    assert stopped == free[: free.index(stop) + 1]


def test_a_seed_repeats_its_draws(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    draws = [list(engine.generate([2], Sampling(max_tokens=12, temperature=1.5, seed=seed))) for seed in (5, 5, 6)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_both_engines_draw_alike(both_engines: tuple[Engine, Engine], folder: Path) -> None:
    drawn = []
    for engine in both_engines:
        engine.load(folder, "float32")
        drawn.append(list(engine.generate([2, 5], Sampling(max_tokens=12, temperature=1.0, top_k=20, top_p=0.9))))
    assert drawn[0] == drawn[1]


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("method", METHODS)
def test_trainable_parameters_are_counted(engine: Engine, config: Gemma3Config, folder: Path, method: str) -> None:
    engine.load(folder, "float32")
    expected = {"full": config.parameter_count(), "lora": config.lora_count(3, LORA.targets)}
    assert engine.start_training(TrainingSettings(METHODS[method])) == expected[method]


def test_adapters_go_on_their_targets_only(engine: Engine, config: Gemma3Config, folder: Path) -> None:
    engine.load(folder, "float32")
    few = replace(LORA, targets=("q_proj", "down_proj"))
    assert engine.start_training(TrainingSettings(few)) == config.lora_count(3, few.targets)


def test_fresh_adapters_change_nothing(engine: Engine, folder: Path, tokens: Tokens) -> None:
    engine.load(folder, "float32")
    expected = engine.logits(tokens(8))
    engine.start_training(TrainingSettings(LORA))
    np.testing.assert_array_equal(engine.logits(tokens(8)), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_goes_down(engine: Engine, folder: Path, method: str, dtype: str) -> None:
    engine.load(folder, dtype)
    engine.start_training(TrainingSettings(METHODS[method]))
    results = train(engine, [batch()], 8)
    assert all(result.applied for result in results)
    assert results[-1].loss < 0.8 * results[0].loss


def test_a_step_tells_the_mean_loss_and_the_tokens(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    first, second = batch(seed=1, skip=7), batch(rows=1, length=6, seed=2)
    summed = engine.loss(first) + engine.loss(second)
    engine.start_training(TrainingSettings(None))
    result = engine.train_step([first, second], 1e-3)
    assert result.tokens == 12
    assert result.loss == pytest.approx(summed / 12, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_are_one_batch_weighted_by_tokens(engine: Engine, folder: Path, method: str) -> None:
    parts = [batch(seed=1, rows=1), batch(seed=2, rows=2, skip=8), batch(seed=3, rows=1, skip=5)]
    whole = Batch(*(np.concatenate([getattr(part, key) for part in parts]) for key in ("tokens", "labels")))
    results, weights = [], []
    for batches in (parts, [whole]):
        engine.load(folder, "float32")
        # A large epsilon keeps Adam's first step in proportion to the gradient, not to its sign alone.
        engine.start_training(TrainingSettings(METHODS[method], clip=0.0, optimizer=OptimizerSettings(epsilon=1.0)))
        results.append(train(engine, batches, 2, rate=1.0))
        weights.append(inside.weights(engine))
    for apart, together in zip(*results, strict=True):
        assert apart.tokens == together.tokens
        assert apart.loss == pytest.approx(together.loss, rel=1e-4)
        assert apart.grad_norm == pytest.approx(together.grad_norm, rel=1e-4)
    same_weights(*weights, 1e-4)


def test_micro_batches_may_hold_nothing_supervised(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(None))
    result = engine.train_step([batch(seed=1), batch(seed=2, skip=10)], 1e-3)
    assert result.tokens == 20
    assert result.applied


def test_a_step_with_nothing_supervised_is_left_out(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(None, optimizer=OptimizerSettings(weight_decay=0.1)))
    before = inside.weights(engine)
    result = engine.train_step([batch(skip=10)], 1e-2)
    assert (result.tokens, result.applied) == (0, False)
    same_weights(inside.weights(engine), before, 0)


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(engine: Engine, folder: Path, method: str) -> None:
    results, weights = [], []
    for some in (batch(skip=2), padded(batch(skip=2), 17)):
        engine.load(folder, "float32")
        engine.start_training(TrainingSettings(METHODS[method], optimizer=OptimizerSettings(epsilon=1.0)))
        results.append(engine.train_step([some], 1.0))
        weights.append(inside.weights(engine))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    same_weights(*weights, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_both_engines_take_the_same_steps(
    both_engines: tuple[Engine, Engine], config: Gemma3Config, folder: Path, method: str
) -> None:
    settings = TrainingSettings(
        METHODS[method], seed=5, optimizer=OptimizerSettings(weight_decay=0.1, betas=(0.9, 0.95))
    )
    losses, norms, weights = [], [], []
    for engine in both_engines:
        engine.load(folder, "float32")
        engine.start_training(settings)
        results = [engine.train_step([batch(seed=seed), batch(seed=seed + 9, skip=6)], 3e-3) for seed in range(6)]
        losses.append([result.loss for result in results])
        norms.append([result.grad_norm for result in results])
        weights.append(inside.weights(engine))
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-3)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-2)
    same_weights(*weights, 5e-3)


def test_clipping_bounds_the_step_and_tells_the_norm_before(engine: Engine, folder: Path) -> None:
    moved, norms = [], []
    for clip in (0.0, 0.5, 1e9):
        engine.load(folder, "float32")
        before = inside.weights(engine)
        engine.start_training(TrainingSettings(None, clip=clip, optimizer=OptimizerSettings(epsilon=1e3)))
        norms.append(engine.train_step([batch()], 1.0).grad_norm)
        after = inside.weights(engine)
        moved.append(np.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in before)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 2
    # With so large an epsilon, Adam's first step is the gradient over it.
    assert moved[1] == pytest.approx(0.5e-3, rel=2e-2)
    assert moved[0] == pytest.approx(norms[0] * 1e-3, rel=2e-2)
    assert moved[2] == pytest.approx(moved[0], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_is_not_applied(
    engine: Engine, config: Gemma3Config, tiny_folder: TinyFolder, method: str, bad: float
) -> None:
    broken = tiny_folder(config)
    arrays = {name: array.copy() for name, array in iterate_model(broken, config.parameter_shapes())}
    arrays["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    write_arrays(broken / "model.safetensors", arrays)
    engine.load(broken, "float32")
    engine.start_training(TrainingSettings(METHODS[method], optimizer=OptimizerSettings(weight_decay=0.1)))
    before = inside.weights(engine)
    assert not engine.train_step([batch()], 1e-2).applied
    after = inside.weights(engine)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_a_step_left_out_does_not_spoil_the_next(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = inside.module(engine, "training")
    right = training.summed_loss
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(None))
    with monkeypatch.context() as patch:
        patch.setattr(training, "summed_loss", lambda model, some: right(model, some) * float("inf"))
        assert not engine.train_step([batch()], 1e-2).applied
    after = train(engine, [batch()], 3)
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(None))
    assert [r.loss for r in after] == pytest.approx([r.loss for r in train(engine, [batch()], 3)], rel=1e-5)


def test_weight_decay_shrinks_matrices_and_leaves_norms(engine: Engine, folder: Path) -> None:
    found = []
    for decay in (0.0, 0.5):
        engine.load(folder, "float32")
        before = inside.weights(engine)
        engine.start_training(TrainingSettings(None, optimizer=OptimizerSettings(weight_decay=decay)))
        engine.train_step([batch()], 1e-2)
        found.append(inside.weights(engine))
    plain, decayed = found
    for name, value in before.items():
        # Decoupled: the matrix also loses rate · decay of itself.
        lost = 1e-2 * 0.5 * value if value.ndim > 1 else 0.0
        np.testing.assert_allclose(decayed[name], plain[name] - lost, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_activations_give_equal_losses(engine: Engine, folder: Path, method: str) -> None:
    losses = []
    for kept in (False, True):
        engine.load(folder, "float32")
        engine.start_training(TrainingSettings(METHODS[method], checkpoint_activations=kept))
        losses.append([result.loss for result in train(engine, [batch()], 4)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_of_zero_leaves_the_weights_bit_for_bit(engine: Engine, folder: Path, method: str) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(METHODS[method], optimizer=OptimizerSettings(weight_decay=0.1)))
    before = inside.weights(engine)
    train(engine, [batch()], 2, rate=0.0)
    after = inside.weights(engine)
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_lora_leaves_the_base_bit_for_bit(engine: Engine, config: Gemma3Config, folder: Path) -> None:
    engine.load(folder, "float32")
    before = inside.weights(engine)
    engine.start_training(TrainingSettings(LORA, optimizer=OptimizerSettings(weight_decay=0.1)))
    train(engine, [batch()], 3)
    after = inside.weights(engine)
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_dropout_acts_in_training_only(engine: Engine, folder: Path, tokens: Tokens) -> None:
    losses = []
    for dropout in (0.0, 0.9):
        engine.load(folder, "float32")
        engine.start_training(TrainingSettings(replace(LORA, dropout=dropout)))
        losses.append([result.loss for result in train(engine, [batch()], 3)])
        np.testing.assert_array_equal(engine.logits(tokens(5)), engine.logits(tokens(5)))
    assert losses[0][0] == pytest.approx(losses[1][0])
    assert losses[0][1:] != pytest.approx(losses[1][1:], rel=1e-3)


def test_a_step_without_training_is_refused(engine: Engine, folder: Path) -> None:
    engine.load(folder)
    with pytest.raises(UnsupportedError, match="start_training"):
        engine.train_step([batch()], 1e-3)


def test_stopping_keeps_what_was_learnt(engine: Engine, folder: Path, tokens: Tokens) -> None:
    engine.load(folder, "float32")
    fresh = engine.logits(tokens(6))
    engine.start_training(TrainingSettings(LORA))
    train(engine, [batch()], 2)
    learnt = engine.logits(tokens(6))
    engine.stop_training()
    np.testing.assert_array_equal(engine.logits(tokens(6)), learnt)
    assert not np.allclose(learnt, fresh)
    with pytest.raises(UnsupportedError, match="start_training"):
        engine.train_step([batch()], 1e-3)


# ------------------------------------------------------------------------------------------------ the chunked loss


@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["even", "peaked"])
@pytest.mark.parametrize("tile", [1, 2, 5, 9, 1000])
def test_the_chunked_loss_is_the_plain_cross_entropy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tile: int, spread: float
) -> None:
    """Tiles of the vocabulary that divide it, that do not, and that hold all of it; some labels stand twice."""
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((12, 5), np.float32) * np.float32(spread)
    weight = generator.standard_normal((9, 5), np.float32)
    labels = generator.integers(0, 9, 12)
    monkeypatch.setattr("engines.training.LOGITS_BYTES", 4 * 12 * tile)
    loss, grad_hidden, grad_weight = inside.chunked_loss(engine, hidden, weight, labels, scale=0.25)
    scores = log_softmax(hidden.astype(np.float64) @ weight.T)
    error = (np.exp(scores) - np.eye(9)[labels]) * 0.25
    assert loss == pytest.approx(-0.25 * scores[np.arange(12), labels].sum(), rel=1e-5)
    np.testing.assert_allclose(grad_hidden, error @ weight, rtol=0, atol=1e-4)
    np.testing.assert_allclose(grad_weight, error.T @ hidden, rtol=0, atol=1e-4 * spread)


@pytest.mark.parametrize("tile", [1, 7, 32])
def test_chunks_do_not_change_the_gradients_of_a_model(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    some = batch(skip=3)
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(None))
    whole = inside.gradients(engine, some)
    monkeypatch.setattr("engines.training.LOGITS_BYTES", 4 * some.supervised * tile)
    same_weights(inside.gradients(engine, some), whole, 1e-4)


def test_gradients_are_those_of_transformers(
    engine: Engine, tiny_config: Gemma3Config, tiny_folder: TinyFolder, reference_model: Callable[[Path], Any]
) -> None:
    """The tied embedding among them, which learns as the input table and as the output head."""
    import torch

    folder, some = tiny_folder(tiny_config), batch(skip=3)
    network = reference_model(folder)
    logits = network(torch.from_numpy(some.tokens).long()).logits.flatten(0, 1)
    labels = torch.from_numpy(some.labels).long().flatten()
    torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").backward()
    expected = {name: p.grad.numpy() for name, p in network.named_parameters()}
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(None))
    found = inside.gradients(engine, some)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, np.abs(gradient).max())
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-4 * scale, err_msg=name)
