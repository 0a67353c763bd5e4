"""Next-token decoding in MLX. The file mirrors ``engines/torch/decoding.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from engines.base import Sampling
from engines.mlx.model import Gemma3
from engines.sampling import choose

PREFILL = 512
"""Prompt tokens per forward pass, so that a long prompt needs no long square of scores."""


def generate(model: Gemma3, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yield tokens after the prompt, until ``max_tokens`` or a stop id, which is yielded too."""
    generator = np.random.default_rng(sampling.seed)
    cache = model.make_cache()
    tokens = mx.array([[int(token) for token in prompt]])
    for _ in range(sampling.max_tokens):
        for start in range(0, tokens.shape[1], PREFILL):
            hidden = model(tokens[:, start : start + PREFILL], cache)
            mx.eval(hidden)
        logits = model.logits(hidden[0, -1])
        token = int(logits.argmax()) if sampling.temperature == 0 else _draw(logits, sampling, generator)
        yield token
        if token in sampling.stop_ids:
            return
        tokens = mx.array([[token]])


def _draw(logits: mx.array, sampling: Sampling, generator: np.random.Generator) -> int:
    return choose(np.array(logits.astype(mx.float32)), sampling, generator)
