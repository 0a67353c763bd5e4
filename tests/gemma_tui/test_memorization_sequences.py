"""Rows to sequences: cut, each once, what is held out, and what the tokenizers must agree in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import TEXTS, write_rows

from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.rows import PromptRow, TextRow
from gemma_tui.studies.memorization.sequences import (
    Sequences,
    check_vocabulary,
    draw,
    make_sequences,
    measured_rows,
    read_sequences,
)
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import BOS, EOS, Tokenizer, read_tokenizer

Plan = Callable[..., TrainingPlan]


def test_a_row_is_cut_and_a_short_one_ends(tokenizer: Tokenizer) -> None:
    found, counts = make_sequences([TextRow(TEXTS[0]), TextRow("fox")], tokenizer, 8, "turns")
    (_, long), (_, short) = found.values()
    ids = tokenizer.encode(TEXTS[0])
    assert long.ids.tolist() == ids[:9]
    assert short.ids.tolist() == [BOS, *tokenizer.encode("fox", bos=False), EOS]
    assert counts.cut == 1
    assert long.supervised.tolist() == [False] + [True] * 8


def test_repetitions_are_found_after_cutting(tokenizer: Tokenizer) -> None:
    rows = [TextRow(text) for text in ("The fox sleeps on.", "", "The fox jumps over.", "dogs", "dogs")]
    found, counts = make_sequences(rows, tokenizer, 2, "turns")
    assert [number for number, _ in found.values()] == [0, 3]
    assert (counts.rows, counts.repeated, counts.empty) == (5, 2, 1)
    held, held_counts = make_sequences([TextRow("hills"), TextRow("dogs")], tokenizer, 2, "turns", found)
    assert (len(held), held_counts.shared) == (1, 1)


def test_a_prompt_that_fills_the_sequence_leaves_nothing_to_count(tokenizer: Tokenizer) -> None:
    rows = [PromptRow(TEXTS[0], "dogs"), PromptRow("fox", "dogs")]
    found, counts = make_sequences(rows, tokenizer, 16, "plain")
    assert (len(found), counts.masked) == (1, 1)
    window = next(iter(found.values()))[1]
    assert window.ids[window.supervised].tolist() == [*tokenizer.encode("dogs", bos=False), EOS]


def test_sequences_are_drawn_by_the_seed(tokenizer: Tokenizer) -> None:
    found, _ = make_sequences([TextRow(text) for text in TEXTS], tokenizer, 32, "turns")
    numbers = [[number for number, _ in draw(found, 5, seed)] for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1] == sorted(numbers[0])
    assert numbers[0] != numbers[2]
    assert len(draw(found, 0, 0)) == len(draw(found, 999, 0)) == len(TEXTS)


def test_what_was_kept_is_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found, _ = make_sequences([TextRow(text) for text in TEXTS[:3]], tokenizer, 12, "turns")
    made = Sequences([w for _, w in found.values()], np.array([4, 5, 6]), 2)
    made.write(tmp_path)
    back = read_sequences(tmp_path)
    assert back.sets == {"train": range(2), "held_out": range(2, 3)}
    assert back.rows.tolist() == [4, 5, 6]
    for a, b in zip(made.windows, back.windows, strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.supervised, b.supervised)
    (tmp_path / "sequences.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(GemmaTuiError, match="missing or broken"):
        read_sequences(tmp_path)


def test_what_training_kept_for_validation_is_held_out(tokenizer: Tokenizer, tmp_path: Path, plan: Plan) -> None:
    path = write_rows(tmp_path / "all.jsonl", TEXTS)
    trained = plan(data=str(path), sequence_length=128)
    train, held = measured_rows(str(path), "", tokenizer, trained)
    assert [row.text for row in train] == TEXTS[:23]
    assert [row.text for row in held] == TEXTS[23:]
    assert measured_rows(str(path), "", tokenizer, None)[1] == []
    other = write_rows(tmp_path / "other.jsonl", ["others"])
    train, held = measured_rows(str(path), str(other), tokenizer, trained)
    assert (len(train), [row.text for row in held]) == (23, ["others"])
    long = write_rows(tmp_path / "long.jsonl", [" ".join(TEXTS[:12]), " ".join(TEXTS[12:])])
    train, held = measured_rows(str(long), "", tokenizer, plan(data=str(long), sequence_length=16))
    assert (len(train), len(held)) == (1, 0), "of the second row one part was trained on"


def test_vocabularies_are_compared_by_what_is_in_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.backend.save(str(path))
    check_vocabulary(tokenizer, read_tokenizer(tmp_path), "copy")
    described = json.loads(path.read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["f"], vocabulary["o"] = vocabulary["o"], vocabulary["f"]
    path.write_text(json.dumps(described))
    with pytest.raises(UsageError, match=r"swapped has another vocabulary \(2 of its"):
        check_vocabulary(tokenizer, read_tokenizer(tmp_path), "swapped")
