"""Rows of training data from files: ``train``, ``valid`` and ``test`` as mlx-lm and others have them.

A row is plain text, a prompt with its completion, or a conversation. Files are ``.jsonl`` or ``.txt``; ``hf:REPO``
reads a data set of the hub through the ``datasets`` library, where that is installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.text import one_line

MAX_ROW_CHARACTERS = 64 << 20
HUB = "hf:"
HUB_SPLITS = {"train": ("train",), "valid": ("validation", "valid"), "test": ("test",)}

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {SYSTEM: SYSTEM, USER: USER, ASSISTANT: ASSISTANT, "model": ASSISTANT}
"""What a role may be called; Gemma itself calls the assistant model."""

KINDS = (("text",), ("prompt", "completion"), ("messages",))


@dataclass(frozen=True)
class TextRow:
    """``{"text": ...}``, or a whole ``.txt``."""

    text: str


@dataclass(frozen=True)
class PromptRow:
    """``{"prompt": ..., "completion": ...}``."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """All that was written, without turns."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Message:
    """One turn; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatRow:
    """``{"messages": [{"role": ..., "content": ...}, ...]}``: perhaps a system text, then user and assistant."""

    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """All that was written, without turns."""
        return "\n".join(message.content for message in self.messages)


Row = TextRow | PromptRow | ChatRow


def row_json(row: Row) -> dict[str, Any]:
    """The object that ``parse_row`` reads."""
    if isinstance(row, ChatRow):
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in row.messages]}
    return {"text": row.text} if isinstance(row, TextRow) else {"prompt": row.prompt, "completion": row.completion}


@dataclass(frozen=True)
class RowSplits:
    """Rows for training, for validation and for a test at the end; only the first must be there."""

    train: list[Row] = field(default_factory=list)
    valid: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)


def data_path(written: str) -> Path:
    """A path as a person writes it. The home of no one stays as it is, to be named as missing."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


def read_sources(sources: str) -> RowSplits:
    """The rows of all files, folders and ``hf:REPO[:split]`` that are named, with commas between.

    Raises:
        GemmaTuiError: as ``read_split_rows`` and ``read_hub_rows``.
    """
    joined = RowSplits()
    for source in filter(None, map(str.strip, sources.split(","))):
        found = read_hub_rows(source) if source.startswith(HUB) else read_split_rows(data_path(source))
        joined.train.extend(found.train)
        joined.valid.extend(found.valid)
        joined.test.extend(found.test)
    return joined


def read_split_rows(path: Path) -> RowSplits:
    """The rows of a folder's ``train``, ``valid`` and ``test`` files, or of one file, which is all for training.

    Raises:
        GemmaTuiError: a file is missing, of another kind, not UTF-8, or a row is broken.
    """
    if not path.is_dir():
        return RowSplits(read_rows(path))
    train, valid, test = (_split_file(path, name) for name in ("train", "valid", "test"))
    if train is None:
        raise GemmaTuiError(f"{path} has neither train.jsonl nor train.txt: name a data folder or file")
    return RowSplits(read_rows(train), read_rows(valid) if valid else [], read_rows(test) if test else [])


def _split_file(folder: Path, name: str) -> Path | None:
    return next((p for ending in (".jsonl", ".txt") if (p := folder / f"{name}{ending}").is_file()), None)


