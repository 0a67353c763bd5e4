"""Extraction against greedy decoding, sampling and textbook edit distances; the membership law's printed rows."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tui.errors import UsageError
from gemma_tui.studies.memorization import extraction, law
from gemma_tui.studies.memorization.extraction import Split, parse_split

IDS = st.lists(st.integers(0, 3), max_size=9)


def levenshtein(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        )  # fmt: skip

    return distance(len(a), len(b))


def padded(rows: list[list[int]], width: int) -> np.ndarray:
    return np.array([row + [-1] * (width - len(row)) for row in rows])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=7, max_size=7), IDS), min_size=1, max_size=4))
def test_edit_distances_are_levenshteins(pairs: list[tuple[list[int], list[int]]]) -> None:
    found = extraction.edit_distances(np.array([a for a, _ in pairs]), padded([b for _, b in pairs], 9))
    assert found.tolist() == [levenshtein(tuple(a), tuple(b)) for a, b in pairs]


def test_matches_say_exact_near_divergence_and_share() -> None:
    true = np.tile(np.arange(50), (6, 1))
    generated = true.copy()
    generated[1, [7, 20, 21, 22, 49]] = 99  # five edits, 10 %
    generated[2, [7, 20, 21, 22, 48, 49]] = 99
    generated[3] = [99, *range(49)]  # one token late: two edits, no position equal
    generated[4, 10:] = -1  # ended early
    generated[5] = -1
    found = extraction.matches(true, np.hstack([generated, np.full((6, 4), 7)]))
    assert [match.exact for match in found] == [True, False, False, False, False, False]
    assert [match.distance for match in found] == [0, 5, 6, 2, 40, 50]
    assert [match.near for match in found] == [True, True, False, True, False, False]
    assert [match.divergence for match in found] == [None, 7, 7, 0, 10, 0]
    assert [match.equal for match in found] == pytest.approx([1, 0.9, 0.88, 0, 0.2, 0], abs=1e-12)
    short = extraction.matches(true[:1, :32], generated[4:5, :12])
    assert (short[0].distance, short[0].divergence) == (22, 10)
    with pytest.raises(UsageError, match="do not fit"):
        extraction.matches(true, generated[:2])


def toy(seed: int, vocabulary: int = 3) -> np.ndarray:
    """Next-token logits after the last two tokens, ``[vocabulary, vocabulary, vocabulary]``."""
    return np.random.default_rng(seed).normal(0, 1.5, (vocabulary,) * 3)


def forced(model: np.ndarray, text: tuple[int, ...]) -> np.ndarray:
    return np.array([model[text[at - 2], text[at - 1]] for at in range(2, len(text))])


def log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_greedy_decoding_gives_the_suffix_if_every_token_is_the_best() -> None:
    """Every prefix with every suffix of a small vocabulary, decoded one token after the other."""
    model, suffix, hits = toy(0), 4, 0
    for text in product(range(3), repeat=2 + suffix):
        decoded = list(text[:2])
        for _ in range(suffix):
            decoded.append(int(model[decoded[-2], decoded[-1]].argmax()))
        best = forced(model, text).argmax(-1) == np.array(text[2:])
        exact = tuple(decoded) == text
        equal = [a == b for a, b in zip(decoded[2:], text[2:], strict=True)]
        assert extraction.recited(best, suffix) == (suffix if exact else equal.index(False))
        hits += exact
    assert hits == 9, "one suffix for each prefix"
    with pytest.raises(UsageError, match="suffix of 5"):
        extraction.recited(np.ones(4, bool), 5)


def test_suffix_is_the_end_of_the_predictions() -> None:
    best = np.array([False, True, False, True, True])
    assert [extraction.recited(best, suffix) for suffix in (2, 3, 4)] == [2, 0, 1]
    assert extraction.suffix_log_prob(np.array([-9.0, -1.0, -2.0]), 2) == -3


def test_suffix_chance_is_the_share_of_sampled_texts() -> None:
    model, text, suffix = toy(2), (2, 0, 1, 1), 2
    log_prob = extraction.suffix_log_prob(log_softmax(forced(model, text))[np.arange(2), text[2:]], suffix)
    generator, chances = np.random.default_rng(0), np.exp(log_softmax(model))
    first = generator.random(20_000)[:, None] > chances[2, 0].cumsum()
    ones = first.sum(1) == 1
    second = generator.random(ones.sum())[:, None] > chances[0, 1].cumsum()
    share = (second.sum(1) == 1).sum() / 20_000
    assert share == pytest.approx(math.exp(log_prob), abs=4 * math.sqrt(share / 20_000))


@pytest.mark.parametrize(
    "p_z", [Fraction(1, 2), Fraction(1, 3), Fraction(9, 10), Fraction(1, 100), Fraction(999, 1000)]
)
@pytest.mark.parametrize("chance", extraction.CHANCES)
def test_draws_are_the_fewest_that_suffice(p_z: Fraction, chance: float) -> None:
    """Counted up in exact fractions."""
    draws = 1
    while 1 - (1 - p_z) ** draws < Fraction(str(chance)):
        draws += 1
    log_prob = math.log(p_z)
    assert extraction.draws_for(log_prob, chance) == draws


@pytest.mark.parametrize(("odds", "draws"), [(3, 3), (5, 5), (10, 4), (100, 2)])
def test_rounding_asks_for_no_further_draw(odds: int, draws: int) -> None:
    """Draws that miss once in ``odds``: n of them miss once in odds^n, so n suffice exactly."""
    assert extraction.draws_for(math.log(1 - 1 / odds), 1 - float(odds) ** -draws) == draws


def test_draws_of_tiny_chances_keep_their_digits() -> None:
    """ln(1 − p)/ln(1 − p_z) → −ln(1 − p)/p_z, where 1 − p_z is 1 in floats."""
    tiny = math.log(1e-30)
    for chance in extraction.CHANCES:
        needed = extraction.draws_for(tiny, chance)
        assert needed == pytest.approx(-math.log(1 - chance) * 1e30, rel=1e-9)
    assert extraction.draws_for(0.0, 0.99) == 1
    assert extraction.draws_for(math.log1p(-1e-12), 0.99) == 1
    assert extraction.draws_for(-math.inf, 0.1) == math.inf
    assert extraction.draws_for(-5000.0, 0.1) == math.inf
    with pytest.raises(UsageError, match="between 0 and 1"):
        extraction.draws_for(-1.0, 1.0)


def test_splits_are_read_and_cut() -> None:
    assert parse_split("50/50") == Split(50, 50)
    assert parse_split(" 32 / 16 ") == Split(32, 16)
    for text in ("50", "0/50", "50/", "a/b", "50/50/50", "-1/5", "999999/1", "٣/٣", "\x1b[31m/1"):
        with pytest.raises(UsageError, match="such as 50/50") as error:
            parse_split(text)
        assert "\x1b" not in str(error.value)
    prefix, suffix = Split(2, 3).cut(np.arange(9))  # type: ignore[misc]
    assert (prefix.tolist(), suffix.tolist()) == ([0, 1], [2, 3, 4])
    assert Split(2, 3).cut(np.arange(4)) is None


def gpt2(layers: int, width: int) -> int:
    """Parameters of a GPT-2 of the paper with tied embeddings: V·d + S·d + L(12d² + 13d) + 2d."""
    return (law.VOCABULARY + law.TOKENS) * width + layers * (12 * width**2 + 13 * width) + 2 * width


XL, SMALL = gpt2(48, 1600), gpt2(12, 768)
LAW_ROWS = [
    (XL, 170_654_583, 0.55), (XL, 76_795_021, 0.75), (XL, 18_851_574, 0.95),
    (SMALL, 13_566_442, 0.55), (SMALL, 6_104_935, 0.75), (SMALL, 1_498_634, 0.95),
]  # fmt: skip
"""Parameters, sequences and predicted F1 of the paper's validation table."""


@pytest.mark.parametrize(("parameters", "sequences", "f1"), LAW_ROWS)
def test_decoded_law_gives_the_printed_predictions(parameters: int, sequences: int, f1: float) -> None:
    ratio = law.data_bits_per_parameter(parameters, sequences)
    assert law.membership_f1(ratio) == pytest.approx(f1, abs=2e-4)
    assert law.sequences_at(f1, parameters) == pytest.approx(sequences, rel=1e-3)


def test_decoded_law_has_the_limits_that_are_claimed() -> None:
    assert law.membership_f1(0) == 1
    assert law.membership_f1(1e9) == pytest.approx(0.5, abs=1e-12)
    falling = [law.membership_f1(ratio) for ratio in np.linspace(0, 300, 50)]
    assert falling == sorted(falling, reverse=True)
    assert "not as printed" in law.DECODED
    with pytest.raises(UsageError, match=r"between 0\.5 and 1"):
        law.sequences_at(0.5, XL)
