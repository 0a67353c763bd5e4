"""GGUF files: a bounded parser and the dequantised tensors.

A GGUF file is a header (typed key/value pairs, then a table of tensors) followed by the tensors' bytes:

    "GGUF"  version u32  tensor count u64  key count u64
    key count    x  (name string, type u32, value)
    tensor count x  (name string, rank u32, dims u64[rank], kind u32, offset u64)
    padding to the alignment, then the tensor data; offsets count from here

A string is a u64 length and UTF-8 bytes; an array is a type u32, a count u64 and the elements. Dims are stored fastest
first, the reverse of numpy's order. Every count, length and offset is checked against the size of the file before
anything is allocated from it: readers that trusted them are a known way into a process (CVE-2024-23605 and later).

Source: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engines.errors import CheckpointError

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 100_000
MAX_KEYS = 65_536
MAX_RANK = 4
MAX_NAME = 512
MAX_NESTING = 3
MAX_ELEMENTS = 2_000_000
CHUNK_VALUES = 1 << 18
"""Values dequantised at once: small enough that the intermediates, several times as large, stay in the cache."""

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1",
           10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: ``shape`` is row-major (numpy order), ``offset`` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed header. Numeric arrays of the metadata are read-only numpy arrays, the others are lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


@dataclass
class _Reader:
    """A forward reader: ``left`` bytes may still be taken, of the file or of what a header may have."""

    path: Path
    stream: BinaryIO
    left: int


# ---------------------------------------------------------------------------------------------------- the container


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Parse the header of a little-endian GGUF file of version 2 or 3.

    Raises:
        CheckpointError: the file is missing, truncated, of another format or version, over a limit, or its tensors
            overlap, lie outside the file or have an unknown quantisation type.
    """
    path = Path(path)
    with _opened(path) as (stream, size):
        reader = _Reader(path, stream, min(size, MAX_HEADER_BYTES))
        _check_magic(reader)
        tensor_count = _count(reader, "tensors", MAX_TENSORS, 32)
        key_count = _count(reader, "metadata keys", MAX_KEYS, 13)
        metadata = _read_metadata(reader, key_count)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise broken(path, f"its alignment {short(alignment)} is not a power of two from 8")
        table = [_read_tensor_info(reader) for _ in range(tensor_count)]
        start = -(-stream.tell() // alignment) * alignment
    return GGUFFile(path, metadata, _placed(path, table, start, alignment, size))


def tensor_of(file: GGUFFile, name: str) -> GGUFTensor:
    """One tensor of the table.

    Raises:
        CheckpointError: it is missing.
    """
    if name not in file.tensors:
        raise broken(file.path, f"tensor {short(name)} is missing")
    return file.tensors[name]


def dequantized(file: GGUFFile, name: str) -> np.ndarray:
    """Read one tensor as float32, in its shape. Peak memory is the result plus a few megabytes.

    Raises:
        CheckpointError: the file has no such tensor, has shrunk, or this quantisation type cannot be read.
    """
    tensor = tensor_of(file, name)
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    step = max(CHUNK_VALUES // block, 1) * block
    try:
        flat = np.empty(math.prod(tensor.shape), np.float32)
    except MemoryError:
        reason = f"there is no memory for tensor {short(name)}"
        raise unsupported(file.path, reason, "a smaller model or close other programs") from None
    with _opened(file.path) as (stream, _):
        stream.seek(tensor.offset)
        for first in range(0, flat.size, step):
            part = flat[first : first + step]
            data = stream.read(part.size // block * block_bytes)
            if len(data) != part.size // block * block_bytes:
                raise broken(file.path, "it has become shorter since it was opened")
            part[:] = _dequantized_blocks(file.path, tensor, data)
    return flat.reshape(tensor.shape)


def _dequantized_blocks(path: Path, tensor: GGUFTensor, data: bytes) -> np.ndarray:
    """float32 ``[values]`` of consecutive quantisation blocks."""
    # One long row, because the library loops in Python over groups of 16 rows.
    row = np.frombuffer(data, np.uint8)[None, :]
    try:
        with np.errstate(all="ignore"):
            return np.asarray(dequantize(row, tensor.kind)[0])
    except NotImplementedError:
        reason = f"tensor {short(tensor.name)} has type {tensor.kind.name}, which cannot be dequantised"
        raise unsupported(path, reason, "a file of another quantisation") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size; what the system refuses becomes a ``CheckpointError``."""
    try:
        # Asked before opening: opening a named pipe would wait for ever.
        if not path.is_file():
            raise CheckpointError(f"{path.name!r} is missing or not a regular file: name a GGUF file")
        with path.open("rb") as stream:
            yield stream, os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path.name!r} cannot be read ({error.strerror or error}): check the path") from None


def _check_magic(reader: _Reader) -> None:
    magic = _take(reader, 4)
    if magic == b"FUGG":
        raise unsupported(reader.path, "it is big-endian", "a little-endian file")
    if magic != b"GGUF":
        raise unsupported(reader.path, "it does not begin with the letters GGUF", "a GGUF file")
    version = _integer(reader, "<I")
    if version and not version & 0xFFFF:
        raise unsupported(reader.path, "it is big-endian", "a little-endian file")
    if version not in (2, 3):
        raise unsupported(reader.path, f"it has GGUF version {version}", "a file of version 2 or 3")


def _take(reader: _Reader, length: int) -> bytes:
    """The next ``length`` bytes; checked before they are allocated."""
    if length > reader.left:
        limit = f"than the file has or the limit of {MAX_HEADER_BYTES >> 20} MiB allows"
        raise broken(reader.path, f"its header claims more bytes {limit}")
    data = reader.stream.read(length)
    if len(data) != length:
        raise broken(reader.path, "it ends inside its header")
    reader.left -= length
    return data


def _integer(reader: _Reader, layout: str) -> int:
    return int(struct.unpack(layout, _take(reader, struct.calcsize(layout)))[0])


def _count(reader: _Reader, what: str, limit: int, smallest: int) -> int:
    """A u64 count of things that take at least ``smallest`` bytes each."""
    count = _integer(reader, "<Q")
    if count > limit or count * smallest > reader.left:
        raise broken(reader.path, f"it claims {count} {what}, more than its size or the limit of {limit} allows")
    return count


def _string(reader: _Reader, limit: int = MAX_HEADER_BYTES) -> str:
    length = _integer(reader, "<Q")
    if length > limit:
        raise broken(reader.path, f"it has a string of {length} bytes where {limit} are allowed")
    try:
        return _take(reader, length).decode("utf-8")
    except UnicodeDecodeError:
        raise broken(reader.path, "it has a string that is not UTF-8") from None


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = _string(reader, MAX_NAME)
        if key in metadata:
            raise broken(reader.path, f"it has the key {short(key)} twice")
        metadata[key] = _value(reader, _integer(reader, "<I"), MAX_NESTING)
    return metadata


def _value(reader: _Reader, kind: int, nesting: int) -> Any:
    """A metadata value: int, float, bool, str, or an array of ``nesting`` levels at most."""
    if kind == STRING:
        return _string(reader)
    if kind == ARRAY:
        return _array(reader, nesting)
    item = np.frombuffer(_take(reader, _number_type(reader, kind).itemsize), _number_type(reader, kind))[0].item()
    return bool(item) if kind == BOOL else item


def _array(reader: _Reader, nesting: int) -> np.ndarray | list[Any]:
    if nesting == 0:
        raise broken(reader.path, f"it has arrays nested more than {MAX_NESTING} deep")
    kind = _integer(reader, "<I")
    if kind in (STRING, ARRAY):
        count = _count(reader, "array elements", MAX_ELEMENTS, 8 if kind == STRING else 12)
        return [_value(reader, kind, nesting - 1) for _ in range(count)]
    number = _number_type(reader, kind)
    count = _count(reader, "array elements", MAX_HEADER_BYTES, number.itemsize)
    values = np.frombuffer(_take(reader, count * number.itemsize), number)
    return values != 0 if kind == BOOL else values


def _number_type(reader: _Reader, kind: int) -> np.dtype[Any]:
    if kind not in NUMBERS:
        raise broken(reader.path, f"it has a metadata value of the unknown type {kind}")
    return np.dtype(NUMBERS[kind])


def _read_tensor_info(reader: _Reader) -> GGUFTensor:
    """One row of the tensor table; its offset still counts from the start of the data."""
    name = _string(reader, MAX_NAME)
    rank = _integer(reader, "<I")
    if not 1 <= rank <= MAX_RANK:
        raise broken(reader.path, f"tensor {short(name)} has rank {rank}; 1 to {MAX_RANK} are allowed")
    shape = tuple(_integer(reader, "<Q") for _ in range(rank))[::-1]
    code = _integer(reader, "<I")
    offset = _integer(reader, "<Q")
    if 0 in shape:
        raise broken(reader.path, f"tensor {short(name)} has a dimension of zero")
    if code not in GGML_QUANT_SIZES:
        reason = f"tensor {short(name)} has the unknown quantisation type {code}"
        raise unsupported(reader.path, reason, "a file of another quantisation")
    kind = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise broken(reader.path, f"tensor {short(name)} has rows of {shape[-1]} values, no multiple of {block}")
    return GGUFTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)


def _placed(path: Path, table: list[GGUFTensor], start: int, alignment: int, size: int) -> dict[str, GGUFTensor]:
    """The tensors by name, with offsets from the start of the file; they lie inside it and apart from one another."""
    tensors: dict[str, GGUFTensor] = {}
    end = start
    for tensor in sorted(table, key=lambda tensor: tensor.offset):
        shown = short(tensor.name)
        offset = start + tensor.offset
        if tensor.name in tensors:
            raise broken(path, f"it has tensor {shown} twice")
        if tensor.offset % alignment:
            raise broken(path, f"tensor {shown} is not aligned to {alignment} bytes")
        if offset < end:
            raise broken(path, f"tensor {shown} overlaps another one")
        end = offset + tensor.nbytes
        if end > size:
            raise broken(path, f"tensor {shown} ends {end - size} bytes after the end of the file")
        tensors[tensor.name] = GGUFTensor(tensor.name, tensor.shape, tensor.kind, offset, tensor.nbytes)
    return tensors


def broken(path: Path, what: str) -> CheckpointError:
    """The error for a file whose bytes do not make sense."""
    return CheckpointError(f"{path.name!r} is a broken GGUF file, {what}: download it again")


def unsupported(path: Path, what: str, instead: str) -> CheckpointError:
    """The error for a sound file of a kind that is not computed here."""
    return CheckpointError(f"{path.name!r} cannot be imported, {what}: take {instead}")


def short(value: object) -> str:
    """A value from the file, harmless to a terminal and not long."""
    shown = repr(value[:80] if isinstance(value, str | list) else value).replace("\n", " ")
    return shown if len(shown) <= 80 else shown[:77] + "..."
