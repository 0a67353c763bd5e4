"""Batches and independent answers that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.adapters import Factors, LowRank, read_adapter, target_modules
from engines.base import Engine
from engines.errors import EngineError
from engines.gemma3 import Gemma3Config
from engines.training import IGNORED, Batch, GradientFacts, LoRASettings, StepResult

LORA = LoRASettings(rank=3, alpha=5.0)


def batch(length: int = 10, rows: int = 2, seed: int = 0, skip: int = 0) -> Batch:
    """Random text, of which every row's first ``skip`` targets are not supervised."""
    text = np.random.default_rng(seed).integers(0, 64, (rows, length + 1), dtype=np.int32)
    labels = text[:, 1:].copy()
    labels[:, :skip] = IGNORED
    return Batch(text[:, :-1].copy(), labels)


def rows_of(whole: Batch) -> list[Batch]:
    """Each row as a micro-batch."""
    return [Batch(whole.tokens[i : i + 1], whole.labels[i : i + 1]) for i in range(len(whole.tokens))]


def true_gradients(network: Any, some: Batch) -> dict[str, np.ndarray]:
    """The gradient of transformers' mean loss for every parameter, by the name without ``.weight``."""
    import torch

    network.zero_grad(set_to_none=True)
    logits = network(torch.from_numpy(some.tokens).long()).logits.flatten(0, 1)
    labels = torch.from_numpy(some.labels).long().flatten()
    torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED).backward()
    return {name.removesuffix(".weight"): p.grad.numpy() for name, p in network.named_parameters()}


def changes(engine: Engine) -> dict[str, np.ndarray]:
    """What ``updates`` tells, by name."""
    return {name: change for name, change, _ in engine.updates()}


def train(engine: Engine, batches: list[Batch], steps: int, rate: float = 1e-2) -> list[StepResult]:
    return [engine.train_step(batches, rate) for _ in range(steps)]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float, message: str = "") -> None:
    """‖found - expected‖ is at most ``tolerance`` of ‖expected‖."""
    error, size = np.linalg.norm(found - expected), np.linalg.norm(expected)
    assert size > 0, message
    assert error <= tolerance * size, f"{message}: off by {error / size:.2e}"


def facts(result: StepResult) -> dict[str, GradientFacts]:
    assert result.gradients is not None
    return dict(result.gradients)


def random_factors(config: Gemma3Config, lora: LoRASettings, seed: int = 0) -> Factors:
    """Factors of which none is zero."""
    generator = np.random.default_rng(seed)

    def small(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32) * np.float32(0.2)

    return {
        module: LowRank(small(lora.rank, inner), small(out, lora.rank), 1 + small(out) if lora.dora else None)
        for module, (out, inner) in target_modules(config, lora.targets, lora.layers).items()
    }


def refusal(folder: Path, config: Gemma3Config) -> str:
    """What is said of an adapter that is refused: one line, which names the folder."""
    with pytest.raises(EngineError) as caught:
        read_adapter(folder, config)
    message = str(caught.value)
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 2 * len(str(folder)) + 300
    return message
