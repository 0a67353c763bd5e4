"""The four optimizers against closed forms and across engines, and the pruning of their state."""

from __future__ import annotations

from pathlib import Path

import inside
import numpy as np
import pytest
from oracles import batch

from engines import UnsupportedError
from engines.base import Engine
from engines.checkpoints import read_arrays
from engines.pruning import pruned
from engines.states import OPTIMIZER
from engines.training import LoRASettings, OptimizerSettings, TrainingSettings

LORA = LoRASettings(rank=4, alpha=8.0)
OPTIMIZERS = ["adamw", "sgd", "adafactor", "muon"]


def start(engine: Engine, folder: Path, optimizer: OptimizerSettings, lora: LoRASettings | None = None) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(lora, rest=lora is not None, optimizer=optimizer, clip=0.0))


def mean_gradients(engine: Engine, seed: int) -> dict[str, np.ndarray]:
    some = batch(seed=seed)
    return {name: g.astype(np.float64) / some.supervised for name, g in inside.gradients(engine, some).items()}


# ------------------------------------------------------------------------------------------------ steps


def test_adamw_takes_its_steps_as_published(engine: Engine, folder: Path) -> None:
    """Algorithm 2 of arXiv:1711.05101."""
    rate, decay, (b1, b2), epsilon = 1e-2, 0.1, (0.8, 0.95), 1e-4
    start(engine, folder, OptimizerSettings("adamw", (b1, b2), epsilon, decay))
    expected = {name: value.astype(np.float64) for name, value in inside.weights(engine).items()}
    m = {name: np.zeros_like(value) for name, value in expected.items()}
    v = {name: np.zeros_like(value) for name, value in expected.items()}
    for t in (1, 2):
        for name, g in mean_gradients(engine, t).items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            if g.ndim > 1:
                expected[name] *= 1 - rate * decay
            expected[name] -= rate * m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + epsilon)
        engine.train_step([batch(seed=t)], rate)
    for name, value in inside.weights(engine).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_takes_its_steps_as_published(engine: Engine, folder: Path, momentum: float) -> None:
    """With heavy-ball momentum, whose first step is the gradient's own."""
    rate, decay = 1e-2, 0.1
    start(engine, folder, OptimizerSettings("sgd", weight_decay=decay, momentum=momentum))
    expected = {name: value.astype(np.float64) for name, value in inside.weights(engine).items()}
    m = {name: np.zeros_like(value) for name, value in expected.items()}
    for t in range(3):
        for name, g in mean_gradients(engine, t).items():
            m[name] = momentum * m[name] + g
            if g.ndim > 1:
                expected[name] *= 1 - rate * decay
            expected[name] -= rate * m[name]
        engine.train_step([batch(seed=t)], rate)
    for name, value in inside.weights(engine).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6, err_msg=name)


def test_adafactor_does_not_know_the_unit_of_the_gradient(engine: Engine, folder: Path) -> None:
    """Gradients of a large model are far smaller than those here."""
    found = []
    for unit in (1.0, 1e-3):
        start(engine, folder, OptimizerSettings("adafactor"))
        # The second is much smaller than the first, so that no step of it is as long as Adafactor allows.
        for share in (1.0, 0.1):
            inside.set_clip(engine, 0.5 * unit * share)
            engine.train_step([batch()], 1e-2)
        found.append(inside.weights(engine))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_is_decoupled_and_of_matrices_only(engine: Engine, folder: Path, optimizer: str) -> None:
    found = []
    for decay in (0.0, 0.5):
        start(engine, folder, OptimizerSettings(optimizer, weight_decay=decay))
        before = inside.weights(engine)
        engine.train_step([batch()], 1e-2)
        found.append(inside.weights(engine))
    for name, value in before.items():
        lost = 1e-2 * 0.5 * value if value.ndim > 1 else np.zeros_like(value)
        # Adafactor's steps are in proportion to the parameters, which are smaller by 0.5 % after the decay.
        np.testing.assert_allclose(found[1][name], found[0][name] - lost, rtol=0, atol=1e-4, err_msg=name)
        assert not np.array_equal(found[0][name], value), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_both_engines_take_the_same_steps(
    both_engines: tuple[Engine, Engine], folder: Path, optimizer: str, lora: LoRASettings | None
) -> None:
    losses = []
    for engine in both_engines:
        start(engine, folder, OptimizerSettings(optimizer, epsilon=1e-4, weight_decay=0.1), lora)
        losses.append([engine.train_step([batch(seed=step % 2)], 3e-3).loss for step in range(6)])
    assert losses[0][-2] < losses[0][0]
    # torch orthogonalises in bfloat16.
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2 if optimizer == "muon" else 2e-4)


