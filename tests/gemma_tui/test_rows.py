from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tui.errors import GemmaTuiError
from gemma_tui.rows import read_rows, read_split_rows

GOOD = b'{"text": "fine"}\n'

BAD_ROWS = {
    "missing text": (b'{"prompt": "a", "completion": "b"}', "it has prompt, completion"),
    "empty object": (b"{}", 'no "text"'),
    "not JSON": (b"text", "not a JSON row"),
    "cut": (b'{"text": "a', "not a JSON row"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "a list": (b'["text"]', "it has list"),
    "a string": (b'"text"', "it has str"),
    "a number for text": (b'{"text": 1}', 'no "text"'),
    "null for text": (b'{"text": null}', 'no "text"'),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogate"),
    "nested lists": (b"[" * 100_000, "not a JSON row"),
    "nested objects": (b'{"text":' * 100_000, "not a JSON row"),
    "a number of 5000 digits": (b'{"text": ' + b"1" * 5000 + b"}", "not a JSON row"),
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
    assert read_rows(written(tmp_path / "data.jsonl", rows.encode())) == texts


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, ending: str) -> None:
    content = GOOD if ending == ".jsonl" else b"fine"
    assert read_rows(written(tmp_path / f"data{ending}", b"\xef\xbb\xbf" + content)) == ["fine"]


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "data.txt", b"one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_a_folder_gives_training_and_validation_rows(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", GOOD * 2)
    written(tmp_path / "valid.txt", b"held out")
    assert read_split_rows(tmp_path) == (["fine", "fine"], ["held out"])


def test_a_file_gives_training_rows_alone(tmp_path: Path) -> None:
    assert read_split_rows(written(tmp_path / "data.jsonl", GOOD)) == (["fine"], [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.jsonl", "does not exist"), ("data.csv", "neither .jsonl nor .txt"), ("folder.txt", "cannot be read")],
)
def test_a_path_that_holds_no_rows_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    written(tmp_path / "data.csv", b"text\na\n")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(GemmaTuiError, match=reason):
        read_rows(tmp_path / name)


def test_a_folder_without_training_rows_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "valid.jsonl", GOOD)
    with pytest.raises(GemmaTuiError, match=r"neither train\.jsonl nor train\.txt"):
        read_split_rows(tmp_path)
