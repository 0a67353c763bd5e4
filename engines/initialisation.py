"""Fresh weights from numpy generators, so that one seed gives both engines the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engines.gemma3 import Gemma3Config

INITIALIZER_RANGE = 0.02
"""Standard deviation of every matrix at the start, as in Hugging Face's Gemma-3."""


def gemma3_weights(config: Gemma3Config, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Parameter names and float32 arrays: matrices N(0, 0.02²), norms zero (their gain is 1 + w)."""
    generator = np.random.default_rng(seed)
    for name, shape in config.parameter_shapes().items():
        if len(shape) == 1:
            yield name, np.zeros(shape, np.float32)
        else:
            yield name, generator.standard_normal(shape, np.float32) * np.float32(INITIALIZER_RANGE)


def lora_factors(out: int, inner: int, rank: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``lora_A`` float32 ``[rank, in]``, uniform within ±1/√in (PEFT's Kaiming with a = √5), and a zero ``lora_B``."""
    bound = 1 / np.sqrt(inner)
    lora_a = generator.uniform(-bound, bound, (rank, inner)).astype(np.float32)
    return lora_a, np.zeros((out, rank), np.float32)


def unit_vector(length: int, generator: np.random.Generator) -> np.ndarray:
    """A float32 direction, uniform on the sphere."""
    vector = generator.standard_normal(length)
    return (vector / np.linalg.norm(vector)).astype(np.float32)
