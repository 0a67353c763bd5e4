from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.rows import ChatRow, Message, PromptRow, RowSplits, TextRow, read_rows, read_sources, read_split_rows

GOOD = b'{"text": "fine"}\n'

USER, MODEL = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def chat(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


BAD_ROWS = {
    "no known key": (b'{"question": "a", "answer": "b"}', "it has question, answer"),
    "empty object": (b"{}", "it has nothing"),
    "not JSON": (b"text", "not a JSON row"),
    "cut": (b'{"text": "a', "not a JSON row"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "a list": (b'["text"]', "the row is a list"),
    "a string": (b'"text"', "the row is a string"),
    "a number for text": (b'{"text": 1}', '"text" is a number, no text'),
    "null for text": (b'{"text": null}', '"text" is missing or null'),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogate"),
    "nested lists": (b"[" * 100_000, "not a JSON row"),
    "nested objects": (b'{"text":' * 100_000, "not a JSON row"),
    "a number of 5000 digits": (b'{"text": ' + b"1" * 5000 + b"}", "not a JSON row"),
    "prompt alone": (b'{"prompt": "a"}', 'no "completion": every row needs both'),
    "completion alone": (b'{"completion": "a"}', 'no "prompt": every row needs both'),
    "two kinds": (b'{"text": "a", "messages": []}', "text and messages: keep the keys of one kind"),
    "completion no text": (b'{"prompt": "a", "completion": ["b"]}', '"completion" is a list'),
    "no list of messages": (b'{"messages": "a"}', "messages is a string"),
    "no messages": (chat(), "messages is an empty list"),
    "a message that is text": (chat("a"), "message 1: it is a string"),
    "unknown role": (chat(USER, MODEL | {"role": "tool"}), "message 2: unknown role tool: use system, user"),
    "no role": (chat({"content": "a"}), "message 1: unknown role missing or null"),
    "a list for a role": (chat(USER | {"role": ["user"]}), "message 1: unknown role a list"),
    "no content": (chat(USER, {"role": "assistant"}), 'message 2: "content" is missing or null'),
    "parts for content": (chat(USER | {"content": [{"type": "text", "text": "a"}]}), '"content" is a list'),
    "half a surrogate in a message": (chat(USER, MODEL | {"content": "\ud800"}), "message 2: half a surrogate"),
    "no assistant turn": (chat(USER), "no assistant turn"),
    "the assistant begins": (chat(MODEL, USER), "the first turn is assistant: begin with user"),
    "system alone": (chat({"role": "system", "content": "s"}), "the first turn is missing"),
    "system later": (chat(USER, {"role": "system", "content": "s"}, MODEL), "a system message is not the first"),
    "two users": (chat(USER, USER, MODEL), "two turns of one role"),
    "two assistants": (chat(USER, MODEL, {"role": "model", "content": "c"}), "two turns of one role"),
    "tools": (chat(USER, MODEL, tools=[{"name": "f"}]), "the row has tools"),
    "tool calls": (chat(USER, MODEL | {"tool_calls": [{}]}), "message 2: it calls tools"),
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path: Path, kind: str) -> None:
    row, reason = BAD_ROWS[kind]
    path = written(tmp_path / "data.jsonl", GOOD + b"\n" + row + b"\n" + GOOD)
    with pytest.raises(GemmaTuiError, match=reason) as refused:
        read_rows(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_the_line_of_a_bad_byte_is_right_far_into_a_file(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"data{ending}", GOOD * 5000 + b'{"text": "\xe9"}\n')
    with pytest.raises(GemmaTuiError, match=rf"data\{ending}:5001: not UTF-8"):
        read_rows(path)


def test_a_row_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_tui.rows.MAX_ROW_CHARACTERS", 30)
    path = written(tmp_path / "data.jsonl", GOOD + json.dumps({"text": "x" * 30}).encode())
    with pytest.raises(GemmaTuiError, match=r"data\.jsonl:2: the row is over 30 characters"):
        read_rows(path)


def test_rows_come_in_order_whatever_the_encoding_of_their_characters(tmp_path: Path) -> None:
    texts = ["é 漢 🙂", "two\nlines", "", "\u2028 stays in the row"]
    rows = "\r\n".join(json.dumps({"text": t, "more": 1}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts))
    assert read_rows(written(tmp_path / "data.jsonl", rows.encode())) == [TextRow(t) for t in texts]


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, ending: str) -> None:
    content = GOOD if ending == ".jsonl" else b"fine"
    assert read_rows(written(tmp_path / f"data{ending}", b"\xef\xbb\xbf" + content)) == [TextRow("fine")]


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "data.txt", b"one\n\ntwo\n")) == [TextRow("one\n\ntwo\n")]


