"""``clean()``: the one gate between foreign text and a terminal.

Neither Textual nor Rich removes escape and C1 control characters, and Gemma's byte tokens let the model itself emit
any byte. Everything from a model, a file, the hub or an exception passes here before it is shown.
"""

from __future__ import annotations

import re

_TAB_AND_NEWLINE = (0x09, 0x0A)
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_PICTURES = (
    {c: chr(0x2400 + c) for c in range(0x20) if c not in _TAB_AND_NEWLINE}
    | {0x7F: "\u2421"}
    | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
    | dict.fromkeys(_BIDI, "\ufffd")
    | dict.fromkeys((0x2028, 0x2029), "\ufffd")
    | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
    | dict.fromkeys(range(0xE0000, 0xE0080), "\ufffd")
)


def clean(text: str) -> str:
    """The text with every control, bidirectional, surrogate and tag character replaced by a visible one.

    The length stays, so offsets into the text stay right. Tabs and newlines stay as they are.
    """
    return text.translate(_PICTURES)


def one_line(text: str, limit: int = 200) -> str:
    """Cleaned, on one line, cut to ``limit`` characters: for labels, tables and error lines."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


_SECRETS = re.compile(r"hf_(?:(?:jwt|oauth)_[\w.\-]+|[A-Za-z0-9]{8,})|(?<=Bearer )\S+|(?<=[?&]token=)[^&\s]+", re.ASCII)


def without_tokens(text: str) -> str:
    """The text with every access token of the hub replaced: for errors, logs and tracebacks."""
    return _SECRETS.sub("[token]", text)
