"""Training that goes on from disk: the steps after it are those that would have come, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oracles import batch, changes, facts

from engines.base import Engine
from engines.checkpoints import read_arrays, write_arrays
from engines.errors import CheckpointError
from engines.gemma3 import Gemma3Config
from engines.states import OPTIMIZER, PARAMETERS, PLACE, SEEN
from engines.training import LoRASettings, OptimizerSettings, Rank1Settings, TrainingSettings

TinyFolder = Callable[..., Path]

LORA = LoRASettings(rank=3, alpha=6.0)
DION = Rank1Settings(error_feedback=True, momentum=0.9)
METHODS = {
    "full": TrainingSettings(),
    "lora": TrainingSettings(LORA),
    "dropout": TrainingSettings(LoRASettings(3, 6.0, dropout=0.3), seed=7),
    "relora": TrainingSettings(LoRASettings(3, 6.0, dropout=0.1), merging=True, rest=True),
    "power": TrainingSettings(rank1=Rank1Settings()),
    "sketch": TrainingSettings(rank1=Rank1Settings("sketch"), rest=True),
    "dion": TrainingSettings(rank1=DION),
    "dora": TrainingSettings(LoRASettings(3, 6.0, dora=True)),
    "sgd": TrainingSettings(optimizer=OptimizerSettings("sgd")),
    "adafactor": TrainingSettings(LORA, rest=True, optimizer=OptimizerSettings("adafactor")),
    "muon": TrainingSettings(LORA, rest=True, optimizer=OptimizerSettings("muon", weight_decay=0.1)),
    "plain sgd": TrainingSettings(optimizer=OptimizerSettings("sgd", momentum=0.0)),
}


@pytest.fixture
def folder(config: Gemma3Config, tiny_folder: TinyFolder) -> Path:
    return tiny_folder(config, dtype="bfloat16")


def go_on(engine: Engine, steps: range) -> list[str]:
    """The losses of some steps, to the last bit; whatever can be merged is, after the second of each three."""
    found = []
    for step in steps:
        found.append(engine.train_step([batch(seed=step)], 1e-2).loss.hex())
        if step % 3 == 1 and mergeable(engine):
            engine.merge("fresh", seed=step)
    return found


def mergeable(engine: Engine) -> bool:
    settings = engine._settings  # type: ignore[attr-defined]
    return bool(settings.merging or settings.rank1)


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_bit_for_bit(engine: Engine, folder: Path, tmp_path: Path, method: str) -> None:
    """Three steps and one merge lie before it, and a rank-1 update that is pending."""
    engine.load(folder, "bfloat16" if method in ("relora", "dion") else "float32")
    engine.start_training(METHODS[method])
    go_on(engine, range(3))
    assert {path.name for path in engine.save_state(tmp_path)} == {PARAMETERS, OPTIMIZER, PLACE}
    expected, learnt = go_on(engine, range(3, 6)), changes(engine)
    engine.load(folder, "bfloat16" if method in ("relora", "dion") else "float32")
    engine.start_training(METHODS[method])
    engine.train_step([batch(seed=9)], 1e-2)
    engine.load_state(tmp_path)
    assert go_on(engine, range(3, 6)) == expected
    for name, change in changes(engine).items():
        np.testing.assert_array_equal(change, learnt[name], err_msg=name)


@pytest.mark.parametrize("method", ["lora", "power"])
def test_the_directions_that_were_seen_are_gone_on_from(
    engine: Engine, folder: Path, tmp_path: Path, method: str
) -> None:
    """So that the drift of a resumed run is the one it would have had."""
    engine.load(folder, "float32")
    engine.start_training(METHODS[method])
    engine.train_step([batch(seed=0)], 1e-2, observe=True)
    assert {path.name for path in engine.save_state(tmp_path)} == {PARAMETERS, OPTIMIZER, PLACE, SEEN}
    expected = facts(engine.train_step([batch(seed=1)], 1e-2, observe=True))
    engine.load(folder, "float32")
    engine.start_training(METHODS[method])
    engine.train_step([batch(seed=9)], 1e-2, observe=True)
    engine.load_state(tmp_path)
    assert facts(engine.train_step([batch(seed=1)], 1e-2, observe=True)) == expected


def test_a_state_from_before_any_observation_forgets_later_ones(engine: Engine, folder: Path, tmp_path: Path) -> None:
    engine.load(folder, "float32")
    engine.start_training(METHODS["lora"])
    engine.save_state(tmp_path)
    engine.train_step([batch()], 1e-2, observe=True)
    engine.load_state(tmp_path)
    assert {f.drift_v for f in facts(engine.train_step([batch()], 1e-2, observe=True)).values()} == {None}


@pytest.mark.parametrize("damage", ["half a pair", "another shape", "another matrix"])
def test_directions_of_another_training_are_refused(engine: Engine, folder: Path, tmp_path: Path, damage: str) -> None:
    engine.load(folder, "float32")
    engine.start_training(METHODS["lora"])
    engine.train_step([batch()], 1e-2, observe=True)
    engine.save_state(tmp_path)
    arrays = read_arrays(tmp_path / SEEN)
    name = next(iter(arrays))
    match damage:
        case "half a pair":
            del arrays[name]
        case "another shape":
            arrays[name] = arrays[name][1:].copy()
        case "another matrix":
            arrays[f"gone.{name}"] = arrays.pop(name)
    write_arrays(tmp_path / SEEN, arrays)
    with pytest.raises(CheckpointError, match="another training"):
        engine.load_state(tmp_path)


FILES = (PARAMETERS, OPTIMIZER, PLACE, SEEN)
NEEDED = (PARAMETERS, OPTIMIZER, PLACE)
"""The directions are not: a state from before any observation has none."""


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, damage) for name in FILES for damage in ("cut", "empty", "noise")), *((n, "missing") for n in NEEDED)],
)
def test_broken_files_are_refused_in_one_line(
    engine: Engine, folder: Path, tmp_path: Path, name: str, damage: str
) -> None:
    engine.load(folder, "float32")
    engine.start_training(METHODS["lora"])
    engine.train_step([batch()], 1e-2, observe=True)
    engine.save_state(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "noise":
            path.write_bytes(bytes(np.random.default_rng(0).integers(0, 256, len(content), dtype=np.uint8)))
    with pytest.raises(CheckpointError) as caught:
        engine.load_state(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["full", "power"])
def test_the_state_of_another_training_is_refused(engine: Engine, folder: Path, tmp_path: Path, method: str) -> None:
    engine.load(folder, "float32")
    engine.start_training(METHODS["lora"])
    engine.save_state(tmp_path)
    engine.start_training(METHODS[method])
    with pytest.raises(CheckpointError, match="another training"):
        engine.load_state(tmp_path)


def test_the_optimizer_of_another_training_is_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    engine.load(folder, "float32")
    engine.start_training(METHODS["lora"])
    engine.train_step([batch()], 1e-2)
    engine.save_state(tmp_path)
    write_arrays(tmp_path / OPTIMIZER, {"model.layers.9.gone.lora_A:exp_avg": np.zeros((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match="another training"):
        engine.load_state(tmp_path)


def test_the_state_of_another_optimizer_is_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    engine.load(folder, "float32")
    engine.start_training(METHODS["full"])
    engine.train_step([batch()], 1e-2)
    engine.save_state(tmp_path)
    engine.start_training(METHODS["sgd"])
    with pytest.raises(CheckpointError, match="another training"):
        engine.load_state(tmp_path)


@pytest.mark.parametrize("random", [{"cpu": "!", "mlx": "!"}, {"cpu": "AAAA", "mlx": "AAAA"}, {}])
def test_a_random_state_that_is_none_is_refused(
    engine: Engine, folder: Path, tmp_path: Path, random: dict[str, str]
) -> None:
    engine.load(folder, "float32")
    engine.start_training(METHODS["lora"])
    engine.save_state(tmp_path)
    place = json.loads((tmp_path / PLACE).read_text())
    (tmp_path / PLACE).write_text(json.dumps({**place, "random": random}))
    with pytest.raises(CheckpointError):
        engine.load_state(tmp_path)


def test_the_state_of_one_engine_is_refused_by_the_other(
    both_engines: tuple[Engine, Engine], folder: Path, tmp_path: Path
) -> None:
    for engine in both_engines:
        engine.load(folder, "float32")
        engine.start_training(METHODS["lora"])
        engine.train_step([batch()], 1e-2)
        (tmp_path / engine.name).mkdir()
        engine.save_state(tmp_path / engine.name)
    torch, mlx = both_engines
    for engine, other in ((torch, mlx), (mlx, torch)):
        with pytest.raises(CheckpointError):
            engine.load_state(tmp_path / other.name)
