"""Bits by their closed forms, and the published conventions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tui.studies.memorization.bits import (
    Parameters,
    per_parameter,
    sequence_bits,
    token_bits,
    totals,
    uniform,
)
from gemma_tui.studies.memorization.history import best, settled, told

LN2 = math.log(2)
likelihoods = st.floats(-1e4, 0)


def test_a_model_that_knows_nothing_holds_nothing() -> None:
    log_p = uniform(np.array([3, 64]), 2048)
    bits = sequence_bits(log_p, log_p)
    for kind in (bits.signed, bits.clipped, bits.mixture):
        np.testing.assert_allclose(kind, 0, atol=1e-9)


def test_a_sequence_known_by_heart_has_all_its_bits() -> None:
    bits = sequence_bits(np.zeros(1), uniform(np.array([64]), 2048))
    assert bits.signed[0] == pytest.approx(704, abs=1e-9)
    assert bits.clipped[0] == pytest.approx(704, abs=1e-9)
    assert bits.mixture[0] == pytest.approx(703, abs=1e-9)


def test_where_the_reference_knows_better_nothing_is_held() -> None:
    bits = sequence_bits(np.array([-40 * LN2]), np.array([-30 * LN2]))
    assert bits.signed[0] == pytest.approx(-10, abs=1e-9)
    assert bits.clipped[0] == 0
    assert bits.mixture[0] == pytest.approx(math.log2(0.5 * 2**-40 + 0.5 * 2**-30) + 30, abs=1e-9)


@given(likelihoods, likelihoods)
def test_the_mixture_costs_at_most_a_bit_more_than_the_larger(target: float, reference: float) -> None:
    bits = sequence_bits(np.array(target), np.array(reference))
    assert -1 - 1e-9 <= bits.mixture - bits.clipped <= 1e-9


def test_likelihoods_are_of_sequences_and_not_of_tokens() -> None:
    target, reference = np.array([-1.0, -5.0, -2.0]) * LN2, np.array([-4.0, -1.0, -2.0]) * LN2
    each = token_bits(target, reference)
    np.testing.assert_allclose(each, [3, -4, 0], atol=1e-9)
    whole = sequence_bits(target.sum(), reference.sum())
    assert whole.signed == pytest.approx(each.sum(), abs=1e-9)
    assert whole.clipped == 0
    assert np.maximum(each, 0).sum() == pytest.approx(3, abs=1e-9)


def test_sums_are_over_sequences() -> None:
    found = totals(sequence_bits(np.array([-1.0, -9.0]) * LN2, np.array([-6.0, -7.0]) * LN2))
    assert (found.signed, found.clipped) == (pytest.approx(3, abs=1e-9), pytest.approx(5, abs=1e-9))
    expected = math.log2(0.5 * 2**5 + 0.5) + math.log2(0.5 * 2**-2 + 0.5)
    assert found.mixture == pytest.approx(expected, abs=1e-9)


def test_bits_are_told_per_parameter() -> None:
    found = per_parameter(700, Parameters(1000, 200, 50))
    assert list(found.values()) == [0.7, 14, 3.5]
    assert per_parameter(700, Parameters(1000, 200))["per_trainable_parameter"] is None


@pytest.mark.parametrize(
    ("bits", "end"),
    [
        ([0, 50, 90, 99.5, 100, 100], 30),
        ([0, 50, 100, 60, 60, 60], 20),
        ([0, 50, 100, 60, 62, 64], None),
        ([0, 30, 60, 90, 120, 150], None),
        ([0, 0, 0, 0, 0, 0], None),
    ],
)
def test_memorising_is_over_when_no_later_checkpoint_adds_to_it(bits: list[float], end: int | None) -> None:
    steps = [0, 10, 20, 30, 40, 50]
    assert settled(steps, bits) == end


def test_the_history_is_told_in_words() -> None:
    steps = [0, 10, 20]
    assert best(steps, [3.0, 2.0, 2.0]) == 10
    words = told(steps, [0, 100, 100.5], [3.0, 2.0, 2.5])
    assert "over at step 10" in words[0]
    assert "lowest at step 10" in words[1]
    words = told(steps, [0, 50, 100], [3.0, 2.0, 1.0])
    assert "goes on at step 20" in words[0]
    assert "still falls at step 20" in words[1]
    assert told(steps, [0, 0, 0], None) == ["nothing is memorised at any checkpoint"]
    assert "tells nothing" in told([5], [1], None)[0]