def test_a_folder_gives_training_validation_and_test_rows(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", GOOD * 2)
    written(tmp_path / "valid.txt", b"held out")
    assert read_split_rows(tmp_path) == RowSplits([TextRow("fine")] * 2, [TextRow("held out")])
    written(tmp_path / "test.jsonl", b'{"text": "at the end"}')
    assert read_split_rows(tmp_path).test == [TextRow("at the end")]


def test_a_file_gives_training_rows_alone(tmp_path: Path) -> None:
    assert read_split_rows(written(tmp_path / "data.jsonl", GOOD)) == RowSplits([TextRow("fine")])


def test_rows_of_every_kind_are_typed(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s", "name": "left alone"}
    rows = [b'{"prompt": "a", "completion": "b", "id": 7}', chat(system, USER, MODEL | {"role": "model"}), GOOD]
    assert read_rows(written(tmp_path / "data.jsonl", b"\n".join(rows))) == [
        PromptRow("a", "b"),
        ChatRow((Message("system", "s"), Message("user", "a"), Message("assistant", "b"))),
        TextRow("fine"),
    ]


def test_the_text_of_every_kind_is_all_that_was_written() -> None:
    chat = ChatRow((Message("user", "a"), Message("assistant", "b")))
    assert [row.text for row in (TextRow("a"), PromptRow("a", "b"), chat)] == ["a", "ab", "a\nb"]


# ------------------------------------------------------------------------------------------------ the hub's data sets


class Library:
    """Stands for the ``datasets`` library, which is an extra."""

    sets = {
        "some/set": {"train": [{"text": "one", "prompt": None}], "validation": [{"text": "two"}], "extra": [{"x": 1}]},
        "some/heldout": {"test": [{"text": "a"}]},
    }

    def load_dataset(self, repo: str, split: str | None) -> object:
        if repo not in self.sets:
            raise FileNotFoundError("no such\nset")
        return self.sets[repo] if split is None else self.sets[repo][split]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Library())


@pytest.mark.usefixtures("library")
def test_a_data_set_of_the_hub_gives_its_splits(tmp_path: Path) -> None:
    more = written(tmp_path / "data.jsonl", GOOD)
    assert read_sources(f"hf:some/set, {more}") == RowSplits([TextRow("one"), TextRow("fine")], [TextRow("two")])
    assert read_sources("hf:some/heldout:test") == RowSplits([TextRow("a")])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf:some/none", r"hf:some/none cannot be read \(no such set\)"),
        ("hf:some/heldout", "has no train split but test"),
        ("hf:some/set:extra", r"hf:some/set:extra:1: no \"text\".* \(it has x\)"),
    ],
)
def test_a_data_set_that_gives_no_rows_is_refused_in_one_line(source: str, reason: str) -> None:
    with pytest.raises(GemmaTuiError, match=reason) as refused:
        read_sources(source)
    assert "\n" not in str(refused.value)


def test_without_the_library_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"hf:some/set needs the datasets library: pip install 'gemma-tui\[datasets\]'"
    ):
        read_sources("hf:some/set")


# ------------------------------------------------------------------------------------------------ what holds no rows


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.jsonl", "does not exist"),
        ("data.csv", "neither .jsonl nor .txt"),
        ("folder.txt", "cannot be read"),
        ("pipe.txt", "is no file"),
    ],
)
def test_a_path_that_holds_no_rows_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    written(tmp_path / "data.csv", b"text\na\n")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(GemmaTuiError, match=reason):
        read_rows(tmp_path / name)


def test_a_folder_without_training_rows_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "valid.jsonl", GOOD)
    with pytest.raises(GemmaTuiError, match=r"neither train\.jsonl nor train\.txt"):
        read_split_rows(tmp_path)
