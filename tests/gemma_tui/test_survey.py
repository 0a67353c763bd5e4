from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import write_rows

from engines.base import Engine
from gemma_tui.cli import main
from gemma_tui.commands.data import bars
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.events import Control
from gemma_tui.studies.plan import options
from gemma_tui.studies.recording import record_training
from gemma_tui.studies.survey import Bin, Survey, SurveyPlan, histogram, survey
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.tokenizer import BOS, END_OF_TURN, EOS, Tokenizer

CHAT = {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]}
LONG = {"messages": [{"role": "user", "content": "fox " * 99}, {"role": "assistant", "content": "dog"}]}
CUT = {"prompt": "fox", "completion": "dog " * 99}


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    rows(
        made / "train.jsonl",
        CHAT,
        LONG,
        CUT,
        {"text": " ".join(map(str, range(40)))},
        {"text": "two"},
        {"text": "two"},
        {"text": ""},
    )
    rows(made / "valid.jsonl", {"text": "two"}, {"text": "three <eos>"})
    rows(made / "test.jsonl", {"text": "four"})
    return made


@pytest.fixture
def found(folder: Path, tokenizer: Tokenizer) -> Survey:
    return survey(SurveyPlan(str(folder), sequence_length=32, packing=True), tokenizer, folder)


def test_every_split_is_counted(found: Survey) -> None:
    train, valid, _ = found.splits
    assert [(s.name, s.rows) for s in found.splits] == [("train", 7), ("valid", 2), ("test", 1)]
    assert (train.counts.split, train.counts.truncated, train.counts.masked, train.counts.empty) == (1, 2, 1, 1)
    assert train.windows > 5
    assert train.supervised < train.tokens
    assert (valid.windows, valid.supervised == valid.tokens) == (2, True)
    assert train.packed is not None
    assert train.packed < train.windows


def test_what_is_in_training_and_validation_is_told(found: Survey) -> None:
    assert (found.shared, found.repeated, found.held_out) == (1, 1, False)
    assert sum("validation windows are training windows too" in text for text in found.warnings) == 1
    assert sum("rows left out because" in text for text in found.warnings) == 1
    assert sum("spell control tokens" in text for text in found.warnings) == 1


def test_held_out_windows_are_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "data.jsonl", [f"row {n}" for n in range(40)])
    found = survey(SurveyPlan(str(path)), tokenizer, tmp_path)
    assert found.held_out
    assert [(s.rows, s.windows) for s in found.splits] == [(40, 38), (0, 2)]


def test_the_first_rows_come_with_their_mask(found: Survey) -> None:
    first = found.examples[0]
    assert len(found.examples) == 3
    assert first.ids[0] == BOS
    assert first.ids[first.supervised][-1] == END_OF_TURN


@given(st.lists(st.integers(1, 5000), max_size=50))
def test_every_row_is_in_the_bar_of_its_length(lengths: list[int]) -> None:
    found = histogram(lengths)
    assert [bar.rows for bar in found] == [sum(bar.low <= n <= bar.high for n in lengths) for bar in found]
    assert sum(bar.rows for bar in found) == len(lengths)
    assert all(a.high + 1 == b.low for a, b in pairwise(found))


def test_bars_are_drawn_in_proportion_and_a_single_row_shows() -> None:
    assert list(bars((Bin(1, 1, 1), Bin(2, 3, 0), Bin(4, 7, 4000)))) == [
        "     1 █ 1",
        "2 to 3  0",
        f"4 to 7 {'█' * 40} 4,000",
    ]
    assert list(bars(())) == []


def test_what_is_surveyed_are_options_of_training() -> None:
    training = {o.name: o for o in options(TrainingPlan)}
    for o in options(SurveyPlan):
        if o.name != "rows":
            assert (o.kind, o.default, o.choices) == (
                training[o.name].kind,
                training[o.name].default,
                training[o.name].choices,
            )


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_shows_counts_lengths_and_the_mask_without_colour(
    folder: Path, tiny: str, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    dog = "│".join(map(tokenizer.token, tokenizer.encode("dog", bos=False)))
    assert main(["data", tiny, "--data", str(folder), "--sequence-length", "32", "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "train" in text
    assert "█" in text
    lines = text[text.index("row 1:") :].splitlines()[1:]
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("- <bos>│<start_of_turn>│")
    assert [line for line in lines if line.startswith("+ ")] == [f"+ {dog}│<end_of_turn>"]
    assert lines[-1] == "- ↵"


def test_the_command_gives_rows_of_json(
    command: Callable[..., tuple[int, list[dict[str, Any]], str]], folder: Path, tiny: str
) -> None:
    code, found, errors = command("data", tiny, "--data", str(folder), "--sequence-length", "32", "--rows", "2")
    assert (code, errors) == (0, "")
    assert [row["name"] for row in found if row["kind"] == "split"] == ["train", "valid", "test"]
    assert sum(row["rows"] for row in found if row["kind"] == "length") == 9
    shown = [row for row in found if row["kind"] == "row"]
    assert len(shown) == 2
    assert len(shown[0]["ids"]) == len(shown[0]["tokens"]) == len(shown[0]["supervised"])
    assert found[-1] == {"kind": "end", "status": "done", "shared": 1, "repeated": 1, "held_out": False}


# ------------------------------------------------------------------------------------------------ training on it


def test_a_packed_run_learns_the_same_tokens_in_fewer_windows(
    engine: Engine, plan: Callable[..., TrainingPlan], store: RunStore, folder: Path
) -> None:
    starts, evaluations = [], []
    for packing in (False, True):
        chosen = plan(
            data=str(folder), packing=packing, dtype="float32", steps=1, evaluate_batches=0, learning_rate=0.0
        )
        events = list(record_training(engine, chosen, Control(), store).events)
        starts.append(next(e.values for e in events if e.kind == "start"))
        evaluations.append(next(e.values["valid_loss"] for e in events if e.kind == "evaluation"))
        told = [e.values["text"] for e in events if e.kind == "warning"]
        assert len(told) == 2
    assert starts[0]["train_tokens"] == starts[1]["train_tokens"]
    assert starts[0]["train_windows"] > starts[1]["train_windows"]
    assert [starts[1][k] for k in ("train_rows", "rows_split", "rows_truncated", "rows_left_out")] == [7, 1, 2, 2]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


def test_plain_prompts_end_with_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = rows(tmp_path / "data.jsonl", {"prompt": "fox", "completion": "dog"})
    ends = {}
    for form in ("turns", "plain"):
        example = survey(SurveyPlan(str(path), prompts=form), tokenizer, tmp_path).examples[0]
        ends[form] = int(np.array(example.ids)[example.supervised][-1])
    assert ends == {"turns": END_OF_TURN, "plain": EOS}
