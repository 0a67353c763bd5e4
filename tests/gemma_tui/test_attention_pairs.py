"""A head's map, edges and searches against whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from insides import dense, load, reading, result

from engines import open_engine
from engines.errors import UnsupportedError
from gemma_tui.errors import UsageError
from gemma_tui.studies.attention.pairs import Shading, find_token, head_view, pair_map, readers, span_of, top_keys
from gemma_tui.studies.attention.reading import read

LOCAL, GLOBAL, HEAD, LENGTH = 0, 2, 1, 150


@pytest.fixture
def inside(two_to_one: Any, tokenizer: Any, tiny_folder: Any) -> Any:
    """150 tokens, so two tiles, with a window of 8."""
    engine = open_engine("torch")
    load(engine, two_to_one, tokenizer, tiny_folder)
    return reading(engine, tokenizer, LENGTH)


def shaded(a: np.ndarray, window: int | None, shading: Shading) -> np.ndarray:
    """Every weight by its definition; NaN where it is not visible."""
    shown = np.full(a.shape, np.nan)
    for q in range(len(a)):
        keys = [k for k in range(q + 1) if window is None or q - k < window]
        if shading.without_sink:
            keys = [k for k in keys if k > 0]
        total = sum(a[q, k] for k in keys) if shading.without_sink else 1.0
        highest = max((a[q, k] / total for k in keys), default=1.0) if shading.per_row else 1.0
        for k in keys:
            shown[q, k] = a[q, k] / total / highest
    return shown


def pooled(values: np.ndarray, found: Any, how: Any) -> np.ndarray:
    cells = np.full((len(found.query_edges) - 1, len(found.key_edges) - 1), np.nan)
    for i, j in np.ndindex(cells.shape):
        cell = values[found.query_edges[i] : found.query_edges[i + 1], found.key_edges[j] : found.key_edges[j + 1]]
        seen = cell[~np.isnan(cell)]
        cells[i, j] = how(seen) if seen.size else np.nan
    return cells


@pytest.mark.parametrize("layer", [LOCAL, GLOBAL])
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("without_sink", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_map_is_the_whole_matrix_pooled(inside, layer, pooling, without_sink, per_row) -> None:
    shading = Shading(pooling, per_row, without_sink, 0.5)
    found = result(pair_map(inside, layer, HEAD, (3, 149), (2, 141), (20, 33), shading))
    assert (found.query_edges[[0, -1]].tolist(), found.key_edges[[0, -1]].tolist()) == ([3, 149], [2, 141])
    assert found.weights.shape == (20, 33)
    whole = shaded(dense(inside, layer)[HEAD], inside.inspection.config.window(layer), shading)
    expected = pooled(whole, found, np.max if pooling == "max" else np.mean)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.values, np.sqrt(expected), rtol=1e-6, atol=1e-6)
    assert np.isnan(found.weights[0, -1])  # no key after the query


def test_what_a_window_hides_is_missing_and_not_zero(inside) -> None:
    found = result(pair_map(inside, LOCAL, HEAD, (100, 110), (90, 110), (99, 99)))
    q, k = np.arange(100, 110)[:, None], np.arange(90, 110)
    np.testing.assert_array_equal(np.isfinite(found.weights), (k <= q) & (q - k < 8))


@pytest.mark.parametrize("without_sink", [False, True])
def test_the_strongest_edges_are_those_of_the_whole_matrix(inside, without_sink: bool) -> None:
    whole = shaded(dense(inside, GLOBAL)[HEAD], None, Shading(without_sink=without_sink))
    whole[: 1 + without_sink] = np.nan  # they see one key, and have no choice
    shading = Shading(without_sink=without_sink, per_row=True)
    found = result(pair_map(inside, GLOBAL, HEAD, (0, 140), (1, 150), shading=shading, top=300)).strongest
    order = np.argsort(-np.nan_to_num(whole[:140, 1:], nan=-1), axis=None, kind="stable")[:300]
    assert [(e.query, e.key - 1) for e in found] == [divmod(int(place), 149) for place in order]
    assert found[7].weight == pytest.approx(whole[found[7].query, found[7].key])


def test_keys_and_readers_with_the_mass_of_the_rest(inside) -> None:
    a = dense(inside, GLOBAL)[HEAD]
    keys, seen = top_keys(inside, GLOBAL, HEAD, 140, 5), result(readers(inside, GLOBAL, HEAD, 20, 5))
    assert [e.key for e in keys.edges] == np.argsort(-a[140, :141], kind="stable")[:5].tolist()
    assert keys.rest + sum(e.weight for e in keys.edges) == pytest.approx(1, abs=1e-6)
    assert [e.query - 20 for e in seen.edges] == np.argsort(-a[20:, 20], kind="stable")[:5].tolist()
    assert seen.rest + sum(e.weight for e in seen.edges) == pytest.approx(a[:, 20].sum(), rel=1e-9)
    local = result(readers(inside, LOCAL, HEAD, 20, 99))
    assert sorted(e.query for e in local.edges) == list(range(20, 28))
    without = top_keys(inside, GLOBAL, HEAD, 140, 200, Shading(without_sink=True))
    assert min(e.key for e in without.edges) == 1
    assert sum(e.weight for e in without.edges) == pytest.approx(1)


def test_a_view_tells_what_was_done(inside) -> None:
    figure = result(
        head_view(inside, GLOBAL, HEAD, shape=(10, 12), shading=Shading(gamma=0.5), query=140, key=3, top=4)
    )
    assert figure.heats[0].values.shape == (10, 12)
    assert figure.heats[0].rows[0] == "0-14"
    assert [table.kind for table in figure.tables] == ["edge", "key", "reader"]
    assert figure.tables[1].rows[0][0] == 140
    assert {"layer": 2, "head": 1, "kind": "global", "gamma": 0.5}.items() <= figure.facts.items()
    assert any("15 × 13" in note for note in figure.notes)
    assert figure.arrays["weights"].shape == (10, 12)


def test_a_view_of_a_part_has_its_map_and_its_edges_and_reads_the_whole_text(inside) -> None:
    figure = result(
        head_view(inside, GLOBAL, HEAD, (99, 99), Shading(), query=149, key=3, top=9, queries=(30, 90), keys=(10, 60))
    )
    whole = shaded(dense(inside, GLOBAL)[HEAD], None, Shading())
    np.testing.assert_allclose(figure.arrays["weights"], whole[30:90, 10:60], rtol=1e-6)
    assert figure.arrays["query_edges"].tolist() == list(range(30, 91))
    assert figure.arrays["key_edges"].tolist() == list(range(10, 61))
    assert figure.title == "L2.H1, global, queries 30-89, keys 10-59"
    assert figure.heats[0].title.endswith("(across), queries 30-89, keys 10-59")
    assert (figure.heats[0].rows[0].split()[0], figure.heats[0].columns[-1].split()[0]) == ("30", "59")
    edges, keys, seen = (table.rows for table in figure.tables)
    order = np.argsort(-np.nan_to_num(whole[30:90, 10:60], nan=-1), axis=None, kind="stable")[:9]
    assert [(row[0], row[2]) for row in edges] == [(30 + int(i) // 50, 10 + int(i) % 50) for i in order]
    assert [row[2] for row in keys] == np.argsort(-whole[149], kind="stable")[:9].tolist()
    assert [row[0] for row in seen] == (3 + np.argsort(-whole[3:, 3], kind="stable")[:9]).tolist()
    assert {"queries": (30, 90), "keys": (10, 60)}.items() <= figure.facts.items()


def test_a_view_of_the_whole_text_says_nothing_of_parts(inside) -> None:
    assert result(head_view(inside, GLOBAL, HEAD, (9, 9), Shading(), queries=(0, LENGTH))).title == "L2.H1, global"


@pytest.mark.parametrize(
    ("text", "span"), [("", None), ("3:9", (3, 9)), (" 0:150 ", (0, 150)), (":9", (0, 9)), ("149:", (149, 150))]
)
def test_a_span_is_read_as_it_is_typed(text: str, span: Any) -> None:
    assert span_of(text, "keys", LENGTH) == span


@pytest.mark.parametrize(
    "text", ["9:3", "3:3", "0:151", "150:", ":0", "7", "-3:9", "3-9", "a:b", "1:2:3", "1_0:20", "²:9", "9" * 5000 + ":",
             "3:9\n\x1b[2J", " "],
)  # fmt: skip
def test_a_span_that_is_not_there_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^keys: ") as caught:
        span_of(text, "keys", LENGTH)
    assert len(str(caught.value)) < 200
    assert not set(str(caught.value)) & {"\n", "\x1b"}


def test_one_token_has_a_map(inside) -> None:
    found = result(pair_map(inside, GLOBAL, HEAD, (0, 1), (0, 1)))
    assert found.weights.tolist() == [[1.0]]
    assert found.strongest == []


def test_both_engines_give_the_map(engine, two_to_one, tokenizer, tiny_folder) -> None:
    load(engine, two_to_one, tokenizer, tiny_folder)
    text = reading(engine, tokenizer, 40)
    found = result(pair_map(text, LOCAL, HEAD, shape=(7, 9)))
    whole = shaded(dense(text, LOCAL)[HEAD], 8, Shading())
    np.testing.assert_allclose(found.weights, pooled(whole, found, np.max), rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (UsageError, {"shading": Shading("median")}),
        (UsageError, {"shading": Shading(gamma=0.0)}),
        (UsageError, {"shape": (0, 4)}),
        (UnsupportedError, {"head": 4}),
        (UnsupportedError, {"keys": (4, 4)}),
        (UnsupportedError, {"queries": (0, 151)}),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(inside, error, arguments) -> None:
    with pytest.raises(error) as caught:
        result(pair_map(inside, **{"layer": GLOBAL, "head": HEAD, **arguments}))
    assert "\n" not in str(caught.value)


def test_a_piece_of_text_is_found_across_tokens(inside, tokenizer) -> None:
    text = read(inside.engine, tokenizer, "The 3th fox jumps over 4 lazy dogs,\nand the dogs of 7 towns sleep on.")
    written = [tokenizer.token(int(t)).replace("▁", " ") for t in text.tokens]
    first = find_token(text.labels, "lazy DOGS")
    second = find_token(text.labels, "dogs", find_token(text.labels, "dogs"))
    for place, wanted in ((first, "lazy dogs"), (second, "dogs of 7")):
        after = "".join(written[place:])
        assert 0 <= after.find(wanted) < len(written[place])
    assert second > first
    assert find_token(text.labels, "<bos>") == 0
    for missing, after in (("cat", -1), ("", -1), ("dogs", text.length)):
        with pytest.raises(UsageError, match="is not"):
            find_token(text.labels, missing, after)
