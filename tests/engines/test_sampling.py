"""Choosing the next token, against the plain definition: sort, cut, renormalise."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engines.base import Sampling
from engines.sampling import choose

DRAWS = 500

distinct_logits = arrays(np.float32, st.integers(1, 30), elements=st.integers(-500, 500), unique=True).map(
    lambda x: x / 50
)
any_logits = arrays(np.float32, st.integers(1, 30), elements=st.integers(-6, 6))


class Even:
    """Stands in for a generator: its draws lie evenly between 0 and 1, so that counts are probabilities."""

    def __init__(self) -> None:
        self.drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return (self.drawn - 0.5) / DRAWS


def shares(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """How often each token is drawn, exact to within ``1 / DRAWS``."""
    even = cast("np.random.Generator", Even())
    drawn = [choose(logits, sampling, even) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=logits.size) / DRAWS


def plain(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities by the definition, for logits without ties."""
    scores = [float(score) / sampling.temperature for score in logits]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = [np.exp(scores[token] - scores[order[0]]) for token in order]
    probabilities = [weight / sum(weights) for weight in weights]
    found, reached = np.zeros(len(scores)), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        found[token] = probability
        reached += probability
        if reached >= sampling.top_p - 1e-12:
            break
    return found / found.sum()


@settings(max_examples=60)
@given(
    logits=distinct_logits,
    temperature=st.floats(0.2, 5),
    top_k=st.integers(0, 35),
    # In steps that no sum of probabilities meets exactly, but for the whole.
    top_p=st.integers(0, 50).map(lambda step: step / 50),
)
def test_probabilities_are_those_of_the_definition(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(shares(logits, sampling), plain(logits, sampling), atol=1.01 / DRAWS)


@settings(max_examples=60)
@given(logits=any_logits, top_k=st.integers(1, 30))
def test_among_ties_exactly_top_k_tokens_are_kept_and_none_better_is_left(logits: np.ndarray, top_k: int) -> None:
    kept = shares(logits * np.float32(1e-3), Sampling(temperature=1.0, top_k=top_k)) > 0
    assert kept.sum() == min(top_k, logits.size)
    assert logits[kept].min() >= logits[~kept].max(initial=-np.inf)


@settings(max_examples=60)
@given(logits=arrays(np.float32, st.integers(1, 12), elements=st.integers(-1, 1)), top_p=st.floats(0, 1))
def test_among_ties_the_nucleus_is_the_smallest_that_reaches_top_p(logits: np.ndarray, top_p: float) -> None:
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    kept = shares(logits, Sampling(temperature=1.0, top_p=top_p)) > 0
    inside = probabilities[kept]
    assert inside.sum() >= top_p - 1e-9
    assert kept.sum() == 1 or inside.sum() - inside.min() < top_p + 1e-9
    assert inside.min() >= probabilities[~kept].max(initial=0) - 1e-9


def fixed(draw: float) -> np.random.Generator:
    class Fixed:
        def random(self) -> float:
            return draw

    return cast("np.random.Generator", Fixed())


@given(logits=any_logits)
def test_temperature_zero_is_the_first_arg_max(logits: np.ndarray) -> None:
    assert choose(logits, Sampling(temperature=0.0), np.random.default_rng(0)) == int(np.argmax(logits))


@given(logits=distinct_logits, seed=st.integers(0, 100))
def test_top_k_one_is_greedy(logits: np.ndarray, seed: int) -> None:
    sampling = Sampling(temperature=3.0, top_k=1)
    assert choose(logits, sampling, np.random.default_rng(seed)) == int(np.argmax(logits))


@given(logits=distinct_logits, seed=st.integers(0, 100))
def test_an_empty_nucleus_keeps_the_best(logits: np.ndarray, seed: int) -> None:
    sampling = Sampling(temperature=3.0, top_p=0.0)
    assert choose(logits, sampling, np.random.default_rng(seed)) == int(np.argmax(logits))


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_a_draw_stay_within_the_vocabulary(draw: float) -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert 0 <= choose(logits, Sampling(temperature=1.0), fixed(draw)) < 1000


def test_infinitely_unlikely_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    assert shares(logits, Sampling(temperature=1.0)).tolist() == [0, 0.5, 0, 0.5]


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([3e38, 3e38, -3e38], np.float32)
    assert shares(logits, Sampling(temperature=0.01)).tolist() == [0.5, 0.5, 0]


def test_equal_seeds_draw_alike_and_others_do_not() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int) -> list[int]:
        generator = np.random.default_rng(seed)
        return [choose(logits, Sampling(temperature=1.0), generator) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_frequencies_follow_the_probabilities() -> None:
    """χ² with 9 degrees of freedom stays under its 99.9 % quantile, 27.9."""
    logits = np.log(np.arange(1, 11)).astype(np.float32)
    generator, count = np.random.default_rng(0), 20_000
    drawn = [choose(logits, Sampling(temperature=1.0), generator) for _ in range(count)]
    expected = np.arange(1, 11) / 55 * count
    assert ((np.bincount(drawn, minlength=10) - expected) ** 2 / expected).sum() < 27.9


@settings(max_examples=40)
@given(logits=distinct_logits, min_p=st.integers(1, 49).map(lambda step: step / 49.3), temperature=st.floats(0.5, 3))
def test_the_least_probable_are_left_out_as_transformers_does(
    logits: np.ndarray, min_p: float, temperature: float
) -> None:
    import torch
    from transformers import MinPLogitsWarper

    scores = torch.from_numpy(logits)[None] / temperature
    expected = MinPLogitsWarper(min_p)(torch.zeros(1, 1, dtype=torch.long), scores)[0].softmax(-1).numpy()
    found = shares(logits, Sampling(temperature=temperature, min_p=min_p))
    np.testing.assert_allclose(found, expected, atol=1.01 / DRAWS)


@settings(max_examples=40)
@given(logits=distinct_logits, seen=st.sets(st.integers(0, 29)), penalty=st.floats(0.5, 3))
def test_what_was_seen_is_penalised_as_transformers_does(logits: np.ndarray, seen: set[int], penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    known = {token for token in seen if token < logits.size}
    ids = torch.tensor([list(known)], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(logits.copy())[None])[0].numpy()
    sampling, before = Sampling(repetition_penalty=penalty), logits.copy()
    assert expected[choose(logits, sampling, fixed(0.5), known)] == pytest.approx(expected.max())
    np.testing.assert_array_equal(logits, before)
