"""Gemma-3 in torch.

Parameter names are Hugging Face's, so checkpoints load unchanged. Activations run in one dtype; weights may be
kept in another (float32 while they are trained) and are cast where they are used. The file mirrors
``engines/mlx/model.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engines.gemma3 import Gemma3Config, Rope
from engines.torch.attention import KVCache, Layout, Mask, attention, causal
from engines.torch.device import linear


class RMSNorm(nn.Module):
    """``x / rms(x) * (1 + w)`` over the last axis, computed in float32 and cast back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), gain.shape, gain, self.eps).to(x.dtype)


class Linear(nn.Module):
    """``x Wᵀ`` without bias; the weight is cast to the dtype of ``x``."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inner))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Token vectors times √hidden_size; √ is rounded to the activation dtype, as Hugging Face does."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, dim))
        self.scale = dim**0.5

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens, self.weight).to(dtype) * torch.tensor(self.scale, dtype=dtype)

    def as_linear(self, x: Tensor) -> Tensor:
        """The tied output head: logits ``[..., vocabulary]``."""
        return linear(x, self.weight.to(x.dtype))


def rotations(positions: Tensor, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 ``[..., length, head_dim]``, of the half-split rotary embedding.

    Source: RoFormer (arXiv:2104.09864), equation 34, in the half-split order of Hugging Face; linear scaling
    divides the positions (arXiv:2306.15595).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents) / rope.factor
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys ``[batch, heads, length, head_dim]`` to their positions."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


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

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.join(attention(q, k, v, self.scale, mask))

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[batch, heads, length, head_dim]``, keys and values, as they meet each other."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        return rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation), v

    def join(self, y: Tensor) -> Tensor:
        """The outputs of the heads ``[batch, heads, length, head_dim]``, side by side, through ``o_proj``."""
        batch, _, length, _ = y.shape
        if self.silent:
            y = y.index_fill(1, torch.tensor(self.silent, device=y.device), 0)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """``down(gelu_tanh(gate(x)) * up(x))``."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self.down(gate, up)
        # Activation and product would be two of the widest tensors of a layer; computing them again is cheap.
        return checkpoint(self.down, gate, up, use_reentrant=False)

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """The second half, which is computed again on the way back."""
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


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

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
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
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma3(nn.Module):
    """The text model with its tied head.

    Args:
        dtype: dtype of the activations.
    """

    def __init__(self, config: Gemma3Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.checkpoint_activations = False
        self.model = Decoder(config)

    def forward(self, tokens: Tensor, cache: list[KVCache] | None = None, layout: Layout | None = None) -> Tensor:
        """Final-normed hidden states ``[batch, length, hidden]`` of int64 tokens ``[batch, length]``.

        Args:
            cache: one per layer; tokens then follow those already in it.
            layout: where tokens stand and what they see; None for a text.
        """
        config, start = self.config, cache[0].length if cache else 0
        layout = layout or causal(start, tokens.shape[1], config.sliding_window, tokens.device)
        ropes = {config.rope_local, config.rope_global}
        rotation = {rope: rotations(layout.places, rope, config.head_dim) for rope in ropes}
        x = self.model.embed_tokens(tokens, self.dtype)
        for i, layer in enumerate(self.model.layers):
            arguments = (rotation[config.rope(i)], layout.masks[config.window(i)], cache[i] if cache else None)
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, *arguments, use_reentrant=False)
            else:
                x = layer(x, *arguments)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token ``[..., vocabulary]``."""
        return self.model.embed_tokens.as_linear(hidden)

    def make_cache(self) -> list[KVCache]:
        """An empty cache, windowed on local layers."""
        return [KVCache(self.config.window(i)) for i in range(self.config.num_hidden_layers)]
