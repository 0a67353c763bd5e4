"""Weights and adapters on disk: validate, read, write.

A ``.safetensors`` file is validated here before any byte of it is used: MLX's loader accepts overlapping,
negative and fractional shapes that the reference parser rejects, and the reference parser puts no bound on what a
header may claim. Tensors are read one at a time, so that loading never holds a model twice.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engines.disk import sync
from engines.errors import CheckpointError
from engines.foreign_json import read_json

MAX_HEADER_BYTES = 25 << 20
MAX_TENSORS = 100_000
MAX_VALUES = 20 * MAX_TENSORS
"""Of a header's JSON, or an index's: a tensor has its name, dtype, shape and offsets."""

MAX_NAME = 512
MAX_RANK = 8
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
ARRAYS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "U32": np.dtype("<u4"),
}  # fmt: skip
"""What weights are kept in; U32 holds packed numbers of a few bits."""

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``dtype`` is safetensors' name, ``offset`` counts from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one ``.safetensors`` file, validated.

    Raises:
        CheckpointError: the file is missing or truncated, or its header is over the limits, is no JSON object, or
            describes tensors that overlap, leave holes, lie outside the file or do not fit their shape.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without an end
            raise _broken(path, "it is no regular file")
        size = status.st_size
        with path.open("rb") as file:
            header = file.read(header_length(path, file.read(8), size))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the path") from None
    return tensors_of(path, header, size)


def header_length(path: Path, first: bytes, size: int) -> int:
    """The bytes that a file's header takes behind the first eight, which tell it.

    Raises:
        CheckpointError: they are more than the file has, or over the limit.
    """
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > size - 8:
        raise _broken(path, f"its header claims {length:,} bytes, the file has {size:,}")
    if length > MAX_HEADER_BYTES:
        raise _broken(path, f"its header of {length:,} bytes is over the limit of {MAX_HEADER_BYTES:,}")
    return length


def tensors_of(path: Path, header: bytes, size: int) -> dict[str, StoredTensor]:
    """The tensors that the header of a file of ``size`` bytes names, validated; the file itself is not opened.

    Raises:
        CheckpointError: as ``read_header``.
    """
    entries, start = _parse_header(path, header), 8 + len(header)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise _broken(path, f"it names {len(entries):,} tensors, more than {MAX_TENSORS:,}")
    tensors = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _parse_header(path: Path, blob: bytes) -> dict[str, Any]:
    if not blob.startswith(b"{"):
        raise _broken(path, "its header is no JSON object")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key stands twice")
        return table

    try:
        header = read_json(blob, MAX_VALUES, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON ({str(error).splitlines()[0][:80]})") from None
    return header


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    shown = repr(name[:60])
    if len(name) > MAX_NAME:
        raise _broken(path, f"the tensor name {shown}... is longer than {MAX_NAME} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of {shown} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(path, f"{shown} has the unknown dtype {str(dtype)[:20]!r}")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise _broken(path, f"{shown} has no valid shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"{shown} has no valid data_offsets")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise _broken(path, f"{shown} needs {nbytes:,} bytes and is given {offsets[1] - offsets[0]:,}")
    return StoredTensor(path, name, dtype, tuple(shape), start + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Tensors must fill the file without holes, overlaps or a tail, as the reference parser demands."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise _broken(path, f"{tensor.name[:60]!r} overlaps its neighbour or leaves a hole")
        end += tensor.nbytes
    if end != size:
        raise _broken(path, f"its tensors end at byte {end:,}, the file at {size:,}: it is cut or has a tail")


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a safe .safetensors file: {reason}; take another copy")


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, from one file or from the shards its index names.

    Raises:
        CheckpointError: no weights are there, the index is broken or points outside, or a file is not valid.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        return _sharded(folder, index)
    if single.is_file():
        return read_header(single)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name one that holds a Gemma-3 model")
    pickles = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(ending))
    if pickles:
        raise CheckpointError(f"{folder} holds {pickles[0]}, a pickle, which could run code: get .safetensors weights")
    raise CheckpointError(f"{folder} holds no model.safetensors: name a folder with Gemma-3 weights")


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{index} is over the limit of {MAX_HEADER_BYTES:,} bytes: fetch it again")
        places = shard_map(index, index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read ({error.strerror}): check the path") from None
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        tensors |= read_header(folder / name)
    check_shards(index, places, tensors)
    return tensors


def shard_map(index: Path, blob: bytes) -> dict[str, str]:
    """For each tensor that the text of an index names, the file beside the index that holds it.

    Raises:
        CheckpointError: it is no index, or points elsewhere.
    """
    try:
        places: dict[str, str] = read_json(blob, MAX_VALUES)["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a shard index ({type(error).__name__}): fetch it again") from None
    for name in names:
        plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {str(name)[:60]!r}, which is no shard beside it: fetch it again")
    return places


def check_shards(index: Path, places: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Whether the shards hold every tensor that their index names.

    Raises:
        CheckpointError: one is missing.
    """
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise CheckpointError(f"{index} names {missing[0][:60]!r}, which no shard holds: fetch the model again")


