"""Rank-1 updates found from the true gradient, held against transformers' gradients and numpy's SVD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest
from oracles import batch, changes, close, rows_of, train, true_gradients

from engines.base import Engine
from engines.errors import UnsupportedError
from engines.gemma3 import Gemma3Config
from engines.initialisation import unit_vector
from engines.training import LoRASettings, OptimizerSettings, Rank1Settings, TrainingSettings

Tokens = Callable[..., np.ndarray]

RATE = 0.3
POWER = Rank1Settings(targets=("q_proj", "down_proj"), iterations=200)
SKETCH = replace(POWER, mode="sketch")


@pytest.fixture
def gradients(folder: Path, reference_model: Callable[[Path], Any]) -> dict[str, np.ndarray]:
    """Of ``batch()``, by transformers, for the targets."""
    found = true_gradients(reference_model(folder), batch())
    return {name: g for name, g in found.items() if name.endswith(POWER.targets)}


def start(engine: Engine, folder: Path, rank1: Rank1Settings, clip: float = 0.0) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(rank1=rank1, seed=3, clip=clip))


def moved(engine: Engine) -> dict[str, np.ndarray]:
    """What changed, of the targets; nothing else may have."""
    found = changes(engine)
    assert not any(change.any() for name, change in found.items() if not name.endswith(POWER.targets))
    return {name: change for name, change in found.items() if name.endswith(POWER.targets)}


def directions(engine: Engine) -> dict[str, np.ndarray]:
    """v of every matrix."""
    found = inside.weights(engine)
    return {name.removesuffix(".lora_A"): a[0] for name, a in found.items() if name.endswith("lora_A")}


def best(matrix: np.ndarray) -> np.ndarray:
    """The best approximation of rank 1 (Eckart and Young)."""
    u, s, vt = np.linalg.svd(matrix)
    return s[0] * np.outer(u[:, 0], vt[0])


def rank(matrix: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(matrix.astype(np.float64), tol=1e-4 * np.linalg.norm(matrix)))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (TrainingSettings(rank1=Rank1Settings("alternate")), "alternate.*power or sketch"),
        (TrainingSettings(LoRASettings(2, 2.0), Rank1Settings()), "not both"),
        (TrainingSettings(LoRASettings(2, 2.0, dora=True), merging=True), "dora"),
    ],
    ids=["mode", "both", "dora"],
)
def test_settings_that_do_not_go_together_stop_no_training(
    engine: Engine, folder: Path, settings: TrainingSettings, reason: str
) -> None:
    start(engine, folder, POWER)
    before = inside.weights(engine)
    with pytest.raises(UnsupportedError, match=reason):
        engine.start_training(settings)
    after = inside.weights(engine)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    assert engine.train_step([batch()], RATE).applied


# ------------------------------------------------------------------------------------------------ one step


def test_a_rate_of_zero_leaves_the_model_bit_for_bit(engine: Engine, folder: Path, tokens: Tokens) -> None:
    for settings in (POWER, SKETCH, replace(POWER, error_feedback=True, momentum=0.9)):
        start(engine, folder, replace(settings, iterations=1))
        logits = engine.logits(tokens(12))
        for _ in range(2):
            engine.train_step([batch()], 0.0)
            assert engine.merge("fresh", seed=0, count=True).changed == 0
        np.testing.assert_array_equal(engine.logits(tokens(12)), logits)
        assert not any(change.any() for change in changes(engine).values())


@pytest.mark.parametrize("merge", [False, True])
def test_a_power_step_is_the_leading_pair_of_the_gradient(
    engine: Engine, folder: Path, gradients: dict[str, np.ndarray], merge: bool
) -> None:
    start(engine, folder, POWER)
    result = engine.train_step([batch()], RATE)
    expected = {name: -RATE * best(g) for name, g in gradients.items()}
    assert result.grad_norm == pytest.approx(
        np.sqrt(sum(np.linalg.norm(g, 2) ** 2 for g in gradients.values())), rel=1e-3
    )
    if merge:
        norm = np.sqrt(sum(np.linalg.norm(e) ** 2 for e in expected.values()))
        assert engine.merge("fresh", seed=0).norm == pytest.approx(norm, rel=1e-3)
    found = moved(engine)
    assert found.keys() == expected.keys()
    for name, change in found.items():
        close(change, expected[name], 5e-3, name)


def test_what_is_pending_has_rank_1(engine: Engine, folder: Path) -> None:
    start(engine, folder, POWER)
    engine.train_step([batch()], RATE)
    found = inside.weights(engine)
    for name, v in directions(engine).items():
        assert np.linalg.norm(v) == pytest.approx(1, rel=1e-5)
        assert found[f"{name}.lora_B"].shape[1] == 1
        assert rank(moved(engine)[name]) == 1


@pytest.mark.parametrize("settings", [replace(POWER, iterations=2), SKETCH], ids=["power", "sketch"])
def test_the_factored_gradient_is_the_formed_one(engine: Engine, folder: Path, settings: Rank1Settings) -> None:
    found, norms = [], []
    for batches in ([batch()], rows_of(batch())):
        start(engine, folder, settings)
        norms.append(engine.train_step(batches, RATE).grad_norm)
        found.append(moved(engine))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for name, change in found[0].items():
        close(change, found[1][name], 2e-3, name)


def test_a_sketch_projects_the_gradient_on_the_direction_drawn(
    engine: Engine, folder: Path, config: Gemma3Config, gradients: dict[str, np.ndarray]
) -> None:
    start(engine, folder, SKETCH)
    engine.train_step([batch()], RATE)
    generator = np.random.default_rng([3, 1])
    for name, change in moved(engine).items():
        v = unit_vector(change.shape[1], generator)
        np.testing.assert_array_equal(directions(engine)[name], v)
        close(change, -RATE * np.outer(gradients[name] @ v, v), 2e-3, name)


def test_a_sketch_draws_again_after_a_merge_only(engine: Engine, folder: Path) -> None:
    start(engine, folder, SKETCH)
    engine.train_step([batch()], RATE)
    first = directions(engine)
    engine.train_step([batch(seed=1)], RATE)
    assert all(np.array_equal(v, first[name]) for name, v in directions(engine).items())
    assert all(rank(change) == 1 for change in moved(engine).values())
    engine.merge("fresh", seed=0)
    engine.train_step([batch(seed=2)], RATE)
    assert all(abs(v @ first[name]) < 0.9 for name, v in directions(engine).items())


def test_a_normalised_step_has_its_length_from_the_shape(
    engine: Engine, folder: Path, gradients: dict[str, np.ndarray]
) -> None:
    for clip in (0.0, 1e-3):
        start(engine, folder, replace(POWER, normalised=True), clip)
        engine.train_step([batch()], RATE)
        for name, change in moved(engine).items():
            out, inner = change.shape
            top = best(gradients[name])
            close(change, -RATE * np.sqrt(out / inner) * top / np.linalg.norm(top), 5e-3, name)


def test_decay_takes_a_share_of_the_weights(engine: Engine, folder: Path) -> None:
    """A step of W is -d W - step, with d = rate · weight_decay; at a rate of zero nothing decays."""
    start(engine, folder, SKETCH)
    train(engine, [batch()], 1, RATE)
    first = moved(engine)
    engine.load(folder, "float32")
    engine.start_training(
        TrainingSettings(rank1=SKETCH, seed=3, clip=0.0, optimizer=OptimizerSettings(weight_decay=0.1))
    )
    before = inside.weights(engine)
    train(engine, [batch()], 1, RATE)
    for name, change in moved(engine).items():
        weight = before[f"{name}.weight"]
        close(change, first[name] - RATE * 0.1 * weight, 1e-4, name)
    pending = {name: inside.weights(engine)[f"{name}.lora_B"] for name in first}
    engine.train_step([batch()], 0.0)
    for name, b in pending.items():
        assert np.array_equal(inside.weights(engine)[f"{name}.lora_B"], b)


def test_clipping_bounds_the_step(engine: Engine, folder: Path) -> None:
    start(engine, folder, POWER, clip=0.0)
    norm = engine.train_step([batch()], RATE).grad_norm
    free = moved(engine)
    start(engine, folder, POWER, clip=norm / 4)
    assert engine.train_step([batch()], RATE).grad_norm == pytest.approx(norm, rel=1e-5)
    for name, change in moved(engine).items():
        close(change, free[name] / 4, 1e-3, name)


def buffers(engine: Engine) -> dict[str, np.ndarray]:
    """What the buffer of every matrix holds."""
    layers = inside.module(engine, "rank1").rank1_layers(inside.model(engine))
    return {name: np.array(layer.buffer.tolist(), np.float32) for name, layer in layers.items()}


def whole_norm(gradients: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.linalg.norm(g) ** 2 for g in gradients.values())))


@pytest.mark.parametrize("share", [0.5, 0.05, 1.0])
@pytest.mark.parametrize("normalised", [False, True])
def test_nothing_that_comes_into_the_buffer_is_lost_by_clipping(
    engine: Engine,
    folder: Path,
    config: Gemma3Config,
    reference_model: Callable[[Path], Any],
    tmp_path: Path,
    share: float,
    normalised: bool,
) -> None:
    """Buffer + applied = buffer before + the gradient, clipped as an optimizer's state gets it."""
    start(engine, folder, replace(POWER, iterations=3, error_feedback=True, normalised=normalised), clip=1.0)
    before, held, path = moved(engine), {name: np.zeros_like(b) for name, b in buffers(engine).items()}, folder
    for step in range(3):
        truth = true_gradients(reference_model(path), batch(seed=step))
        truth = {name: g for name, g in truth.items() if name in held}
        inside.set_clip(engine, share * whole_norm(truth) if share < 1 else 0.0)
        assert engine.train_step([batch(seed=step)], RATE).grad_norm == pytest.approx(whole_norm(truth), rel=1e-3)
        engine.merge("fresh", seed=step)
        now, kept = moved(engine), buffers(engine)
        for name, buffer in kept.items():
            came_in = held[name] + share * truth[name]
            applied = (before[name] - now[name]) / RATE
            if normalised:
                out, inner = applied.shape
                assert np.linalg.norm(applied) == pytest.approx(np.sqrt(out / inner), rel=1e-3)
                v = directions(engine)[name]
                applied = np.outer(came_in @ v, v)
            close(buffer + applied, came_in, 1e-3, name)
        before, held, path = now, kept, tmp_path / str(step)
        engine.save_model(path, config.to_dict())


