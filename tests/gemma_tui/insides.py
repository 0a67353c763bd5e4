"""What tests of views take: a text on a random model, its weights as arrays, and dense formulas in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from engines.base import Engine
from engines.checkpoints import write_arrays
from engines.gemma3 import Gemma3Config
from gemma_tui.figure import Figure, Table
from gemma_tui.studies.attention.reading import Reading, read_tokens
from gemma_tui.tokenizer import BOS, Tokenizer

T = TypeVar("T")


def model(tiny_folder: Callable[..., Path], config: Gemma3Config, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """A random model, in which every part shows, with the vocabulary of the tests' tokenizer."""
    return tiny_folder(replace(config, vocab_size=tokenizer.size), seed)


def text_ids(length: int, seed: int = 0) -> list[int]:
    """``<bos>`` and tokens of which many repeat."""
    return [BOS, *(int(i) for i in np.random.default_rng(seed).integers(300, 324, length - 1))]


def reading_of(engine: Engine, folder: Path, tokenizer: Tokenizer, ids: list[int], dtype: str = "float32") -> Reading:
    engine.load(folder, dtype)
    return read_tokens(engine, tokenizer, ids)


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def without_head(folder: Path, target: Path, layer: int, heads: list[int], count: int) -> Path:
    """The model whose ``o_proj`` takes nothing from some heads, which is what their ablation says."""
    arrays = weights(folder)
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    matrix = arrays[name].copy()
    size = matrix.shape[1] // count
    for head in heads:
        matrix[:, head * size : (head + 1) * size] = 0
    target.mkdir()
    write_arrays(target / "model.safetensors", {**arrays, name: matrix})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def drained(steps: Generator[float, None, T]) -> tuple[T, list[float]]:
    """The result of a view, and the shares that were told on the way, which never fall."""
    shares = []
    while True:
        try:
            shares.append(next(steps))
        except StopIteration as end:
            assert shares == sorted(shares)
            return end.value, shares


def result(steps: Generator[float, None, T]) -> T:
    """What a view ends with; the shares grow up to 1."""
    found, shares = drained(steps)
    assert not shares or (shares[0] > 0 and abs(shares[-1] - 1) < 1e-9)
    return found


def run(view: Generator[float, None, Figure]) -> tuple[Figure, list[float]]:
    """The figure, and the shares that were told on the way, which end in 1."""
    figure, shares = drained(view)
    assert shares[0] > 0
    assert shares[-1] == 1
    json.dumps(figure.facts)
    return figure, shares


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of rows of log-probabilities, nats."""
    return (np.exp(p) * (p - q)).sum(-1)


def normed(h: np.ndarray, weight: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    h = h.astype(np.float64)
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + epsilon) * (1 + weight.astype(np.float64))


def rows(figure: Figure, kind: str) -> list[dict[str, Any]]:
    """The rows of a table by the names of their columns."""
    (table,) = (table for table in figure.tables if table.kind == kind)
    return [dict(zip(table.columns, row, strict=True)) for row in _checked(table)]


def _checked(table: Table) -> list[Any]:
    assert all(len(row) == len(table.columns) for row in table.rows)
    # Numbers of numpy's do not go into JSON.
    assert all(type(value) in (int, float, str) for row in table.rows for value in row)
    return list(table.rows)


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


def transformers_attention(folder: Path, ids: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What transformers' eager attention has in every layer, float64: weights ``[heads, T, T]``; queries and keys
    ``[heads or kv_heads, T, head_dim]``, normalised and rotated.
    """
    import torch
    from transformers import Gemma3ForCausalLM
    from transformers.models.gemma3 import modeling_gemma3

    network = Gemma3ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
    found, real = [], modeling_gemma3.eager_attention_forward

    def seen(module: Any, query: Any, key: Any, *rest: Any, **named: Any) -> Any:
        out, weights = real(module, query, key, *rest, **named)
        found.append(tuple(part[0].numpy() for part in (weights, query, key)))
        return out, weights

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_gemma3, "eager_attention_forward", seen)
        network.model(torch.tensor([list(ids)]))
    return found
