"""Gemma-3 in MLX.

Parameter names are Hugging Face's, so checkpoints load unchanged. Activations run in one dtype; weights may be
kept in another (float32 while they are trained) and are cast where they are used. The file mirrors
``engines/torch/model.py``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engines.gemma3 import Gemma3Config, Rope
from engines.mlx.attention import KVCache, Layout, Mask, attention, causal
from engines.mlx.packing import Packable


class RMSNorm(nn.Module):
    """``x / rms(x) * (1 + w)`` over the last axis, computed in float32 and cast back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((dim,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        gain = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), gain, self.eps).astype(x.dtype)


class Linear(Packable):
    """``x Wᵀ`` without bias; the weight is cast to the dtype of ``x``."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.times(x)


class Embedding(Packable):
    """Token vectors times √hidden_size; √ is rounded to the activation dtype, as Hugging Face does."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__(dim, vocabulary)
        self.scale = dim**0.5

    def __call__(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        return self.rows(tokens).astype(dtype) * mx.array(self.scale, dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied output head: logits ``[..., vocabulary]``."""
        return self.times(x)


def rotations(positions: mx.array, rope: Rope, head_dim: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines, float32 ``[..., length, head_dim]``, of the half-split rotary embedding.

    Source: RoFormer (arXiv:2104.09864), equation 34, in the half-split order of Hugging Face; linear scaling
    divides the positions (arXiv:2306.15595).
    """
    exponents = mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents) / rope.factor
    angles = positions.astype(mx.float32)[..., None] * frequencies
    angles = mx.concatenate([angles, angles], axis=-1)
    return mx.cos(angles), mx.sin(angles)


def rotate(x: mx.array, rotation: tuple[mx.array, mx.array]) -> mx.array:
    """Turn queries or keys ``[batch, heads, length, head_dim]`` to their positions."""
    cos, sin = (part.astype(x.dtype) for part in rotation)
    first, second = mx.split(x, 2, axis=-1)
    return x * cos + mx.concatenate([-second, first], axis=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; the scale is query_pre_attn_scalar^-½.

    Attributes:
        silent: heads whose outputs are zero for now.
    """

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        d, hd = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, hd
        self.scale = config.query_pre_attn_scalar**-0.5
        self.silent: tuple[int, ...] = ()
        self.q_proj = Linear(d, self.heads * hd)
        self.k_proj = Linear(d, self.kv_heads * hd)
        self.v_proj = Linear(d, self.kv_heads * hd)
        self.o_proj = Linear(self.heads * hd, d)
        self.q_norm = RMSNorm(hd, config.rms_norm_eps)
        self.k_norm = RMSNorm(hd, config.rms_norm_eps)

    def __call__(self, x: mx.array, rotation: tuple[mx.array, mx.array], mask: Mask, cache: KVCache | None) -> mx.array:
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.join(attention(q, k, v, self.scale, mask))

    def project(self, x: mx.array, rotation: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        """Queries ``[batch, heads, length, head_dim]``, keys and values, as they meet each other."""
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim).swapaxes(1, 2)
        k = self.k_proj(x).reshape(batch, length, self.kv_heads, self.head_dim).swapaxes(1, 2)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.head_dim).swapaxes(1, 2)
        return rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation), v

    def join(self, y: mx.array) -> mx.array:
        """The outputs of the heads ``[batch, heads, length, head_dim]``, side by side, through ``o_proj``."""
        batch, _, length, _ = y.shape
        if self.silent:
            y = mx.array(y)
            y[:, mx.array(self.silent)] = 0
        return self.o_proj(y.swapaxes(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """``down(gelu_tanh(gate(x)) * up(x))``."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and MLP, each normalised before and after, added to the residual stream.

    Attributes:
        mlp_off: whether the MLP adds nothing for now.
    """

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.mlp_off = False
        self.input_layernorm = RMSNorm(d, eps)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.pre_feedforward_layernorm = RMSNorm(d, eps)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def __call__(self, x: mx.array, rotation: tuple[mx.array, mx.array], mask: Mask, cache: KVCache | None) -> mx.array:
        y = self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        x = x + self.post_attention_layernorm(y)
        if self.mlp_off:
            return x
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma3(nn.Module):
    """The text model with its tied head.

    Args:
        dtype: dtype of the activations.
    """

    def __init__(self, config: Gemma3Config, dtype: mx.Dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.checkpoint_activations = False
        self.model = Decoder(config)

    def __call__(self, tokens: mx.array, cache: list[KVCache] | None = None, layout: Layout | None = None) -> mx.array:
        """Final-normed hidden states ``[batch, length, hidden]`` of int32 tokens ``[batch, length]``.

        Args:
            cache: one per layer; tokens then follow those already in it.
            layout: where tokens stand and what they see; None for a text.
        """
        config, start = self.config, cache[0].length if cache else 0
        layout = layout or causal(start, tokens.shape[1], config.sliding_window)
        ropes = {config.rope_local, config.rope_global}
        rotation = {rope: rotations(layout.places, rope, config.head_dim) for rope in ropes}
        x = self.model.embed_tokens(tokens, self.dtype)
        for i, layer in enumerate(self.model.layers):
            arguments = (rotation[config.rope(i)], layout.masks[config.window(i)], cache[i] if cache else None)
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, *arguments)
            else:
                x = layer(x, *arguments)
        return self.model.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """Scores of the next token ``[..., vocabulary]``."""
        return self.model.embed_tokens.as_linear(hidden)

    def make_cache(self) -> list[KVCache]:
        """An empty cache, windowed on local layers."""
        return [KVCache(self.config.window(i)) for i in range(self.config.num_hidden_layers)]


def checkpoint(layer: Block, x: mx.array, *arguments: Any) -> mx.array:
    """Run a layer whose activations are computed again in the backward pass instead of being kept."""

    def forward(parameters: dict, x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, *arguments)

    return mx.checkpoint(forward)(layer.trainable_parameters(), x)