def read_rows(path: Path) -> list[Row]:
    """The rows of one file: each line of a ``.jsonl``, or a ``.txt`` as one row.

    Raises:
        GemmaTuiError: the file is missing, of another kind, not UTF-8, or a row is broken; the line is named.
    """
    if not path.exists():
        raise GemmaTuiError(f"{path} does not exist: name a data file or folder")
    if path.suffix not in (".jsonl", ".txt"):
        raise GemmaTuiError(f"{path} is neither .jsonl nor .txt: convert it to one of them")
    if not path.is_file() and not path.is_dir():  # a pipe would keep its reader waiting
        raise GemmaTuiError(f"{path} is no file: copy what it gives into one")
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".txt":
                return [TextRow(file.read())]
            return [_line(f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise GemmaTuiError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise GemmaTuiError(f"{path}:{_undecodable_line(path)}: not UTF-8 text: convert the file first") from None


def read_hub_rows(source: str) -> RowSplits:
    """The rows of ``hf:REPO``, whose validation and test splits are taken too, or of ``hf:REPO:split``.

    Raises:
        UsageError: the ``datasets`` library is not installed.
        GemmaTuiError: the library cannot read the data set, or a row is broken.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{source} needs the datasets library: pip install 'gemma-tui[datasets]'") from None
    repo, _, split = source.removeprefix(HUB).partition(":")
    try:
        found = datasets.load_dataset(repo, split=split or None)
    except Exception as error:  # the library raises what the hub, the network and its readers raise
        reason = one_line(str(error), 160)
        raise GemmaTuiError(f"{source} cannot be read ({reason}): check the name and the network") from None
    if split:
        return RowSplits(_hub_split(source, found))
    chosen = {name: next((n for n in names if n in found), None) for name, names in HUB_SPLITS.items()}
    if chosen["train"] is None:
        raise GemmaTuiError(f"{source} has no train split but {', '.join(found)}: name one, as {source}:SPLIT")
    return RowSplits(**{name: _hub_split(f"{source}:{n}", found[n]) for name, n in chosen.items() if n})


def _hub_split(where: str, rows: Any) -> list[Row]:
    """Columns of other rows come as None."""
    return [
        parse_row(f"{where}:{number}", {key: value for key, value in row.items() if value is not None})
        for number, row in enumerate(rows, 1)
    ]


def _undecodable_line(path: Path) -> int:
    """The decoder counts bytes from the start of its buffer, so the line is looked for."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _line(where: str, line: str) -> Row:
    if len(line) > MAX_ROW_CHARACTERS:
        raise GemmaTuiError(f"{where}: the row is over {MAX_ROW_CHARACTERS:,} characters: split it")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GemmaTuiError(f"{where}: not a JSON row ({str(error)[:60]}): mend or remove the line") from None
    return parse_row(where, row)


def parse_row(where: str, row: Any) -> Row:
    """The typed row of a JSON object; further keys are left alone.

    Args:
        where: the file and line, for the error.

    Raises:
        GemmaTuiError: it is none of the three kinds, or more than one, or a part of it is broken.
    """
    if not isinstance(row, Mapping):
        raise _broken(where, f"the row is {_name(row)}, no object", 'write {"text": ...}')
    present = [key for kind in KINDS for key in kind if key in row]
    kinds = [kind for kind in KINDS if any(key in row for key in kind)]
    if not kinds:
        keys = one_line(", ".join(map(str, row)), 60) or "nothing"
        raise _broken(where, f'no "text", "prompt" or "messages" in the row (it has {keys})', "every row needs one")
    if len(kinds) > 1:
        raise _broken(where, f"the row has {' and '.join(present)}", "keep the keys of one kind of row")
    missing = [key for key in kinds[0] if key not in row]
    if missing:
        raise _broken(where, f'the row has "{present[0]}" but no "{missing[0]}"', "every row needs both")
    if kinds[0] == ("messages",):
        return _chat(where, row)
    texts = [_text(where, key, row[key]) for key in kinds[0]]
    return TextRow(*texts) if len(texts) == 1 else PromptRow(*texts)


def _chat(where: str, row: Mapping[str, Any]) -> ChatRow:
    given = row["messages"]
    if row.get("tools"):
        raise _broken(where, "the row has tools, for which Gemma's turns have no place", 'remove "tools"')
    if not isinstance(given, list) or not given:
        raise _broken(where, f"messages is {_name(given)}", "give a list of turns")
    messages = tuple(_message(f"{where}: message {number}", turn) for number, turn in enumerate(given, 1))
    spoken = [message.role for message in messages[messages[0].role == SYSTEM :]]
    if SYSTEM in spoken:
        raise _broken(where, "a system message is not the first", "move its text to the front")
    if spoken[:1] != [USER]:
        raise _broken(where, f"the first turn is {spoken[0] if spoken else 'missing'}", "begin with user")
    if any(a == b for a, b in pairwise(spoken)):
        raise _broken(where, "two turns of one role follow each other, which Gemma's turns do not allow", "join them")
    if ASSISTANT not in spoken:
        raise _broken(where, "no assistant turn, so there is nothing to learn", "add the answer or remove the row")
    return ChatRow(messages)


def _message(where: str, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise _broken(where, f"it is {_name(turn)}, no object", 'write {"role": ..., "content": ...}')
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = one_line(str(role), 40) if isinstance(role, str) else _name(role)
        raise _broken(where, f"unknown role {shown}", f"use {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise _broken(where, "it calls tools, for which Gemma's turns have no place", "write the call as content")
    return Message(ROLES[role], _text(where, "content", turn.get("content")))


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _broken(where, f'"{key}" is {_name(value)}, no text', "write it as one string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _broken(where, f'half a surrogate pair in "{key}"', "mend or remove the row") from None
    return value


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "missing or null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _broken(where: str, what: str, remedy: str) -> GemmaTuiError:
    return GemmaTuiError(f"{where}: {what}: {remedy}")