def test_a_buffer_stays_bounded_where_every_step_is_clipped(engine: Engine, folder: Path) -> None:
    """An update takes 1 / r of ‖M‖² at least, r the rank, so that ‖e‖ ≤ clip · q / (1 - q) with q = √(1 - 1 / r)."""
    start(engine, folder, replace(POWER, iterations=20, error_feedback=True), clip=1e-3)
    for step in range(30):
        engine.train_step([batch(seed=step % 3)], 0.0)
        engine.merge("fresh", seed=step)
    for name, buffer in buffers(engine).items():
        q = np.sqrt(1 - 1 / min(buffer.shape))
        assert 0 < np.linalg.norm(buffer) <= 1e-3 * q / (1 - q), name


def test_the_predicted_decrease_leaves_out_what_the_buffer_held(engine: Engine, folder: Path) -> None:
    settings = Rank1Settings(error_feedback=True, momentum=0.9)
    for clip in (0.0, 0.5):
        start(engine, folder, settings, clip)
        train(engine, [batch(seed=1)], 2, 0.0)
        before = engine.loss(batch())
        predicted = engine.train_step([batch()], 1e-3 if clip else 2e-4, observe=True).predicted
        measured = (before - engine.loss(batch())) / batch().supervised
        assert predicted == pytest.approx(measured, rel=0.05, abs=1e-6)


