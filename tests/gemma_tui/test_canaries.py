"""Canaries in data and their exposure, against whole spaces; tags of sequences against hand-made data."""

from __future__ import annotations

import math
import zlib
from collections import Counter

import numpy as np
import pytest

from gemma_tui.errors import UsageError
from gemma_tui.rows import TextRow
from gemma_tui.studies.memorization import canaries, tags
from gemma_tui.studies.memorization.canaries import SPACES, Canary, CanarySpace, exposure, plant, strings_beside

SMALL = CanarySpace("small", ("a", "b", "c"), 4)
DATA = [TextRow(f"row {number}") for number in range(30)]


def test_space_is_what_it_enumerates() -> None:
    every = list(SMALL.every())
    assert len(set(every)) == SMALL.size == 81
    assert SMALL.bits == pytest.approx(math.log2(81), abs=1e-12)
    assert every[:2] == ["a a a a", "a a a b"]
    assert set(SMALL.sample(81, seed=1)) == set(every)
    assert set(SMALL.sample(20, seed=1)) < set(every)
    assert SMALL.sample(20, seed=1) == SMALL.sample(20, seed=1) != SMALL.sample(20, seed=2)
    assert len(set(SPACES["digits"].sample(500, 0))) == 500
    with pytest.raises(UsageError, match="81 strings, not 82"):
        SMALL.sample(82, 0)
    with pytest.raises(UsageError, match="too many to list"):
        SPACES["letters"].every()


