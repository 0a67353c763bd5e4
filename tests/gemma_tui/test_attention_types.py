"""Types of heads against TransformerLens' stripes, written out on whole matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from insides import dense, load, result

from engines import open_engine
from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.reading import read_tokens
from gemma_tui.studies.attention.types import TYPES, Scores, card, halves, head_types, ordinary, repeated, scores
from gemma_tui.tokenizer import BOS, BYTE

WINDOW = 8


@pytest.fixture
def loaded(two_to_one: Any, tokenizer: Any, tiny_folder: Any) -> Any:
    engine = open_engine("torch")
    load(engine, two_to_one, tokenizer, tiny_folder)
    return engine


def stripes(a: np.ndarray, half: int) -> np.ndarray:
    """``[types, heads]`` as in TransformerLens' Main_Demo, on the tokens after ``<bos>``."""
    own = a[:, 1:, 1:]
    offsets = {"induction": 1 - half, "previous": -1, "duplicate": -half}
    return np.stack([own.diagonal(offsets[name], axis1=1, axis2=2).mean(1) for name in TYPES])


@pytest.mark.parametrize("half", [2, 7, 9, 70])
def test_scores_are_means_of_diagonals(engine, two_to_one, tokenizer, tiny_folder, half: int) -> None:
    load(engine, two_to_one, tokenizer, tiny_folder)
    ids = repeated(ordinary(tokenizer, tokenizer.size), half, np.random.default_rng(half))
    found = read_tokens(engine, tokenizer, ids.tolist())
    for layer in range(3):
        expected = stripes(dense(found, layer), half)
        np.testing.assert_allclose(scores(found.statistics(layer), half), expected, atol=1e-6)


def test_texts_repeat_ordinary_tokens_after_bos(tokenizer) -> None:
    ids = ordinary(tokenizer, 430)
    assert ids.min() >= 107
    assert ids.max() == 429
    assert not any(BYTE.fullmatch(tokenizer.token(int(i))) or "unused" in tokenizer.token(int(i)) for i in ids)
    assert len(ids) == 430 - 107 - 256
    text = repeated(ids, 20, np.random.default_rng(0))
    assert text[0] == BOS
    np.testing.assert_array_equal(text[1:21], text[21:])
    assert len(set(text.tolist())) == 21
    assert len(repeated(ids, 99, np.random.default_rng(0))) == 199


def test_local_heads_score_nothing_beyond_their_window(loaded, tokenizer) -> None:
    figure = result(head_types(loaded, tokenizer, texts=3))
    near, far = figure.arrays["induction_7"], figure.arrays["induction_9"]
    assert near.shape == (3, 3, 4)
    assert (near[:, :2] > 0).all()
    assert (far[:, :2] == 0).all()
    assert (figure.arrays["duplicate_9"][:, :2] == 0).all()
    assert (far[:, 2] > 0).all()
    assert "local head is 0, as the window demands" in figure.notes[-1]
    assert figure.facts["halves"] == [7, 9]
    assert len(figure.heats) == 6


def test_cards_have_the_mean_over_texts_and_its_interval(loaded, tokenizer) -> None:
    figure = result(head_types(loaded, tokenizer, texts=4, lengths=(7,), seed=3))
    again = result(head_types(loaded, tokenizer, texts=4, lengths=(7,), seed=3))
    table = figure.tables[0]
    assert table.rows == again.tables[0].rows
    assert len(table.rows) == 12
    assert [row[4] for row in table.rows] == sorted((row[4] for row in table.rows), reverse=True)
    first = dict(zip(table.columns, table.rows[0], strict=True))
    layer, head = (int(part[1:]) for part in first["head"].split("."))
    best = max(TYPES, key=lambda name: figure.arrays[f"{name}_7"][:, layer, head].mean())
    values = figure.arrays[f"{best}_7"][:, layer, head]
    assert first["score"] == pytest.approx(values.mean())
    assert first["interval"] == pytest.approx(3.182 * np.std(values, ddof=1) / 2)
    assert first["card"].startswith(first["head"])


def test_an_interval_holds_the_mean_in_95_of_100_cases() -> None:
    drawn = np.random.default_rng(0).normal(0, 1, (1, 5, 100, 200))
    found = Scores(7, drawn)
    assert np.mean(np.abs(found.mean) <= found.interval) == pytest.approx(0.95, abs=0.005)
    wide = Scores(7, np.random.default_rng(1).normal(0, 1, (1, 40, 100, 100)))
    assert np.mean(np.abs(wide.mean) <= wide.interval) == pytest.approx(0.95, abs=0.007)
    assert np.isnan(Scores(7, drawn[:, :1]).interval).all()


def test_a_card_is_short() -> None:
    assert card(4, 2, "induction", 0.812, 0.019) == "L4.H2 induction .81 ± .02"
    assert card(4, 2, "previous", 1.0, math.nan) == "L4.H2 previous 1.00"


def test_a_short_context_has_no_run_beyond_the_window(two_to_one, tokenizer, tiny_folder) -> None:
    engine = open_engine("torch")
    load(engine, two_to_one, tokenizer, tiny_folder, max_position_embeddings=18)
    assert halves(engine.model().config) == [7]
    assert "not told apart" in result(head_types(engine, tokenizer, texts=1)).notes[-1]
    load(engine, two_to_one, tokenizer, tiny_folder, max_position_embeddings=19)
    assert halves(engine.model().config) == [7, 9]


@pytest.mark.parametrize("arguments", [{"texts": 0}, {"lengths": (1,)}, {"lengths": (7, 256)}])
def test_what_measures_nothing_is_refused(loaded, tokenizer, arguments) -> None:
    with pytest.raises(UsageError, match="take"):
        result(head_types(loaded, tokenizer, **arguments))


def test_no_model_is_refused(tokenizer) -> None:
    engine = open_engine("torch")
    engine.unload()
    with pytest.raises(UsageError, match="no model"):
        result(head_types(engine, tokenizer))