# ------------------------------------------------------------------------------------------------ several steps


def two_gradients(
    engine: Engine, folder: Path, rank1: Rank1Settings, config: Gemma3Config, reference: Any, saved: Path
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """For each of two merged steps: transformers' gradient, the change of the step, and v."""
    start(engine, folder, rank1)
    found, before, path = [], moved(engine), folder
    for step in range(2):
        truth = true_gradients(reference(path), batch(seed=step))
        engine.train_step([batch(seed=step)], RATE)
        v = directions(engine)
        engine.merge("fresh", seed=step)
        now = moved(engine)
        found.append((truth, {name: now[name] - before[name] for name in now}, v))
        before, path = now, saved / str(step)
        engine.save_model(path, config.to_dict())
    return found


@pytest.mark.parametrize(
    ("feedback", "momentum"), [(True, 0.0), (False, 0.9), (True, 0.9)], ids=["feedback", "momentum", "dion"]
)
def test_the_buffer_holds_what_its_rule_says(
    engine: Engine,
    folder: Path,
    config: Gemma3Config,
    reference_model: Callable[[Path], Any],
    tmp_path: Path,
    feedback: bool,
    momentum: float,
) -> None:
    settings = replace(POWER, error_feedback=feedback, momentum=momentum)
    first, second = two_gradients(engine, folder, settings, config, reference_model, tmp_path)
    for name, change in first[1].items():
        whole, v = first[0][name].astype(np.float64), first[2][name]
        pair = np.outer(whole @ v, v)
        close(change, -RATE * pair, 5e-3, name)
        close(pair, best(whole), 5e-3, name)
        kept = whole - (1 - momentum) * pair if feedback else momentum * whole
        whole, v = kept + second[0][name], second[2][name]
        close(second[1][name], -RATE * np.outer(whole @ v, v), 1e-2, name)
        # The direction is only near: the two leading values may be close to one another.
        assert np.linalg.norm(whole @ v) == pytest.approx(np.linalg.norm(whole, 2), rel=1e-3)


def test_the_direction_stays_until_the_merge(
    engine: Engine, folder: Path, config: Gemma3Config, reference_model: Callable[[Path], Any], tmp_path: Path
) -> None:
    start(engine, folder, POWER)
    engine.train_step([batch()], RATE)
    v, before = directions(engine), moved(engine)
    engine.save_model(tmp_path, config.to_dict())
    truth = true_gradients(reference_model(tmp_path), batch(seed=1))
    engine.train_step([batch(seed=1)], RATE)
    for name, change in moved(engine).items():
        np.testing.assert_array_equal(directions(engine)[name], v[name])
        close(change, before[name] - RATE * np.outer(truth[name] @ v[name], v[name]), 5e-3, name)
        assert rank(change) == 1
    engine.merge("fresh", seed=0)
    engine.train_step([batch(seed=2)], RATE)
    assert all(rank(change) == 2 for change in moved(engine).values())


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [Rank1Settings(), Rank1Settings(normalised=True), Rank1Settings(error_feedback=True)],
    ids=["power", "normalised", "feedback"],
)
def test_the_loss_falls_by_rank_1_updates_alone(
    engine: Engine, folder: Path, settings: Rank1Settings, period: int
) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(rank1=settings))
    frozen = {name: value for name, value in inside.weights(engine).items() if "proj" not in name}
    losses = []
    for step in range(10):
        losses += [result.loss for result in train(engine, [batch()], 1, 5e-2)]
        if step % period == 0:
            engine.merge("fresh", seed=step)
    assert losses[-1] < 0.9 * losses[0]
    after = inside.weights(engine)
    assert all(np.array_equal(after[name], value) for name, value in frozen.items())