def read_array(tensor: StoredTensor, kinds: Sequence[str] = FLOATS) -> np.ndarray:
    """The tensor's own bits: float32, float16, uint32, or bfloat16 as uint16.

    Args:
        kinds: the dtypes that may be, of ``ARRAYS``; packed weights alone are U32.

    Raises:
        CheckpointError: the dtype is another one, or the file shrank meanwhile.
    """
    if tensor.dtype not in kinds:
        raise CheckpointError(f"{tensor.path}: {tensor.name[:60]!r} is {tensor.dtype}; {' or '.join(kinds)} is needed")
    dtype: np.dtype[Any] = ARRAYS[tensor.dtype]
    count = math.prod(tensor.shape)
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        array = np.fromfile(file, dtype=dtype, count=count)
    if array.size != count:
        raise CheckpointError(f"{tensor.path} ended inside {tensor.name[:60]!r}: fetch it again")
    return array.reshape(tensor.shape)


def as_float32(array: np.ndarray) -> np.ndarray:
    """float32 from what ``read_array`` gives; uint16 is read as bfloat16."""
    if array.dtype == np.uint16:
        bits = array.astype(np.uint32)
        bits <<= 16  # in place: an embedding is gigabytes
        return bits.view(np.float32)
    return array.astype(np.float32, copy=False)


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    """bfloat16 bits as uint16, rounded to nearest even, from float32; NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def text_model_name(name: str) -> str | None:
    """The ``Gemma3ForCausalLM`` name of a stored tensor, or None for one that is not of the text model.

    Multimodal checkpoints put the text tower under ``language_model.model.`` (transformers 4) or
    ``model.language_model.`` (transformers 5); a stored ``lm_head`` repeats the tied embedding.
    """
    for prefix in ("language_model.model.", "model.language_model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name if name.startswith("model.") and not name.startswith("model.vision") else None


def text_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Those of the text model, by the names they have in ``Gemma3ForCausalLM``."""
    return {known: tensor for name, tensor in tensors.items() if (known := text_model_name(name)) is not None}


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, np.ndarray]], shapes: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Write one ``.safetensors`` file from a stream of tensors, holding one of them at a time.

    Args:
        tensors: names and arrays, in the order of ``shapes``; bfloat16 as uint16.
        shapes: for each name its safetensors dtype and shape.

    The file appears under its name only when whole and on disk.

    Raises:
        CheckpointError: the disk is full or not writable; nothing is left behind.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    with replacing(path) as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        for (name, array), expected in zip(tensors, shapes, strict=True):
            dtype, shape = shapes[expected]
            if name != expected or array.shape != shape or array.itemsize != ITEM_BYTES[dtype]:
                raise ValueError(f"{name} {array.dtype} {array.shape} does not follow the header at {expected}")
            file.write(np.ascontiguousarray(array).data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, whole and on disk; the old one stays if not.

    Raises:
        CheckpointError: the disk is full or not writable; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror}): free some space or take another folder"
        raise CheckpointError(reason) from None
    finally:
        partial.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write float32 or bfloat16 (uint16) arrays as one ``.safetensors`` file."""
    names = {np.dtype(np.uint16): "BF16", np.dtype(np.float32): "F32"}
    shapes = {name: (names[array.dtype], array.shape) for name, array in arrays.items()}
    write_safetensors(path, arrays.items(), shapes)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file that ``write_arrays`` wrote, float32.

    Raises:
        CheckpointError: the file is missing, broken or hostile.
    """
    return {name: as_float32(read_array(tensor)) for name, tensor in read_header(path).items()}


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole.

    Raises:
        CheckpointError: the disk is full or not writable; the old file stays.
    """
    with replacing(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def iterate_model(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and raw arrays of a text model, one at a time, in the order of ``shapes``.

    Raises:
        CheckpointError: a parameter is missing or has another shape than the config says.
    """
    stored = text_tensors(model_tensors(folder))
    check_shapes(folder, stored, shapes)
    for name in shapes:
        yield name, read_array(stored[name])


def check_shapes(where: Path | str, stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether parameters are there, not packed, and of these shapes.

    Raises:
        CheckpointError: one is not; the message begins with ``where``.
    """
    for name, shape in shapes.items():
        if name not in stored:
            raise CheckpointError(f"{where} lacks {name}: take a whole copy")
        if stored[name].dtype == "U32":
            raise CheckpointError(f"{where}: {name} is packed, and its config.json says nothing of it: take another")
        if stored[name].dtype not in FLOATS:
            raise CheckpointError(f"{where}: {name} is {stored[name].dtype}; {' or '.join(FLOATS)} is needed")
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} is {list(stored[name].shape)}, its config.json says {list(shape)}: take another copy"
            )
