"""Model cards as plain text: what a stranger wrote, without markup, links, pictures and HTML."""

from __future__ import annotations

import re
from pathlib import Path

from gemma_tui.errors import GemmaTuiError
from gemma_tui.text import clean

MAX_BYTES = 256 << 10
MAX_LINES = 2000
MAX_LINE = 4000

# Each has a bound on what it may span, so that no text takes more than a pass.
_PICTURE = re.compile(r"!\[([^\[\]]{0,200})\]\([^()\s]{0,2000}\)")
_LINK = re.compile(r"\[([^\[\]]{0,500})\]\((?:[^()\s]{0,2000})(?:\s[^()]{0,200})?\)")
_TAG = re.compile(r"</?[a-zA-Z!][^<>]{0,2000}>")
_MARK = re.compile(r"^[ \t]{0,3}(#{1,6}[ \t]+|> ?)|(\*\*|__|`)", re.MULTILINE)
_LICENCE = re.compile(r"^license(?:_name)?:[ \t]*['\"]?([\w.\-]{1,60})", re.MULTILINE)
_FENCE = "---"


def read_card(folder: Path) -> tuple[str, str]:
    """The licence that a folder's ``README.md`` names, and its text; empty where there is none.

    Raises:
        GemmaTuiError: the file cannot be read.
    """
    path = folder / "README.md"
    if not path.is_file():
        return "", ""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES)
    except OSError as error:
        raise GemmaTuiError(f"{path} cannot be read ({error.strerror}): check the file") from None
    head, body = _parts(raw.decode("utf-8", errors="replace").replace("\r\n", "\n"))
    found = _LICENCE.search(head)
    return found[1] if found else "", plain_text(body)


def plain_text(markdown: str) -> str:
    """Markdown as text for a terminal: at most 2,000 lines, each cut to 4,000 characters, cleaned."""
    lines = [line[:MAX_LINE] for line in markdown.split("\n")[:MAX_LINES]]
    text = "\n".join(_TAG.sub("", _LINK.sub(r"\1", _PICTURE.sub(r"\1", line))).rstrip() for line in lines)
    text = _MARK.sub("", text)
    return clean(re.sub(r"\n{3,}", "\n\n", text).strip())


def _parts(text: str) -> tuple[str, str]:
    """Front matter and the rest. The front matter is never parsed: YAML can be a bomb."""
    lines = text.split("\n")
    if lines[0].strip() != _FENCE:
        return "", text
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == _FENCE), None)
    return ("", text) if end is None else ("\n".join(lines[1:end]), "\n".join(lines[end + 1 :]))