def test_a_step_left_out_leaves_no_trace(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = inside.module(engine, "training")
    right = training.summed_loss
    losses = []
    for spoil in (False, True):
        start(engine, folder, Rank1Settings(error_feedback=True, momentum=0.5))
        found = train(engine, [batch()], 1, RATE)
        if spoil:
            with monkeypatch.context() as patch:
                patch.setattr(training, "summed_loss", lambda model, some: right(model, some) * float("inf"))
                assert not engine.train_step([batch()], RATE).applied
        found += train(engine, [batch()], 2, RATE)
        losses.append([result.loss for result in found])
    assert np.isfinite(losses[1]).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_its_state_is_a_tenth_of_loras(engine: Engine, folder: Path, config: Gemma3Config) -> None:
    sizes = []
    for settings in (TrainingSettings(LoRASettings(8, 16.0)), TrainingSettings(rank1=Rank1Settings())):
        engine.load(folder, "float32")
        engine.start_training(settings)
        train(engine, [batch()], 1)
        sizes.append(engine.optimizer_bytes())
    assert 0 < sizes[1] <= 0.1 * sizes[0]
    start(engine, folder, Rank1Settings(error_feedback=True))
    train(engine, [batch()], 1)
    weights = sum(out * inner for out, inner in config.linear_shapes().values()) * config.num_hidden_layers
    assert engine.optimizer_bytes() == sizes[1] + 4 * weights


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(
    "settings",
    [Rank1Settings(), Rank1Settings("sketch"), Rank1Settings(error_feedback=True, momentum=0.9, normalised=True)],
    ids=["power", "sketch", "dion"],
)
def test_both_engines_take_the_same_rank_1_steps(
    both_engines: tuple[Engine, Engine], folder: Path, settings: Rank1Settings, rest: bool
) -> None:
    losses = []
    for engine in both_engines:
        engine.load(folder, "float32")
        engine.start_training(TrainingSettings(rank1=settings, rest=rest, seed=2))
        found = []
        for step in range(6):
            found.append(engine.train_step([batch(seed=step)], 3e-3).loss)
            if step % 2:
                engine.merge("fresh", seed=step)
        losses.append(found)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