@pytest.mark.parametrize("count", [2, 60])
def test_samples_are_uniform(count: int) -> None:
    """Both ways of sampling, each string as often as the others: chi-squared of 80 degrees, mean 80, deviation 13."""
    seen = Counter(text for seed in range(1200 // count) for text in SMALL.sample(count, seed))
    expected = sum(seen.values()) / 81
    squared = sum((seen[text] - expected) ** 2 / expected for text in SMALL.every())
    assert squared < 80 + 4 * 13


def test_spaces_that_cannot_tell_strings_apart_are_refused() -> None:
    for symbols, separator in ((("a", "a"), " "), (("a",), " "), (("a", "ab"), ""), (("a", "b c"), " ")):
        with pytest.raises(UsageError):
            CanarySpace("bad", symbols, 3, separator)
    with pytest.raises(UsageError, match="frame"):
        CanarySpace("bad", ("a", "b"), 3, frame="no place")
    assert CanarySpace("braces", ("{}", "[]"), 2, "", "say {}").text([0, 1]) == "say {}[]"


def test_planted_rows_hold_the_data_and_each_canary_as_often_as_asked() -> None:
    planted = plant(DATA, SMALL, (0, 1, 5), per_repeat=3, seed=4)
    texts = [row.text for row in planted.rows]
    assert [text for text in texts if text.startswith("row")] == [row.text for row in DATA]
    assert len(texts) == 30 + 3 * (0 + 1 + 5)
    for canary, places in zip(planted.canaries, planted.places, strict=True):
        assert texts.count(canary.text) == canary.repeats == len(places)
        assert all(texts[place] == canary.text for place in places)
    assert [canary.repeats for canary in planted.canaries] == [0, 0, 0, 1, 1, 1, 5, 5, 5]
    assert planted == plant(DATA, SMALL, (0, 1, 5), per_repeat=3, seed=4)
    assert planted != plant(DATA, SMALL, (0, 1, 5), per_repeat=3, seed=5)
    spread = [place for places in planted.places for place in places]
    assert min(spread) < 12
    assert max(spread) > 36
    first = [places[0] for places in planted.places if places]
    assert first != sorted(first), "canaries do not come in the order they were drawn"
    with pytest.raises(UsageError, match="already"):
        plant([TextRow(planted.canaries[0].text)], SMALL, (0, 1, 5), per_repeat=3, seed=4)
    with pytest.raises(UsageError, match="at least 0"):
        plant(DATA, SMALL, (-1,))


def test_exposure_among_all_strings_is_exact() -> None:
    """Every string of an enumerated space in turn: rank k has log₂(81/k) bits."""
    every = list(SMALL.every())
    losses = dict(zip(every, np.random.default_rng(0).permutation(81).astype(float), strict=True))
    for text in every:
        beside = strings_beside(SMALL, [Canary(text, 1)], 1000)
        assert sorted([*beside, text]) == every
        found = exposure(losses[text], np.array([losses[other] for other in beside]))
        assert found.rank == losses[text] + 1
        assert found.ceiling == math.log2(81)
        assert found.bits == pytest.approx(math.log2(81) - math.log2(losses[text] + 1), abs=1e-12)
    assert exposure(-1.0, np.arange(80.0)).bits == math.log2(81), "rank 1 shows all that can be seen"


def test_a_model_that_knows_nothing_exposes_nothing() -> None:
    alike = exposure(2.0, np.full(1023, 2.0))
    assert (alike.rank, alike.ceiling) == (512.5, 10)
    assert alike.bits == pytest.approx(math.log2(1024 / 512.5), abs=1e-12)
    uniform = [exposure(rank + 0.5, np.arange(999.0)).bits for rank in range(-1, 999)]
    assert np.mean(uniform) == pytest.approx(math.log2(math.e), abs=0.01), "about 1.44 bits on average"
    with pytest.raises(UsageError, match="losses"):
        exposure(1.0, np.array([]))
    with pytest.raises(UsageError, match="losses"):
        exposure(math.nan, np.ones(3))


def test_strings_to_rank_against_are_never_canaries() -> None:
    planted = plant(DATA, SMALL, (1, 2), per_repeat=10)
    beside = strings_beside(SMALL, planted.canaries, 40)
    assert len(set(beside)) == 40
    assert not set(beside) & {canary.text for canary in planted.canaries}
    assert len(strings_beside(SMALL, planted.canaries, 500)) == 81 - 20


def test_exposure_against_repeats() -> None:
    planted = [Canary("a", 4), Canary("b", 0), Canary("c", 4), Canary("d", 1)]
    losses = {"a": 0.0, "b": 7.5, "c": 0.5, "d": 2.5}
    found = canaries.exposures(planted, losses, np.arange(1.0, 8.0))
    rows = canaries.exposure_table(planted, found)
    assert [(row.repeats, row.canaries) for row in rows] == [(0, 1), (1, 1), (4, 2)]
    assert [row.mean for row in rows] == pytest.approx([0, 3 - math.log2(3), 3], abs=1e-12)
    assert all(row.ceiling == 3 for row in rows)
    assert (rows[2].lowest, rows[2].highest) == (3, 3)
    with pytest.raises(UsageError, match="1 canaries have no loss"):
        canaries.exposures([*planted, Canary("e", 1)], losses, np.ones(3))


def brute_spread(tokens: list[list[int]], length: int) -> list[list[int]]:
    """Every run sought in every sequence."""

    def holds(ids: list[int], run: list[int]) -> bool:
        return any(ids[at : at + len(run)] == run for at in range(len(ids)))

    sizes = [min(length, len(ids)) for ids in tokens]
    return [
        [sum(holds(other, ids[at : at + size]) for other in tokens) for at in range(len(ids) - size + 1)]
        if size
        else []
        for ids, size in zip(tokens, sizes, strict=True)
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 13])
def test_runs_are_found_where_they_are(length: int) -> None:
    generator = np.random.default_rng(length)
    tokens = [generator.integers(3, size=size).tolist() for size in (0, 1, 2, 5, 9, 14, 20, 20)]
    assert [counts.tolist() for counts in tags.run_spread(tokens, length)] == brute_spread(tokens, length)


def test_copies_near_copies_and_templates_are_told_apart() -> None:
    generator = np.random.default_rng(0)
    fresh = [generator.integers(1000, size=60).tolist() for _ in range(8)]
    near = [*fresh[0][:50], *range(2000, 2010)]
    form = list(range(3000, 3040))
    filled = [[*form, *generator.integers(1000, size=10).tolist()] for _ in range(4)]
    loop = [7, 8, 9] * 20
    tokens = [*fresh, list(fresh[1]), near, *filled, loop]
    texts = [" ".join(f"w{token}" for token in ids) for ids in tokens]
    found = tags.tag(texts, tokens)
    assert [tag.copies for tag in found] == [1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert found[1].reasons == found[8].reasons == ("duplicate",)
    assert found[0].reasons == found[9].reasons == ("near duplicate",)
    assert found[9].overlap == pytest.approx(38 / 48, abs=1e-12)
    assert all("template" in tag.reasons for tag in found[10:14])
    assert found[14].reasons == ("template", "compressible")
    assert found[14].repetition == pytest.approx(1 - 3 / 58, abs=1e-12)
    assert all(not tag.reasons and not tag.overlap for tag in found[2:8])
    with pytest.raises(UsageError, match="one for each"):
        tags.tag(["a"], [])


def test_rare_words_weigh_most() -> None:
    """(1/|d|) Σ ln(|D|/tf), by hand: the 4 times, cat 2, zebra 1 in 4 documents."""
    documents = [["the", "cat"], ["the", "the", "cat"], ["the", "zebra"], []]
    expected = [
        (math.log(4 / 4) + math.log(4 / 2)) / 2, math.log(4 / 2) / 3, (math.log(4 / 4) + math.log(4 / 1)) / 2, 0.0,
    ]  # fmt: skip
    assert tags.tf_idf(documents) == pytest.approx(expected, abs=1e-12)


def test_words_and_compression() -> None:
    assert tags.words("The cat's 2 日本語!") == ["the", "cat", "'", "s", "2", "日", "本", "語", "!"]
    assert tags.zlib_ratio("") == 1
    assert tags.zlib_ratio("é" * 500) == len(zlib.compress("é".encode() * 500)) / 1000
    assert tags.zlib_ratio("\ud800") > 1, "a lone surrogate is text too"
    assert tags.repetition([1, 2]) == 0
