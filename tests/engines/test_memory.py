"""What does not fit is refused before the machine swaps, with both numbers."""

from __future__ import annotations

import importlib

import pytest

from engines.base import Engine, LoRASettings, TrainingSettings
from engines.errors import EngineError
from engines.memory import ensure_memory, is_out_of_memory


def with_free_memory(monkeypatch: pytest.MonkeyPatch, engine: Engine, count: int) -> None:
    monkeypatch.setattr(importlib.import_module(f"engines.{engine.name}.device"), "free", lambda device: count)


def test_a_model_larger_than_memory_is_refused(engine, four_to_one, monkeypatch):
    with_free_memory(monkeypatch, engine, 4 * four_to_one.parameter_count() - 1)
    with pytest.raises(EngineError, match=r"needs 0\.0 GB of memory and 0\.0 GB are free"):
        engine.initialise(four_to_one, 0, "float32")


def test_half_the_bytes_of_a_weight_need_half_the_memory(engine, four_to_one, monkeypatch):
    with_free_memory(monkeypatch, engine, 2 * four_to_one.parameter_count())
    assert engine.initialise(four_to_one, 0, "bfloat16").dtype == "bfloat16"


def test_training_that_does_not_fit_is_refused(engine, four_to_one, monkeypatch):
    engine.initialise(four_to_one, 0)
    with_free_memory(monkeypatch, engine, 1000)
    for lora in (None, LoRASettings(4, 8.0)):
        with pytest.raises(EngineError, match="training needs"):
            engine.start_training(TrainingSettings(lora))


def test_what_fits_exactly_is_taken():
    ensure_memory("it", 5, 5)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[metal::malloc] Attempting to allocate: unable to allocate 1 bytes"),
    ],
)
def test_every_way_of_running_out_is_known(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
