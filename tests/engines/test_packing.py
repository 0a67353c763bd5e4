"""Documents packed into a row compute what they compute alone, on both engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest

from engines.base import Engine
from engines.gemma3 import Gemma3Config
from engines.packing import document_positions
from engines.training import IGNORED, Batch, LoRASettings, OptimizerSettings, TrainingSettings

TinyFolder = Callable[..., Path]
TOLERANCE = 1e-5
LENGTHS = (5, 21, 1, 13)
"""Shorter than the window of 8, longer, and a single token; the second row of a batch has them the other way round."""

METHODS = {"full": None, "lora": LoRASettings(rank=2, alpha=4.0)}


def document(length: int) -> Batch:
    """One document, of which every third label is not supervised."""
    text = np.random.default_rng(length).integers(0, 64, (1, length + 1), dtype=np.int32)
    labels = text[:, 1:].copy()
    labels[:, 1::3] = IGNORED
    return Batch(text[:, :-1].copy(), labels)


def packed(lengths: tuple[int, ...] = LENGTHS, padding: int = 4) -> Batch:
    """Two rows of the same documents, in this and in the other order, with padding at the end."""
    rows = [[document(n) for n in order] for order in (lengths, lengths[::-1])]
    numbers = [np.repeat(np.arange(len(order)), order) for order in (lengths, lengths[::-1])]
    ends = ((0, 0), (0, padding))
    tokens, labels = (
        np.concatenate([np.concatenate([getattr(d, name) for d in row], axis=1) for row in rows])
        for name in ("tokens", "labels")
    )
    return Batch(
        np.pad(tokens, ends),
        np.pad(labels, ends, constant_values=IGNORED),
        np.pad(np.stack(numbers).astype(np.int32), ends, constant_values=-1),
    )


def alone(lengths: tuple[int, ...] = LENGTHS) -> list[Batch]:
    """The documents of ``packed``, each in a batch of its own."""
    return [document(n) for n in (*lengths, *lengths)]


@pytest.fixture
def folder(tiny_config: Gemma3Config, tiny_folder: TinyFolder) -> Path:
    return tiny_folder(tiny_config)


def test_positions_begin_anew_with_each_document() -> None:
    segments = np.array([[0, 0, 0, 1, 2, 2, -1, -1], [7, 7, 3, 3, 3, 3, 3, 3]], np.int32)
    found = document_positions(segments)
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]]


def test_the_log_probability_of_every_token_is_that_of_its_document(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    row, start = packed(), 0
    for length in LENGTHS:
        whole = document(length)
        for place in range(length):
            if whole.labels[0, place] == IGNORED:
                continue
            apart, together = np.full_like(whole.labels, IGNORED), np.full_like(row.labels, IGNORED)
            apart[0, place] = together[0, start + place] = whole.labels[0, place]
            expected = engine.loss(Batch(whole.tokens, apart))
            assert engine.loss(Batch(row.tokens, together, row.segments)) == pytest.approx(expected, abs=TOLERANCE)
        start += length


def test_the_loss_is_the_sum_of_the_documents(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    expected = sum(engine.loss(batch) for batch in alone())
    assert engine.loss(packed()) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("kept", [False, True], ids=["plain", "checkpointed"])
def test_the_gradients_are_those_of_the_documents(engine: Engine, folder: Path, kept: bool) -> None:
    engine.load(folder, "float32")
    engine.start_training(TrainingSettings(None, checkpoint_activations=kept))
    together = inside.gradients(engine, packed())
    parts = [inside.gradients(engine, batch) for batch in alone()]
    largest = max(np.abs(gradient).max() for gradient in together.values())
    for name, gradient in together.items():
        apart = sum(part[name] for part in parts)
        assert np.abs(gradient - apart).max() <= TOLERANCE * largest, name


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_a_packed_row_is_the_step_on_its_documents(engine: Engine, folder: Path, method: str) -> None:
    results, weights = [], []
    for batches in ([packed()], alone()):
        engine.load(folder, "float32")
        engine.start_training(TrainingSettings(METHODS[method], optimizer=OptimizerSettings(epsilon=1.0)))
        results.append(engine.train_step(batches, 1.0))
        weights.append(inside.weights(engine))
    assert results[0].tokens == results[1].tokens
    assert results[0].loss == pytest.approx(results[1].loss, rel=TOLERANCE)
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=TOLERANCE, err_msg=name)


def without_borders(right: Callable[..., Any], positions: Any, segments: Any, window: int) -> Any:
    return right(positions, segments * 0, window)


def without_window(right: Callable[..., Any], positions: Any, segments: Any, window: int) -> Any:
    layout = right(positions, segments, 1000)
    return replace(layout, masks=dict.fromkeys((None, window), layout.masks[None]))


@pytest.mark.parametrize("wrong", [without_borders, without_window])
def test_a_mask_that_leaks_is_told(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    engine.load(folder, "float32")
    exact, training = engine.loss(packed()), inside.module(engine, "training")
    right = training.packed
    monkeypatch.setattr(training, "packed", lambda *given: wrong(right, *given))
    assert abs(engine.loss(packed()) - exact) > 100 * TOLERANCE * abs(exact)


def test_a_wrong_distance_within_a_document_is_told(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load(folder, "float32")
    exact, training = engine.loss(packed()), inside.module(engine, "training")
    monkeypatch.setattr(training, "document_positions", lambda segments: 2 * document_positions(segments))
    assert abs(engine.loss(packed()) - exact) > 100 * TOLERANCE * abs(exact)


def test_every_document_is_rotated_from_position_0_on(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotations are relative, so that the loss alone would not tell positions that go on from those that begin anew."""
    model, seen = inside.module(engine, "model"), []
    right = model.rotations
    monkeypatch.setattr(model, "rotations", lambda places, *more: (seen.append(places), right(places, *more))[1])
    engine.load(folder, "float32")
    engine.loss(packed())
    expected = [[n for length in order for n in range(length)] for order in (LENGTHS, LENGTHS[::-1])]
    assert seen
    for places in seen:
        assert places[:, 0, : sum(LENGTHS)].tolist() == expected


def test_segments_of_one_document_change_nothing(engine: Engine, folder: Path) -> None:
    engine.load(folder, "float32")
    plain = document(21)
    one = Batch(plain.tokens, plain.labels, np.zeros_like(plain.tokens))
    assert engine.loss(one) == pytest.approx(engine.loss(plain), rel=TOLERANCE)


def test_a_batch_without_segments_takes_the_fast_path(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    model = inside.module(engine, "model")
    right = model.attention
    monkeypatch.setattr(model, "attention", lambda *given: (seen.append(given[-1]), right(*given))[1])
    engine.load(folder, "float32")
    engine.loss(document(5))
    assert set(seen) == {"causal"}


def test_both_engines_agree_on_a_packed_row(both_engines: tuple[Engine, Engine], folder: Path) -> None:
    losses = []
    for engine in both_engines:
        engine.load(folder, "float32")
        losses.append(engine.loss(packed()))
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
