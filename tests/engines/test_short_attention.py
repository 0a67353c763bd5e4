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


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_at_the_bound_keep_their_precision(sign: float) -> None:
    """Every query is along every key, or against it: the first row's only score is the least that there can be."""
    q, k, v = (x.detach().double() for x in drawn(1.0))
    q, k = torch.ones_like(q), sign * torch.linspace(0.5, 1, 7)[:, None].expand_as(k).flip(0).double()
    scale = 0.99 * module.SAFE_LOGIT / 4
    single, double = ([x.to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (torch.float32, torch.float64))
    assert module._is_safe(single[0].detach(), single[1].detach(), scale)
    short_attention(*single, scale).square().sum().backward()
    scaled_dot_product_attention(*double, is_causal=True, scale=scale).square().sum().backward()
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_scores_beyond_the_bound_are_left_to_torch() -> None:
    q, k, v = drawn(30.0)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(short_attention(q, k, v, 1.0), wanted)


def test_what_is_no_number_stays_with_the_rows_that_see_it() -> None:
    q, k, v = (x.detach() for x in drawn(1.0))
    k[:, :, -1] = float("nan")
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert wanted.isnan().any(), "the last row"
    assert not wanted.isnan().all()
    torch.testing.assert_close(short_attention(q, k, v, 1.0), wanted, equal_nan=True)


@pytest.mark.parametrize(("length", "dim"), [(8, 4), (7, 16)], ids=["long", "wide"])
def test_long_sequences_and_wide_heads_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, length: int, dim: int
) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr(module, "WEIGHTS_BYTES", 4 * 7 * 7)
    monkeypatch.setattr(module, "attention", lambda q, *_: asked.append(q) or q)
    q = torch.randn(2, 3, length, dim)
    assert short_attention(q, q, q, 1.0) is q
    assert len(asked) == 1
