"""Attention of many short sequences, held against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engines.torch import short_attention as module
from engines.torch.short_attention import short_attention


def drawn(size: float, heads: int = 3, dim: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(size * torch.randn(5, heads, 7, dim, generator=generator)).requires_grad_() for _ in "qkv"]


@pytest.mark.parametrize("sequences", [4, 15, 100])
def test_values_and_gradients_are_those_of_torch_in_parts_of_any_size(
    monkeypatch: pytest.MonkeyPatch, sequences: int
) -> None:
    monkeypatch.setattr(module, "WEIGHTS_BYTES", sequences * 4 * 7 * 7)
    ours, theirs = drawn(1.0), drawn(1.0)
    above = torch.randn(5, 3, 7, 4, generator=torch.Generator().manual_seed(1))
    found = short_attention(*ours, 0.7)
    wanted = scaled_dot_product_attention(*theirs, is_causal=True, scale=0.7)
    torch.testing.assert_close(found, wanted)
    (found * above).sum().backward()
    (wanted * above).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_scores_up_to_the_bound_keep_their_precision() -> None:
    q, k, v = (x.detach().double() for x in drawn(1.0))
    scale = 0.99 * module.SAFE_LOGIT / float(q.norm(dim=-1).amax() * k.norm(dim=-1).amax())
    single = [x.float().requires_grad_() for x in (q, k, v)]
    double = [x.requires_grad_() for x in (q, k, v)]
    assert module._is_safe(single[0].detach(), single[1].detach(), scale)
    short_attention(*single, scale).square().sum().backward()
    scaled_dot_product_attention(*double, is_causal=True, scale=scale).square().sum().backward()
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("size", [30.0, float("nan")])
def test_scores_beyond_the_bound_are_left_to_torch(size: float) -> None:
    q, k, v = drawn(size)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert torch.equal(short_attention(q, k, v, 1.0).isnan(), wanted.isnan())
    torch.testing.assert_close(short_attention(q, k, v, 1.0), wanted, equal_nan=True)
