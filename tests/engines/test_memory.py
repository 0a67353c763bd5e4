"""What does not fit is refused before the machine swaps, with both numbers."""

from __future__ import annotations

import gc
import importlib
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engines.base import Engine
from engines.errors import EngineError
from engines.gemma3 import Gemma3Config
from engines.memory import ensure_memory, is_out_of_memory, training_bytes
from engines.training import LoRASettings, Rank1Settings, TrainingSettings


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


def test_what_training_holds_is_counted(two_to_one: Gemma3Config) -> None:
    """q_proj of 3 layers, 64 x 64: masters of a bfloat16 model, the buffer with its gradient, factors of rank 4."""
    matrices, lora = 3 * 64 * 64, LoRASettings(4, 8.0, targets=("q_proj",))
    rank1 = Rank1Settings(targets=("q_proj",))
    held = partial(training_bytes, two_to_one)
    assert held(TrainingSettings(), 4) == 16 * two_to_one.parameter_count()
    assert held(TrainingSettings(lora), 2) == 16 * 3 * 4 * 128
    assert held(TrainingSettings(lora, merging=True), 2) == 16 * 3 * 4 * 128 + 2 * matrices
    assert held(TrainingSettings(rank1=rank1), 4) == 0
    assert held(TrainingSettings(rank1=replace(rank1, error_feedback=True)), 2) == 10 * matrices
    rest = 16 * (two_to_one.parameter_count() - matrices)
    assert held(TrainingSettings(rank1=rank1, rest=True), 4) == rest


def test_the_peak_is_what_was_in_use_for_a_moment_and_is_forgotten(engine: Engine, four_to_one: Gemma3Config) -> None:
    wide = replace(four_to_one, vocab_size=400_000)
    gc.collect()  # what earlier tests left would make room meanwhile
    engine.unload()
    size, before = 4 * wide.parameter_count(), engine.memory()
    engine.peak_memory(reset=True)
    engine.initialise(wide, 0, "float32")
    engine.unload()
    assert engine.peak_memory(reset=True) - before > 0.9 * size
    if engine.device().device != "cpu" or sys.platform == "linux":
        assert engine.peak_memory() - before < 0.5 * size


def test_what_was_freed_is_given_back_with_the_model(engine: Engine) -> None:
    """Small blocks under one that stays are what an allocator keeps."""
    blocks = [np.ones(8000) for _ in range(3000)]
    last, held = blocks.pop(), engine.memory()
    del blocks
    engine.unload()
    if engine.device().device == "cpu" and sys.platform == "linux":
        assert held - engine.memory() > 100_000_000
    assert last.sum() == 8000


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