def test_an_unknown_optimizer_is_refused(engine: Engine, folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"lion.*adamw, sgd, adafactor or muon"):
        start(engine, folder, OptimizerSettings("lion"))


# ------------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.9, 0.99, 1.0])
def test_magnitude_zeroes_its_exact_share_of_ties_too(ratio: float) -> None:
    for array in (np.ones((10, 20), np.float32), np.random.default_rng(0).normal(size=(10, 20))):
        kept = pruned(array, "magnitude", ratio, np.random.default_rng(0))
        assert (kept == 0).sum() == round(ratio * 200)
        assert np.array_equal(kept[kept != 0], array[kept != 0])
        assert np.abs(array[kept == 0]).max(initial=0) <= np.abs(array[kept != 0]).min(initial=np.inf)


def test_random_zeroes_about_its_share_by_seed() -> None:
    array = np.ones((100, 100), np.float32)
    kept = [pruned(array, "random", 0.9, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (kept[0] == 0).mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.9 * 0.1 / 1e4))
    assert np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])
    assert (array == 1).all()


def test_an_unknown_pruning_is_refused(engine: Engine, folder: Path) -> None:
    start(engine, folder, OptimizerSettings(), LORA)
    engine.train_step([batch()], 1e-3)
    with pytest.raises(UnsupportedError, match="magnitude, random, reset"):
        engine.prune_optimizer("smallest", 0.9, 0)


def state_of(engine: Engine, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    engine.save_state(folder)
    return read_arrays(folder / OPTIMIZER)


@pytest.mark.parametrize(
    ("how", "ratio", "low", "high"),
    [("magnitude", 0.75, 0.75, 0.75), ("random", 0.9, 0.88, 0.92), ("reset", 0.0, 1.0, 1.0)],
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_only_the_adapters_state_is_pruned(
    engine: Engine, folder: Path, tmp_path: Path, optimizer: str, how: str, ratio: float, low: float, high: float
) -> None:
    # Two steps: after one, the gradients of lora_A have been zero.
    start(engine, folder, OptimizerSettings(optimizer), LORA)
    for seed in range(2):
        engine.train_step([batch(seed=seed)], 1e-3)
    states = [state_of(engine, tmp_path / "before")]
    share = engine.prune_optimizer(how, ratio, seed=1)
    states.append(state_of(engine, tmp_path / "after"))
    # AdamW's first moment is zero where either was pruned.
    most = (high + (1 - (1 - high) ** 2)) / 2 + 0.01 if optimizer == "adamw" else high
    assert low - 1e-9 <= share <= most + 1e-9
    zero = total = 0
    for place, array in states[1].items():
        if "lora_" in place and array.ndim:
            zero, total = zero + (array == 0).sum(), total + array.size
        else:
            assert np.array_equal(array, states[0][place]), place
    assert share == zero / total
    assert any("lora_" not in place and array.ndim for place, array in states[0].items())
    assert engine.train_step([batch()], 1e-3).applied


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_a_step_after_a_restart_is_a_few_rates_long(engine: Engine, folder: Path, how: str) -> None:
    """B is zero then, and the gradient of A with it: a first moment without its second one would be over epsilon."""
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(LORA, merging=True))
    for seed in range(4):
        engine.train_step([batch(seed=seed)], 1e-3)
    engine.merge("fresh", 7)
    engine.prune_optimizer(how, 0.9, 7)
    before = {name: a for name, a in inside.weights(engine).items() if "lora_" in name}
    for step in range(2):
        engine.train_step([batch(seed=5 + step)], 1e-3 if step else 0.0)
    moved = max(np.abs(inside.weights(engine)[name] - a).max() for name, a in before.items())
    assert 1e-4 < moved < 0.05
