"""Files that call themselves ``.safetensors`` and must not be read, by what is wrong with each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engines.checkpoints import MAX_HEADER_BYTES, MAX_TENSORS


def entry(start: int, end: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw_file(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, given as an object, as JSON text or as bytes, and these data."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    blob = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(blob)) + blob + data


FOUR = np.arange(4, dtype=np.float32).tobytes()
GOOD = raw_file({"a": entry(0, 16, [2, 2])}, FOUR)
NESTED = "[" * 200_000 + "]" * 200_000
HUGE = 1 << 62

HOSTILE: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "seven bytes": b"\x00" * 7,
    "no header": struct.pack("<Q", 0),
    "header cut": GOOD[:20],
    "data cut": GOOD[:-1],
    "data gone": GOOD[:-16],
    "trailing bytes": GOOD + b"\x00",
    "header of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header one byte too long": struct.pack("<Q", len(GOOD) - 7) + GOOD[8:],
    "header of 99 MB": lambda: raw_file("{" + " " * 99_000_000 + "}"),
    "header just over the limit": lambda: raw_file("{}" + " " * (MAX_HEADER_BYTES - 1)),
    "header is a list": raw_file("[]"),
    "header starts with a space": raw_file(' {"a": 1}'),
    "header is not JSON": raw_file("{'a': 1}"),
    "header goes on after its end": raw_file("{}{}"),
    "header is not UTF-8": raw_file(b'{"\xff\xfe": 1}'),
    "header is UTF-16": raw_file("{}".encode("utf-16")),
    "nested lists": raw_file('{"a": ' + NESTED + "}"),
    "nested objects": raw_file('{"a":' * 100_000),
    "5000 digits": raw_file('{"a": ' + "9" * 5000 + "}"),
    "entry is NaN": raw_file('{"a": NaN}'),
    "shape of NaN": raw_file('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}', FOUR),
    "shape of 1e999": raw_file('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}', FOUR),
    "lone surrogate in a name": raw_file('{"\\ud800": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}', FOUR),
    "escape sequence in a name": raw_file({"\x1b]0;x\x07": entry(0, 16, [5])}, FOUR),
    "line break in a name": raw_file({"a\nb": entry(0, 16, [5])}, FOUR),
    "entry is null": raw_file({"a": None}),
    "entry is a list": raw_file({"a": ["F32", [4], [0, 16]]}, FOUR),
    "entry lacks a key": raw_file({"a": {"dtype": "F32", "shape": [4]}}, FOUR),
    "entry has a key more": raw_file({"a": entry(0, 16, [4]) | {"stride": [1]}}, FOUR),
    "negative shape": raw_file({"a": entry(0, 16, [-2, -2])}, FOUR),
    "fractional shape": raw_file({"a": entry(0, 18, [4.5])}, FOUR + b"\x00\x00"),
    "whole float shape": raw_file({"a": entry(0, 16, [4.0])}, FOUR),
    "bool shape": raw_file({"a": entry(0, 4, [True])}, FOUR[:4]),
    "text shape": raw_file({"a": entry(0, 16, "4")}, FOUR),
    "shape is null": raw_file({"a": entry(0, 4, None)}, FOUR[:4]),
    "offsets shorter than the shape": raw_file({"a": entry(0, 12, [4])}, FOUR),
    "offsets longer than the shape": raw_file({"a": entry(0, 20, [4])}, FOUR),
    "shape larger than its data": raw_file({"a": entry(0, 16, [5])}, FOUR),
    "product wraps to zero": raw_file({"a": entry(0, 0, [65536] * 4)}),
    "product wraps to four": raw_file({"a": entry(0, 16, [HUGE + 1, 4])}, FOUR),
    "dimension of 2^64": raw_file({"a": entry(0, 16, [2**64 + 4])}, FOUR),
    "nine dimensions": raw_file({"a": entry(0, 16, [1] * 8 + [4])}, FOUR),
    "negative offset": raw_file({"a": entry(-16, 0, [4])}, FOUR),
    "offsets the wrong way round": raw_file({"a": entry(16, 0, [4])}, FOUR),
    "fractional offset": raw_file({"a": entry(0, 16.0, [4])}, FOUR),
    "bool offset": raw_file({"a": entry(False, 16, [4])}, FOUR),
    "one offset": raw_file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16]}}, FOUR),
    "three offsets": raw_file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}, FOUR),
    "offsets past the end": raw_file({"a": entry(HUGE, HUGE + 16, [4])}, FOUR),
    "4 MB that claim 2 GB": lambda: raw_file(
        {f"t{i}": entry(0, 4 << 20, [1 << 20]) for i in range(500)}, b"\x00" * (4 << 20)
    ),
    "overlap": raw_file({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, FOUR + FOUR[:8]),
    "overlap and a tail of its length": raw_file({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, FOUR + FOUR),
    "the same bytes twice": raw_file({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}, FOUR),
    "hole before the data": raw_file({"a": entry(4, 20, [4])}, FOUR + FOUR[:4]),
    "hole between tensors": raw_file({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}, FOUR),
    "duplicate name": raw_file(
        '{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        ' "a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        FOUR,
    ),
    "duplicate key in an entry": raw_file(
        '{"a": {"dtype": "F32", "shape": [9], "shape": [4], "data_offsets": [0, 16]}}', FOUR
    ),
    "unknown dtype": raw_file({"a": entry(0, 16, [4], "F128")}, FOUR),
    "dtype in lower case": raw_file({"a": entry(0, 16, [4], "f32")}, FOUR),
    "dtype is a list": raw_file({"a": entry(0, 16, [4], ["F32"])}, FOUR),
    "dtype is a long text": raw_file({"a": entry(0, 16, [4], "F" * 100_000)}, FOUR),
    "name too long": raw_file({"n" * 513: entry(0, 16, [4])}, FOUR),
    "name far too long": raw_file({"n" * 100_000: entry(0, 16, [4])}, FOUR),
    "too many tensors": lambda: raw_file(
        "{" + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(MAX_TENSORS + 1)) + "}"
    ),
}  # fmt: skip


def hostile(path: Path, kind: str) -> Path:
    content = HOSTILE[kind]
    path.write_bytes(content() if callable(content) else content)
    return path
