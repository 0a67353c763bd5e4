"""What heads do with bare tokens, in torch. The file mirrors ``engines/mlx/circuits.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from engines.inspection import Circuit
from engines.torch.model import Block, Gemma3, rotations

ROWS = 64
"""Tokens whose logits are there at a time."""

STRIP = 4
"""Tokens that pass after pass goes over, few enough to stay in a processor's cache."""


def circuit(
    model: Gemma3, layer: int, tokens: Tensor, scale: Tensor, count: int, tick: Callable[[], object]
) -> Circuit:
    """The output-value circuits of a layer's heads.

    Args:
        tokens: int64 ``[tokens]``.
        scale: float32 ``[hidden]``, what the norms after the heads multiply by.
        tick: called before each block of logits.
    """
    attention = _block(model, layer).self_attn
    _, _, v = _projected(model, layer, tokens)
    heads, group, size = attention.heads, attention.heads // attention.kv_heads, attention.head_dim
    found = []
    for head in range(heads):
        parts = []
        for values, ids in zip(v[head // group].split(ROWS), tokens.split(ROWS), strict=True):
            tick()
            z = values.new_zeros(len(ids), heads * size)
            z[:, head * size : (head + 1) * size] = values
            logits = model.logits((attention.o_proj(z) * scale).to(model.dtype)).float()
            strips = zip(logits.split(STRIP), ids.split(STRIP), strict=True)
            parts += [_columns(strip, some[:, None], count) for strip, some in strips]
        found.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return Circuit(*(torch.stack(column).cpu().numpy() for column in zip(*found, strict=True)))


def scores(model: Gemma3, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Between bare tokens, int64, at one place: float32 ``[heads, queries, keys]``."""
    attention = _block(model, layer).self_attn
    q, k = _projected(model, layer, queries)[0], _projected(model, layer, keys)[1]
    return q @ k.repeat_interleave(attention.heads // attention.kv_heads, 0).transpose(1, 2) * attention.scale


def _block(model: Gemma3, layer: int) -> Block:
    return cast("Block", model.model.layers[layer])


def _projected(model: Gemma3, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of bare tokens in float32 ``[heads or kv_heads, tokens, head_dim]``, not rotated."""
    block, config = _block(model, layer), model.config
    x = block.input_layernorm(model.model.embed_tokens(tokens, model.dtype).float())
    unmoved = rotations(torch.zeros_like(tokens), config.rope(layer), config.head_dim)
    q, k, v = block.self_attn.project(x[None], unmoved)
    return q[0], k[0], v[0]


def _columns(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, ...]:
    """The columns of a ``Circuit`` from logits ``[tokens, vocabulary]`` and tokens ``[tokens, 1]``."""
    logits = logits - logits.mean(-1, keepdim=True)
    most, least = logits.topk(count), logits.topk(count, largest=False)
    own = logits.gather(1, tokens)
    return (
        most.indices.int(), most.values, least.indices.int(), least.values,
        own[:, 0], (logits > own).sum(-1).int(), logits.square().mean(-1).sqrt(),
    )  # fmt: skip
