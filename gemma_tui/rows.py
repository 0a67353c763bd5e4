"""Rows of text from files: ``train.jsonl`` and ``valid.jsonl`` as mlx-lm and others have them, or ``.txt``."""

from __future__ import annotations

import json
from pathlib import Path

from gemma_tui.errors import GemmaTuiError

MAX_ROW_CHARACTERS = 64 << 20


def data_path(written: str) -> Path:
    """A path as a person writes it. The home of no one stays as it is, to be named as missing."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


def read_sources(sources: str) -> tuple[list[str], list[str]]:
    """Texts for training and for validation of all files and folders that are named, with commas between.

    Raises:
        GemmaTuiError: as ``read_split_rows``.
    """
    found = [read_split_rows(data_path(part.strip())) for part in sources.split(",") if part.strip()]
    return [row for train, _ in found for row in train], [row for _, valid in found for row in valid]


def read_split_rows(path: Path) -> tuple[list[str], list[str]]:
    """Texts for training and for validation: of a folder's ``train`` and ``valid`` files, or of one file and none.

    Raises:
        GemmaTuiError: a file is missing, of another kind, not UTF-8, or a row is broken.
    """
    if path.is_dir():
        train, valid = (_split_file(path, name) for name in ("train", "valid"))
        if train is None:
            raise GemmaTuiError(f"{path} has neither train.jsonl nor train.txt: name a data folder or file")
        return read_rows(train), read_rows(valid) if valid else []
    return read_rows(path), []


def _split_file(folder: Path, name: str) -> Path | None:
    return next((p for ending in (".jsonl", ".txt") if (p := folder / f"{name}{ending}").is_file()), None)


def read_rows(path: Path) -> list[str]:
    """The texts of one file: each ``text`` of a ``.jsonl``, or a ``.txt`` as one row.

    Raises:
        GemmaTuiError: the file is missing, of another kind, not UTF-8, or a row is broken; the line is named.
    """
    if not path.exists():
        raise GemmaTuiError(f"{path} does not exist: name a data file or folder")
    if path.suffix not in (".jsonl", ".txt"):
        raise GemmaTuiError(f"{path} is neither .jsonl nor .txt: convert it to one of them")
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".txt":
                return [file.read()]
            return [_row(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise GemmaTuiError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise GemmaTuiError(f"{path}:{_undecodable_line(path)}: not UTF-8 text: convert the file first") from None


def _undecodable_line(path: Path) -> int:
    """The decoder counts bytes from the start of its buffer, so the line is looked for."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _row(path: Path, number: int, line: str) -> str:
    if len(line) > MAX_ROW_CHARACTERS:
        raise GemmaTuiError(f"{path}:{number}: the row is over {MAX_ROW_CHARACTERS:,} characters: split it")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GemmaTuiError(f"{path}:{number}: not a JSON row ({str(error)[:60]}): mend or remove the line") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, row))[:60] if isinstance(row, dict) else type(row).__name__
        raise GemmaTuiError(f'{path}:{number}: no "text" in the row (it has {keys}): every row needs one')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise GemmaTuiError(f"{path}:{number}: half a surrogate pair in the text: mend or remove the row") from None
    return text
