"""What the engines make of each token of a text, against transformers' logits and numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest

from engines import UnsupportedError
from engines.base import Engine, Sampling
from engines.checkpoints import write_arrays
from engines.gemma3 import Gemma3Config

Tokens = Callable[..., np.ndarray]
TOLERANCE = {"torch": 1e-5, "mlx": 1e-4}
FIELDS = ("log_probs", "means", "deviations")


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def chosen(values: np.ndarray, text: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, text[:, 1:, None].astype(np.int64), axis=-1)[..., 0]


@pytest.fixture
def expected(folder: Path, reference_logits: Callable[..., Any]) -> Callable[[np.ndarray], np.ndarray]:
    """transformers' logits that predict ``text[:, 1:]``."""
    return lambda text: reference_logits(folder, text)[:, :-1]


def test_scores_are_those_of_the_distribution(
    engine: Engine, folder: Path, tokens: Tokens, expected: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside.module(engine, "scoring"), "ROWS", 7)
    engine.load(folder, "float32")
    text = tokens(13, batch=3)
    scores = log_softmax(expected(text))
    p = np.exp(scores)
    means = (p * scores).sum(-1)
    deviations = np.sqrt((p * (scores - means[..., None]) ** 2).sum(-1))
    found = engine.token_scores(text)
    for name, wanted in zip(FIELDS, (chosen(scores, text), means, deviations), strict=True):
        value = getattr(found, name)
        assert (value.dtype, value.shape) == (np.float32, (3, 12))
        np.testing.assert_allclose(value, wanted, rtol=0, atol=TOLERANCE[engine.name], err_msg=name)
    assert found.best.dtype == bool
    assert np.array_equal(found.best, scores.argmax(-1) == text[:, 1:])
    assert found.sampled is None
    np.testing.assert_array_equal(engine.log_probs(text), found.log_probs)


def test_a_large_vocabulary_is_added_up_exactly(engine: Engine, config: Gemma3Config) -> None:
    engine.initialise(replace(config, vocab_size=150_000), seed=0, dtype="float32")
    text = np.random.default_rng(0).integers(0, 150_000, (1, 5), dtype=np.int32)
    scores = log_softmax(engine.logits(text)[:, :-1])
    means = (np.exp(scores) * scores).sum(-1)
    found = engine.token_scores(text, Sampling(temperature=1.0))
    np.testing.assert_allclose(found.log_probs, chosen(scores, text), rtol=0, atol=3e-5)
    np.testing.assert_allclose(found.sampled, chosen(scores, text), rtol=0, atol=3e-5)
    np.testing.assert_allclose(found.means, means, rtol=0, atol=3e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 64, 1000])
def test_the_scheme_is_temperature_then_top_k(
    engine: Engine, folder: Path, tokens: Tokens, expected: Callable[..., np.ndarray], temperature: float, top_k: int
) -> None:
    engine.load(folder, "float32")
    text = tokens(30, batch=2)
    logits = expected(text)
    kept = logits.astype(np.float64) / temperature
    if 0 < top_k < 64:
        kept = np.where(kept >= np.sort(kept)[..., -top_k, None], kept, -np.inf)
    wanted = chosen(log_softmax(kept), text)
    found = engine.token_scores(text, Sampling(temperature=temperature, top_k=top_k)).sampled
    assert found is not None
    assert found.dtype == np.float32
    assert np.array_equal(np.isfinite(found), np.isfinite(wanted))
    known = np.isfinite(wanted)
    assert known.all() == (top_k not in (1, 5))
    np.testing.assert_allclose(found[known], wanted[known], rtol=0, atol=TOLERANCE[engine.name] / temperature)


def test_what_greedy_decoding_writes_is_certain(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    prompt = [2, 7, 9]
    text = np.array([[*prompt, *engine.generate(prompt, Sampling(max_tokens=12))]], np.int32)
    found = engine.token_scores(text, Sampling())
    assert found.best[0, 2:].all()
    assert found.sampled is not None
    assert set(found.sampled[0, 2:]) == {0.0}
    other = text.copy()
    other[0, -1] = (other[0, -1] + 1) % 64
    changed = engine.token_scores(other, Sampling())
    assert changed.sampled is not None
    assert changed.sampled[0, -1] == -np.inf
    assert not changed.best[0, -1]


def test_of_equals_the_lowest_ids_are_taken(engine: Engine, config: Gemma3Config, folder: Path) -> None:
    weights = {
        name: np.zeros(shape, np.float32) for name, shape in config.parameter_shapes().items()
    }  # every logit is 0
    write_arrays(folder / "model.safetensors", weights)
    engine.load(folder, "float32")
    every = np.stack([np.full(64, 2), np.arange(64)], axis=1).astype(np.int32)
    found = engine.token_scores(every, Sampling(temperature=1.0, top_k=3))
    assert np.flatnonzero(found.best[:, 0]).tolist() == [0]
    assert found.sampled is not None
    np.testing.assert_allclose(np.exp(found.sampled[:, 0]), np.r_[[1 / 3] * 3, [0] * 61], atol=1e-6)
    np.testing.assert_allclose(found.means, -np.log(64), atol=1e-5)
    np.testing.assert_allclose(found.deviations, 0, atol=1e-5)


def test_padding_on_the_right_changes_nothing_before_it(engine: Engine, folder: Path, tokens: Tokens) -> None:
    engine.load(folder, "float32")
    text = tokens(11, batch=2)
    scheme = Sampling(temperature=0.7, top_k=9)
    alone, padded = engine.token_scores(text, scheme), engine.token_scores(np.pad(text, ((0, 0), (0, 6))), scheme)
    for name in (*FIELDS, "best", "sampled"):
        np.testing.assert_allclose(getattr(padded, name)[:, :10], getattr(alone, name), atol=1e-5, err_msg=name)


def test_a_text_of_one_token_has_no_scores(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    found = engine.token_scores(np.full((3, 1), 2, np.int32), Sampling(temperature=1.0))
    assert found.sampled is not None
    assert {part.shape for part in (found.log_probs, found.means, found.best, found.sampled)} == {(3, 0)}
    assert engine.log_probs(np.full((3, 1), 2, np.int32)).shape == (3, 0)


def test_few_logits_are_there_at_a_time(
    engine: Engine, folder: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load(folder, "float32")
    kind, rows = type(inside.model(engine)), []
    real = kind.logits

    def counted(model: Any, hidden: Any) -> Any:
        rows.append(hidden.shape[0])
        return real(model, hidden)

    monkeypatch.setattr(kind, "logits", counted)
    engine.token_scores(tokens(40, batch=4), Sampling(temperature=1.0, top_k=4))
    assert rows == [64, 64, 28]


def test_a_nucleus_is_refused(engine: Engine, folder: Path, tokens: Tokens) -> None:
    engine.load(folder, "float32")
    with pytest.raises(UnsupportedError, match="top_p"):
        engine.token_scores(tokens(4), Sampling(temperature=1.0, top_p=0.9))
