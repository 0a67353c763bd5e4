"""Sinks and massive activations against whole matrices and the residual stream itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from insides import dense, load, reading, result

from engines import open_engine
from engines.inspection import LayerStatistics
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import resolve
from gemma_tui.studies.attention.reading import read
from gemma_tui.studies.attention.sinks import FP16_MAX, column_mass, measure, sinks, value_drain
from gemma_tui.tokenizer import BOS, read_tokenizer

WINDOW, LENGTH, EPSILON = 8, 30, 0.2


@pytest.fixture
def inside(two_to_one: Any, tokenizer: Any, tiny_folder: Any) -> Any:
    engine = open_engine("torch")
    load(engine, two_to_one, tokenizer, tiny_folder)
    return reading(engine, tokenizer, LENGTH)


def alpha(a: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """``[heads, T]``: by the rows that see a key, and Gu's code: column sums over arange(T, 0, -1)."""
    length = a.shape[1]
    seen = [[q for q in range(k, length) if window is None or q - k < window] for k in range(length)]
    by_rows = np.stack([a[:, rows, k].mean(1) for k, rows in enumerate(seen)], axis=1)
    return by_rows, a.sum(1) / np.arange(length, 0, -1)


def test_column_mass_is_gus_and_that_of_the_rows_that_see(inside) -> None:
    for layer in range(3):
        window = inside.inspection.config.window(layer)
        found, expected = column_mass(inside.statistics(layer), window), alpha(dense(inside, layer), window)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(found[0] - found[1]).max() == 0  # the last layer is global


def test_shares_count_heads_over_epsilon(inside) -> None:
    found = result(measure(inside, EPSILON))
    pairs = [alpha(dense(inside, layer), inside.inspection.config.window(layer)) for layer in range(3)]
    seen, gu = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    np.testing.assert_allclose(found.share, (seen > EPSILON).mean(0))
    np.testing.assert_allclose(found.share_gu, (gu > EPSILON).mean(0))
    np.testing.assert_allclose(found.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.first_gu.ravel(), gu[:, 0], rtol=1e-5)
    assert 0 < found.share.sum() != found.share_gu.sum()


@pytest.mark.parametrize("length", [2, 3, 6, 7])
def test_drain_is_a_norm_over_the_median_of_the_others(length: int) -> None:
    norms = np.random.default_rng(length).integers(1, 5, (2, length)).astype(np.float32)
    expected = [[row[k] / np.median(np.delete(row, k)) for k in range(length)] for row in norms]
    np.testing.assert_allclose(value_drain(_with_norms(norms)), expected)
    assert np.isnan(value_drain(_with_norms(norms[:, :1]))).all()


def _with_norms(norms: np.ndarray) -> LayerStatistics:
    return LayerStatistics(*[np.zeros(0)] * 11, value_norm=norms)


def test_the_stream_is_told_before_each_layer_and_after_the_last(inside) -> None:
    figure = result(sinks(inside, EPSILON))
    layers, massive = figure.tables[1], figure.tables[2]
    assert [row[0] for row in layers.rows] == ["L0", "L1", "L2", "after L2"]
    assert len(massive.rows) == 4 * 3
    for layer, row in enumerate(layers.rows):
        h = inside.inspection.stream(layer, (0, LENGTH)).astype(np.float64)
        median = np.sort(np.abs(h), axis=None)[(h.size - 1) // 2]
        assert row[-3:] == pytest.approx((np.sqrt((h**2).mean()), np.abs(h).max(), np.abs(h).max() / median), rel=1e-5)
        _, value, position, token, dimension, _ = massive.rows[3 * layer]
        assert abs(h[position, dimension]) == pytest.approx(value)
        assert token == inside.labels[position]
    fp16 = next(chart for chart in figure.charts if chart.title == "largest |h|").series[-1]
    assert list(fp16.y) == [FP16_MAX, FP16_MAX] == [65504, 65504]
    assert not any("fp16" in note for note in figure.notes)


def test_without_bos_is_the_same_text_read_again(inside) -> None:
    figure = result(sinks(inside, EPSILON, compare=True))
    rows = figure.tables[3].rows
    assert [row[:2] for row in rows] == [("with <bos>", inside.labels[0]), ("without <bos>", inside.labels[1])]
    other = inside.engine.inspect(inside.tokens[1:])
    gu = [other.statistics(layer).received[:, 0] / (LENGTH - 1) for layer in range(3)]
    assert rows[1][5] == pytest.approx(np.mean(gu), rel=1e-5)
    assert inside.tokens[0] == BOS


def test_columns_that_few_rows_follow_are_not_ranked(inside) -> None:
    rows = result(sinks(inside, EPSILON, top=99)).tables[0].rows
    assert rows[0][0] == 0
    assert max(row[0] for row in rows) == LENGTH - 15
    assert [row[3] for row in rows[1:]] == sorted((row[3] for row in rows[1:]), reverse=True)


def test_a_stream_beyond_fp16_is_told(two_to_one, tokenizer, tiny_folder) -> None:
    from engines.checkpoints import read_arrays, write_arrays

    engine = open_engine("torch")
    folder = load(engine, two_to_one, tokenizer, tiny_folder)
    arrays = read_arrays(folder / "model.safetensors")
    arrays["model.embed_tokens.weight"] *= 1e5
    write_arrays(folder / "model.safetensors", arrays)
    engine.load(folder, "float32")
    assert "fp16 ends at 65,504" in result(sinks(reading(engine, tokenizer, 9))).notes[-1]


def test_nano_sinks_on_bos_and_less_without_it() -> None:
    model = resolve("nano")
    engine = open_engine("torch")
    engine.load(model.folder, "float32")
    text = read(engine, read_tokenizer(model.folder), "The river ran past the old mill and down to the sea. " * 6)
    figure = result(sinks(text, 0.3, compare=True))
    with_bos, without = figure.tables[3].rows
    assert with_bos[2] > 0
    assert with_bos[4] > without[4]
    assert text.length > 64
    assert with_bos[4] > with_bos[5]  # Gu's divisor counts rows that a window keeps from seeing


@pytest.mark.parametrize("epsilon", [0.0, 1.0, float("nan")])
def test_an_epsilon_that_means_nothing_is_refused(inside, epsilon: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        result(sinks(inside, epsilon))
