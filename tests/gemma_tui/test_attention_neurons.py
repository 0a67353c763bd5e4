"""Scores by rotary pair against transformers' own queries and keys, pair by pair in dense matrices."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from insides import model, reading_of, result, rows, run, text_ids, transformers_attention

from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.neurons import neurons_view, rotary_sums, wavelengths

TOLERANCE = {"torch": 1e-6, "mlx": 1e-4}
QUERY = 137


def dense(q: np.ndarray, k: np.ndarray, scale: float, window: int | None) -> dict[str, np.ndarray]:
    """Every contribution of one head, ``[pairs, T, T]``, and its statistics over the visible entries."""
    half, length = q.shape[1] // 2, len(q)
    parts = np.stack([scale * (np.outer(q[:, p], k[:, p]) + np.outer(q[:, p + half], k[:, p + half]))
                      for p in range(half)])  # fmt: skip
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    visible = parts[:, seen]
    scores = visible.sum(0)
    crossed = [np.cov(c, scores, bias=True)[0, 1] for c in visible]
    return {
        "parts": parts, "mean": visible.mean(1), "spread": visible.std(1), "share": np.array(crossed) / scores.var(),
    }  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("window", [8, 130])
def test_pairs_are_those_of_transformers(
    engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any, window: int
) -> None:
    """400 tokens, so four tiles; windows shorter and longer than one."""
    config = replace(two_to_one, sliding_window=window)
    folder, ids = model(tiny_folder, config, tokenizer), text_ids(400)
    reading, known = reading_of(engine, folder, tokenizer, ids), transformers_attention(folder, ids)
    for layer, head in ((0, 1), (2, 3)):
        figure, _ = run(neurons_view(reading, layer, head, QUERY))
        weights, q, k = known[layer]
        for other, (_, queries, keys) in enumerate(known):
            scale, seen = config.query_pre_attn_scalar**-0.5, config.window(other)
            for h in range(config.num_attention_heads):
                wanted = dense(queries[h], keys[h // 2], scale, seen)
                size = TOLERANCE[engine.name] * np.abs(wanted["parts"]).max()
                for name in ("mean", "spread"):
                    assert np.abs(figure.arrays[name][other, h] - wanted[name]).max() <= size, (other, h, name)
                assert np.abs(figure.arrays["share"][other, h] - wanted["share"]).max() <= 10 * TOLERANCE[engine.name]
        key = int(weights[head, QUERY].argmax())
        parts = dense(q[head], k[head // 2], scale, config.window(layer))["parts"]
        assert figure.facts["key"] == key
        found = figure.arrays["contribution"]
        assert np.abs(found - parts[:, QUERY, key]).max() <= 4 * TOLERANCE[engine.name] * np.abs(parts).max()
        assert figure.facts["score"] == pytest.approx(parts[:, QUERY, key].sum(), rel=1e-4)
        assert figure.facts["weight"] == pytest.approx(weights[head, QUERY, key], abs=1e-4)
        assert figure.facts["difference"] < 1e-5
        for row in rows(figure, "pair"):
            pair = row["pair"]
            assert row["dimensions"] == f"{pair}, {pair + 8}"
            assert row["contribution"] == found[pair]
            assert row["mean"] == figure.arrays["mean"][layer, head, pair]
        assert figure.charts[0].series[1].x == [math.log10(window)] * 2
    assert np.allclose(figure.arrays["share"].sum(-1), 1)


def test_wavelengths_are_those_of_the_rotation(two_to_one: Any) -> None:
    """After one wavelength a pair stands where it began; the global rotation is slowed down eightfold."""
    assert wavelengths(two_to_one, 0)[[0, 4]] == pytest.approx([2 * math.pi, 200 * math.pi])
    assert wavelengths(two_to_one, 2)[[0, 4]] == pytest.approx([16 * math.pi, 16_000 * math.pi])


def test_a_rotated_pair_comes_back_after_its_wavelength(two_to_one: Any) -> None:
    torch = pytest.importorskip("torch")
    from engines.torch.model import rotations

    for layer in (0, 2):
        lengths = torch.from_numpy(wavelengths(two_to_one, layer)[:4])
        cos, sin = rotations(lengths, two_to_one.rope(layer), two_to_one.head_dim)
        for pair in range(4):
            assert (float(cos[pair, pair]), float(sin[pair, pair + 8])) == pytest.approx((1, 0), abs=1e-3)


def test_the_key_may_be_named_and_must_be_seen(
    torch_engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any
) -> None:
    folder = model(tiny_folder, two_to_one, tokenizer)
    reading = reading_of(torch_engine, folder, tokenizer, text_ids(30))
    weights = reading.inspection.attention(1, 2, (20, 21))[0]
    figure, _ = run(neurons_view(reading, 1, 2, -10, 15))
    assert (figure.facts["query"], figure.facts["key"]) == (20, 15)
    assert figure.facts["weight"] == weights[15]
    assert f"weight {weights[15]:.4g}; " in figure.notes[0]
    for layer, key, words in ((1, 12, "it sees 13 to 20"), (2, 21, "it sees 0 to 20"), (1, 30, "is not there")):
        with pytest.raises(UsageError, match=words):
            run(neurons_view(reading, layer, 2, 20, key))
    with pytest.raises(UsageError, match=r"head L1\.H4 is not there"):
        run(neurons_view(reading, 1, 4, 20))


def test_one_token_has_scores_but_nothing_varies(
    torch_engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any
) -> None:
    folder = model(tiny_folder, two_to_one, tokenizer)
    reading = reading_of(torch_engine, folder, tokenizer, text_ids(1))
    figure, _ = run(neurons_view(reading, 2, 0, 0))
    assert np.isnan(figure.arrays["share"]).all()
    assert np.allclose(figure.arrays["mean"][2, 0], figure.arrays["contribution"])


def test_keys_that_leave_the_window_are_forgotten() -> None:
    """Early keys are huge, so that what is left of them would show."""
    generator = np.random.default_rng(3)
    q, k = generator.standard_normal((2, 600, 4)), generator.standard_normal((1, 600, 4))
    k[:, :100] *= 1e3
    late = result(rotary_sums(q[:, 100:], k[:, 100:], 0.5, 200))
    whole, early = result(rotary_sums(q, k, 0.5, 200)), dense(q[0], k[0], 0.5, 200)
    assert np.allclose(whole.mean[0], early["mean"], rtol=1e-9)
    assert np.allclose(late.share[0], dense(q[0, 100:], k[0, 100:], 0.5, 200)["share"], rtol=1e-9)
