"""Rollout against the product of transformers' dense matrices."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from insides import model, reading_of, rows, run, text_ids, transformers_attention

from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.rollout import CAVEAT, rollout_view

TOLERANCE = {"torch": 1e-6, "mlx": 1e-4}


def dense(weights: list[np.ndarray]) -> list[np.ndarray]:
    """R_l = Â_l R_(l-1), as Abnar & Zuidema's code multiplies, from the first layer up."""
    found: list[np.ndarray] = []
    for a in weights:
        mixed = 0.5 * a.mean(0) + 0.5 * np.eye(a.shape[1])
        found.append(mixed @ found[-1] if found else mixed)
    return found


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_rollout_is_the_product_of_the_layers(engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any) -> None:
    """140 tokens, so two tiles; the window is 8."""
    folder, ids = model(tiny_folder, two_to_one, tokenizer), text_ids(140)
    reading = reading_of(engine, folder, tokenizer, ids)
    wanted = dense([weights for weights, _, _ in transformers_attention(folder, ids)])
    for position in (0, 7, 133, 139):
        figure, _ = run(rollout_view(reading, position))
        found = figure.arrays["rollout"]
        assert found.shape == (3, position + 1)
        for layer, product in enumerate(wanted):
            assert np.abs(found[layer] - product[position, : position + 1]).max() <= TOLERANCE[engine.name], layer
    expected = wanted[-1][139]
    listed = rows(figure, "source")
    assert [row["position"] for row in listed][:3] == np.argsort(-expected)[:3].tolist()
    for row in listed:
        assert row["rollout"] == pytest.approx(expected[row["position"]], abs=1e-4)
        assert row["token"] == reading.labels[row["position"]]
    heat, chart = figure.heats[0], {line.label: line.y for line in figure.charts[0].series}
    assert heat.values.shape == (3, 64)
    assert np.allclose(heat.values.sum(1), 1, atol=1e-5)
    assert chart["position 0"] == pytest.approx([product[139, 0] for product in wanted], abs=1e-4)
    assert chart["itself"] == pytest.approx([product[139, 139] for product in wanted], abs=1e-4)
    assert chart["beyond the window"] == pytest.approx([p[139, :132].sum() for p in wanted], abs=1e-4)
    # A layer reaches 7 tokens back through a window of 8.
    assert chart["beyond the window"][0] == 0 < chart["beyond the window"][2]
    assert [row["layer"] for row in rows(figure, "layer")] == ["local", "local", "global"]
    assert CAVEAT in figure.notes


def test_positions(torch_engine: Any, tiny_folder: Any, two_to_one: Any, tokenizer: Any) -> None:
    folder = model(tiny_folder, two_to_one, tokenizer)
    reading = reading_of(torch_engine, folder, tokenizer, text_ids(12))
    figure, _ = run(rollout_view(reading, -1))
    assert figure.facts["position"] == 11
    assert figure.heats[0].columns[3] == f"{reading.labels[3]} 3"
    with pytest.raises(UsageError, match="position 12 is not there"):
        run(rollout_view(reading, 12))
    alone = reading_of(torch_engine, folder, tokenizer, text_ids(1))
    assert run(rollout_view(alone, 0))[0].arrays["rollout"].tolist() == [[1.0]] * 3
