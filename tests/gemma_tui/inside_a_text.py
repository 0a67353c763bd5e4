"""Readings of texts on a tiny model, and its attention as whole matrices."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engines.base import Engine
from engines.gemma3 import Gemma3Config
from gemma_tui.studies.attention.reading import Reading, read_tokens
from gemma_tui.tokenizer import BOS, Tokenizer

T = TypeVar("T")


def load(engine: Engine, config: Gemma3Config, tokenizer: Tokenizer, tiny_folder: Any, **changes: Any) -> Path:
    """A tiny model with as many tokens as the tokenizer, on an engine."""
    folder = tiny_folder(replace(config, vocab_size=tokenizer.size, **changes))
    engine.load(folder, "float32")
    return folder


def reading(engine: Engine, tokenizer: Tokenizer, length: int, seed: int = 0) -> Reading:
    """``<bos>`` and random ordinary tokens, of which many come again."""
    ids = np.random.default_rng(seed).integers(370, 390, length - 1)
    return read_tokens(engine, tokenizer, [BOS, *ids.tolist()])


def dense(found: Reading, layer: int) -> np.ndarray:
    """float64 ``[heads, T, T]``."""
    heads = range(found.inspection.config.num_attention_heads)
    rows = [found.inspection.attention(layer, head, (0, found.length)) for head in heads]
    return np.stack(rows).astype(np.float64)


def run(steps: Generator[float, None, T]) -> T:
    """The result of a view, whose shares done must grow up to 1."""
    shares = []
    while True:
        try:
            shares.append(next(steps))
        except StopIteration as end:
            assert shares == sorted(shares)
            assert not shares or (shares[0] > 0 and abs(shares[-1] - 1) < 1e-9)
            return end.value
