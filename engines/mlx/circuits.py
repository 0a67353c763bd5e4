"""What heads do with bare tokens, in MLX. The file mirrors ``engines/torch/circuits.py``."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from engines.inspection import Circuit
from engines.mlx.model import Gemma3, rotations

ROWS = 64
"""Tokens whose logits are there at a time."""

STRIP = 4
"""Tokens that pass after pass goes over, few enough to stay in a processor's cache."""


def circuit(
    model: Gemma3, layer: int, tokens: mx.array, scale: mx.array, count: int, tick: Callable[[], object]
) -> Circuit:
    """The output-value circuits of a layer's heads.

    Args:
        tokens: int32 ``[tokens]``.
        scale: float32 ``[hidden]``, what the norms after the heads multiply by.
        tick: called before each block of logits.
    """
    attention = model.model.layers[layer].self_attn
    _, _, v = _projected(model, layer, tokens)
    heads, group, size = attention.heads, attention.heads // attention.kv_heads, attention.head_dim
    found = []
    for head in range(heads):
        parts = []
        for values, ids in zip(_split(v[head // group], ROWS), _split(tokens, ROWS), strict=True):
            tick()
            z = mx.zeros((ids.size, heads * size))
            z[:, head * size : (head + 1) * size] = values
            logits = model.logits((attention.o_proj(z) * scale).astype(model.dtype)).astype(mx.float32)
            mx.eval(logits)
            for strip, some in zip(_split(logits, STRIP), _split(ids, STRIP), strict=True):
                parts.append(_columns(strip, some[:, None], count))
                mx.eval(parts[-1])
        found.append([mx.concatenate(list(column)) for column in zip(*parts, strict=True)])
    return Circuit(*(np.array(mx.stack(list(column))) for column in zip(*found, strict=True)))


def scores(model: Gemma3, layer: int, queries: mx.array, keys: mx.array) -> mx.array:
    """Between bare tokens, int32, at one place: float32 ``[heads, queries, keys]``."""
    attention = model.model.layers[layer].self_attn
    q, k = _projected(model, layer, queries)[0], _projected(model, layer, keys)[1]
    return q @ mx.repeat(k, attention.heads // attention.kv_heads, axis=0).swapaxes(1, 2) * attention.scale


def _projected(model: Gemma3, layer: int, tokens: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of bare tokens in float32 ``[heads or kv_heads, tokens, head_dim]``, not rotated."""
    block, config = model.model.layers[layer], model.config
    x = block.input_layernorm(model.model.embed_tokens(tokens, model.dtype).astype(mx.float32))
    unmoved = rotations(mx.zeros_like(tokens), config.rope(layer), config.head_dim)
    q, k, v = block.self_attn.project(x[None], unmoved)
    return q[0], k[0], v[0]


def _split(array: mx.array, size: int) -> list[mx.array]:
    return [array[start : start + size] for start in range(0, array.shape[0], size)]


def _columns(logits: mx.array, tokens: mx.array, count: int) -> tuple[mx.array, ...]:
    """The columns of a ``Circuit`` from logits ``[tokens, vocabulary]`` and tokens ``[tokens, 1]``."""
    logits = logits - logits.mean(axis=-1, keepdims=True)
    (most, raised), (least, lowered) = _farthest(-logits, count), _farthest(logits, count)
    own = mx.take_along_axis(logits, tokens, axis=1)
    return (
        raised, -most, lowered, least,
        own[:, 0], (logits > own).sum(axis=-1).astype(mx.int32), mx.sqrt(mx.square(logits).mean(axis=-1)),
    )  # fmt: skip


def _farthest(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The lowest values of each row, the lowest first, and where they are, int32."""
    if not count:  # sorting is what takes time
        return mx.zeros((values.shape[0], 0)), mx.zeros((values.shape[0], 0), mx.int32)
    places = mx.argpartition(values, count - 1, axis=-1)[:, :count]
    found = mx.take_along_axis(values, places, axis=-1)
    order = mx.argsort(found, axis=-1)
    ordered = (mx.take_along_axis(array, order, axis=-1) for array in (found, places.astype(mx.int32)))
    return next(ordered), next(ordered)
