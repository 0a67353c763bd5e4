"""Import of a Gemma-3 text model from a GGUF file into the Hugging Face layout.

A GGUF file is a header (typed key/value pairs, then a table of tensors) followed by the tensors' bytes:

    "GGUF"  version u32  tensor count u64  key count u64
    key count    x  (name string, type u32, value)
    tensor count x  (name string, rank u32, dims u64[rank], kind u32, offset u64)
    padding to the alignment, then the tensor data; offsets count from here

A string is a u64 length and UTF-8 bytes; an array is a type u32, a count u64 and the elements. Dims are stored fastest
first, the reverse of numpy's order. Every count, length and offset is checked against the size of the file before
anything is allocated from it: readers that trusted them are a known way into a process (CVE-2024-23605 and later).

Sources: docs/gguf.md of ggml-org/ggml; convert_hf_to_gguf.py of ggml-org/llama.cpp (tensor names, norms, token types);
transformers' ``generate_merges`` and ``GemmaConverter`` (tokeniser).
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
from engines.gemma3 import Gemma3Config, parse_config

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 100_000
MAX_KEYS = 65_536
MAX_RANK = 4
MAX_NAME = 512
MAX_NESTING = 3
MAX_TOKENS = 2_000_000
MAX_PIECE = 256
CHUNK_VALUES = 1 << 18
"""Values dequantised at once: small enough that the intermediates, several times as large, stay in the cache."""

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1",
           10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Path of a parameter inside a layer: Hugging Face's, then llama.cpp's."""

IMAGE_PARTS = ("v.", "mm.")
"""Name prefixes of a vision tower, which some files carry along and the text model does not use."""


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
            raise _broken(path, f"its alignment {_short(alignment)} is not a power of two from 8")
        table = [_read_tensor_info(reader) for _ in range(tensor_count)]
        start = -(-stream.tell() // alignment) * alignment
    return GGUFFile(path, metadata, _placed(path, table, start, alignment, size))


def dequantized(file: GGUFFile, name: str) -> np.ndarray:
    """Read one tensor as float32, in its shape. Peak memory is the result plus a few megabytes.

    Raises:
        CheckpointError: the file has no such tensor, has shrunk, or this quantisation type cannot be read.
    """
    tensor = _tensor(file, name)
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    step = max(CHUNK_VALUES // block, 1) * block
    try:
        flat = np.empty(math.prod(tensor.shape), np.float32)
    except MemoryError:
        reason = f"there is no memory for tensor {_short(name)}"
        raise _unsupported(file.path, reason, "a smaller model or close other programs") from None
    with _opened(file.path) as (stream, _):
        stream.seek(tensor.offset)
        for first in range(0, flat.size, step):
            part = flat[first : first + step]
            data = stream.read(part.size // block * block_bytes)
            if len(data) != part.size // block * block_bytes:
                raise _broken(file.path, "it has become shorter since it was opened")
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
        reason = f"tensor {_short(tensor.name)} has type {tensor.kind.name}, which cannot be dequantised"
        raise _unsupported(path, reason, "a file of another quantisation") from None


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
        raise _unsupported(reader.path, "it is big-endian", "a little-endian file")
    if magic != b"GGUF":
        raise _unsupported(reader.path, "it does not begin with the letters GGUF", "a GGUF file")
    version = _integer(reader, "<I")
    if version and not version & 0xFFFF:
        raise _unsupported(reader.path, "it is big-endian", "a little-endian file")
    if version not in (2, 3):
        raise _unsupported(reader.path, f"it has GGUF version {version}", "a file of version 2 or 3")


def _take(reader: _Reader, length: int) -> bytes:
    """The next ``length`` bytes; checked before they are allocated."""
    if length > reader.left:
        limit = f"than the file has or the limit of {MAX_HEADER_BYTES >> 20} MiB allows"
        raise _broken(reader.path, f"its header claims more bytes {limit}")
    data = reader.stream.read(length)
    if len(data) != length:
        raise _broken(reader.path, "it ends inside its header")
    reader.left -= length
    return data


def _integer(reader: _Reader, layout: str) -> int:
    return int(struct.unpack(layout, _take(reader, struct.calcsize(layout)))[0])


def _count(reader: _Reader, what: str, limit: int, smallest: int) -> int:
    """A u64 count of things that take at least ``smallest`` bytes each."""
    count = _integer(reader, "<Q")
    if count > limit or count * smallest > reader.left:
        raise _broken(reader.path, f"it claims {count} {what}, more than its size or the limit of {limit} allows")
    return count


def _string(reader: _Reader, limit: int = MAX_HEADER_BYTES) -> str:
    length = _integer(reader, "<Q")
    if length > limit:
        raise _broken(reader.path, f"it has a string of {length} bytes where {limit} are allowed")
    try:
        return _take(reader, length).decode("utf-8")
    except UnicodeDecodeError:
        raise _broken(reader.path, "it has a string that is not UTF-8") from None


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = _string(reader, MAX_NAME)
        if key in metadata:
            raise _broken(reader.path, f"it has the key {_short(key)} twice")
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
        raise _broken(reader.path, f"it has arrays nested more than {MAX_NESTING} deep")
    kind = _integer(reader, "<I")
    if kind in (STRING, ARRAY):
        count = _count(reader, "array elements", MAX_TOKENS, 8 if kind == STRING else 12)
        return [_value(reader, kind, nesting - 1) for _ in range(count)]
    number = _number_type(reader, kind)
    count = _count(reader, "array elements", MAX_HEADER_BYTES, number.itemsize)
    values = np.frombuffer(_take(reader, count * number.itemsize), number)
    return values != 0 if kind == BOOL else values


def _number_type(reader: _Reader, kind: int) -> np.dtype[Any]:
    if kind not in NUMBERS:
        raise _broken(reader.path, f"it has a metadata value of the unknown type {kind}")
    return np.dtype(NUMBERS[kind])


def _read_tensor_info(reader: _Reader) -> GGUFTensor:
    """One row of the tensor table; its offset still counts from the start of the data."""
    name = _string(reader, MAX_NAME)
    rank = _integer(reader, "<I")
    if not 1 <= rank <= MAX_RANK:
        raise _broken(reader.path, f"tensor {_short(name)} has rank {rank}; 1 to {MAX_RANK} are allowed")
    shape = tuple(_integer(reader, "<Q") for _ in range(rank))[::-1]
    code = _integer(reader, "<I")
    offset = _integer(reader, "<Q")
    if 0 in shape:
        raise _broken(reader.path, f"tensor {_short(name)} has a dimension of zero")
    if code not in GGML_QUANT_SIZES:
        reason = f"tensor {_short(name)} has the unknown quantisation type {code}"
        raise _unsupported(reader.path, reason, "a file of another quantisation")
    kind = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise _broken(reader.path, f"tensor {_short(name)} has rows of {shape[-1]} values, no multiple of {block}")
    return GGUFTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)


def _placed(path: Path, table: list[GGUFTensor], start: int, alignment: int, size: int) -> dict[str, GGUFTensor]:
    """The tensors by name, with offsets from the start of the file; they lie inside it and apart from one another."""
    tensors: dict[str, GGUFTensor] = {}
    end = start
    for tensor in sorted(table, key=lambda tensor: tensor.offset):
        shown = _short(tensor.name)
        offset = start + tensor.offset
        if tensor.name in tensors:
            raise _broken(path, f"it has tensor {shown} twice")
        if tensor.offset % alignment:
            raise _broken(path, f"tensor {shown} is not aligned to {alignment} bytes")
        if offset < end:
            raise _broken(path, f"tensor {shown} overlaps another one")
        end = offset + tensor.nbytes
        if end > size:
            raise _broken(path, f"tensor {shown} ends {end - size} bytes after the end of the file")
        tensors[tensor.name] = GGUFTensor(tensor.name, tensor.shape, tensor.kind, offset, tensor.nbytes)
    return tensors


# -------------------------------------------------------------------------------------------------------- the model


def gemma3_config(file: GGUFFile) -> dict[str, Any]:
    """``config.json`` of a ``Gemma3ForCausalLM``, in keys that transformers 4 and 5 and mlx-lm all read.

    Raises:
        CheckpointError: by name, for another architecture, missing or odd keys, soft-capping, an unknown RoPE scaling.
    """
    model = _model(file)
    return model.to_dict() | {
        # transformers 5 refuses a float here.
        "query_pre_attn_scalar": int(model.query_pre_attn_scalar),
        "sliding_window_pattern": _key(file, "attention.sliding_window_pattern", 6),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def gemma3_tensors(file: GGUFFile) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of the text model: its Hugging Face name and float32 values, one at a time.

    Norm weights are stored as 1 + w by llama.cpp's converter and returned as w.

    Raises:
        CheckpointError: at once, for a missing, misshapen or left-over tensor; while iterating, for an unreadable one.
    """
    shapes = _model(file).parameter_shapes()
    sources = {name: _gguf_name(name) for name in shapes}
    for name, source in sources.items():
        found = _tensor(file, source).shape
        if found != shapes[name]:
            raise _broken(file.path, f"tensor {_short(source)} has shape {found} instead of {shapes[name]}")
    for name in file.tensors.keys() - set(sources.values()):
        if not name.startswith(IMAGE_PARTS):
            reason = f"tensor {_short(name)} is not a part of Gemma-3"
            raise _unsupported(file.path, reason, "a plain Gemma-3 text model")
    return ((name, _parameter(file, name, source)) for name, source in sources.items())


def _parameter(file: GGUFFile, name: str, source: str) -> np.ndarray:
    values = dequantized(file, source)
    if name.endswith("norm.weight"):
        with np.errstate(invalid="ignore"):
            values -= 1.0
    return values


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face parameter."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    layer, path = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[path]}.weight"


def _model(file: GGUFFile) -> Gemma3Config:
    """The architecture that the metadata describe; ``parse_config`` checks the type and range of each number."""
    architecture = file.metadata.get("general.architecture")
    if not _is(architecture, "gemma3"):
        raise _unsupported(file.path, f"its architecture is {_short(architecture)}", "a Gemma-3 model ('gemma3')")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if _key(file, key, 0) != 0:
            reason = f"gemma3.{key} is {_short(_key(file, key))}, which is not a term of Gemma-3"
            raise _unsupported(file.path, reason, "a plain Gemma-3 text model")
    config = {
        "model_type": "gemma3_text",
        "vocab_size": _tensor(file, "token_embd.weight").shape[0],
        "hidden_size": _key(file, "embedding_length"),
        "intermediate_size": _key(file, "feed_forward_length"),
        "num_hidden_layers": _key(file, "block_count"),
        "num_attention_heads": _key(file, "attention.head_count"),
        "num_key_value_heads": _key(file, "attention.head_count_kv"),
        "head_dim": _key(file, "attention.key_length", 256),
        "sliding_window": _key(file, "attention.sliding_window"),
        "sliding_window_pattern": _key(file, "attention.sliding_window_pattern", 6),
        "rope_theta": _key(file, "rope.freq_base"),
        "rope_local_base_freq": _key(file, "rope.freq_base_swa", 10_000.0),
        "rope_scaling": _rope_scaling(file),
        "rms_norm_eps": _shortest(_key(file, "attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": _key(file, "context_length"),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": _end_ids(file),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id", 0),
    }
    model = parse_config(config, repr(file.path.name))
    return parse_config(config | {"query_pre_attn_scalar": _query_scale(model)}, repr(file.path.name))


def _query_scale(model: Gemma3Config) -> int:
    """``query_pre_attn_scalar``, which GGUF does not store: the head size, except in the 27B model (62 layers)."""
    if model.num_hidden_layers == 62:
        return model.hidden_size // model.num_attention_heads
    return model.head_dim


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    kind = _key(file, "rope.scaling.type", "linear")
    factor = _key(file, "rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind != "linear":
        raise _unsupported(file.path, f"its RoPE scaling {_short(kind)} is unknown", "a plain Gemma-3 text model")
    return {"rope_type": "linear", "factor": factor}


def _end_ids(file: GGUFFile) -> list[Any]:
    """The end of a text and, where the file names one, the end of a turn."""
    end = file.metadata.get("tokenizer.ggml.eos_token_id", 1)
    turn = file.metadata.get("tokenizer.ggml.eot_token_id", end)
    return [end] if _is(turn, end) else [end, turn]


def _shortest(value: Any) -> Any:
    """The shortest decimal of a stored float32: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _key(file: GGUFFile, name: str, default: Any = None) -> Any:
    """A plain value among the architecture's keys."""
    value = file.metadata.get(f"gemma3.{name}", default)
    if value is None:
        raise _broken(file.path, f"its key gemma3.{name} is missing")
    if isinstance(value, list | np.ndarray):
        raise _unsupported(file.path, f"its key gemma3.{name} differs per layer", "a plain Gemma-3 text model")
    return value


def _is(value: object, wanted: object) -> bool:
    """Equality that stays a bool when the file has an array where a plain value belongs."""
    return type(value) is type(wanted) and not isinstance(value, np.ndarray) and value == wanted


def _tensor(file: GGUFFile, name: str) -> GGUFTensor:
    if name not in file.tensors:
        raise _broken(file.path, f"tensor {_short(name)} is missing")
    return file.tensors[name]


# ---------------------------------------------------------------------------------------------------- the tokeniser


def tokenizer_json(file: GGUFFile) -> dict[str, Any]:
    """``tokenizer.json`` for the ``tokenizers`` library, equal to Google's original apart from its image token.

    Raises:
        CheckpointError: the vocabulary is missing, is of another kind, too large, or inconsistent.
    """
    pieces, scores, kinds = _vocabulary(file)
    vocab = {piece: i for i, piece in enumerate(pieces) if kinds[i] != UNUSED}
    bos = pieces[_token_id(file, "bos_token_id", 2, vocab, pieces)]
    unknown = pieces[_token_id(file, "unknown_token_id", 3, vocab, pieces)]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(pieces, kinds),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, second, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(vocab, scores),
        },
    }  # fmt: skip


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, the best first, as transformers' ``generate_merges`` orders them.

    Sorted by score of the whole, then by the lengths of the halves, all descending; ties stay in the order of the
    pieces' ids and, inside a piece, of its halves' ids. With this order the list equals that of Google's original.
    """
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, i in vocab.items():
        score = scores[i]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        halves = [(left, right) for left, right in splits if left in vocab and right in vocab]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in halves]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in merges]


def _added_tokens(pieces: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """The pieces that are found in a text before anything else happens to it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": piece, **flags, "special": _is_special(piece, kind)}
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _is_special(piece: str, kind: int) -> bool:
    """Whether decoding may leave the token out.

    llama.cpp's converter calls by their looks what Google calls otherwise: unused places become control tokens, and
    the marks around an image user-defined ones.
    """
    if piece in ("<start_of_image>", "<end_of_image>"):
        return True
    return kind != USER_DEFINED and piece != "<mask>" and not piece.startswith("<unused")


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of all tokens, as the SentencePiece model had them."""
    model = file.metadata.get("tokenizer.ggml.model")
    if not _is(model, "llama"):
        reason = f"its tokeniser is {_short(model)}, not SentencePiece's ('llama')"
        raise _unsupported(file.path, reason, "a Gemma-3 model")
    stored = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(stored, list) or not all(isinstance(piece, str) and len(piece) <= MAX_PIECE for piece in stored):
        raise _broken(file.path, f"its tokens are not a list of strings of {MAX_PIECE} characters at most")
    scores = _per_token(file, "scores", len(stored))
    kinds = _per_token(file, "token_type", len(stored))
    if len(stored) > _tensor(file, "token_embd.weight").shape[0]:
        raise _broken(file.path, "it has more tokens than rows of token_embd.weight")
    # The converter writes runs of spaces as such, and gives user-defined pieces, which come before all merges, the
    # lowest score instead of the highest.
    marked = [p.replace(" ", "▁") if kind == USER_DEFINED else p for p, kind in zip(stored, kinds, strict=True)]
    if len(set(marked)) != len(marked):
        raise _broken(file.path, "its vocabulary has a token twice")
    ranked = [score if kind == NORMAL else 0.0 for score, kind in zip(scores, kinds, strict=True)]
    return marked, ranked, kinds


def _per_token(file: GGUFFile, key: str, count: int) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, np.ndarray) or len(values) != count or not np.isfinite(values).all():
        raise _broken(file.path, f"its {key} is not one number per token")
    return list(values.tolist())


def _token_id(file: GGUFFile, key: str, default: int, vocab: dict[str, int], pieces: list[str]) -> int:
    index = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if type(index) is not int or not 0 <= index < len(pieces) or pieces[index] not in vocab:
        raise _broken(file.path, f"its {key} {_short(index)} is not the id of a token")
    return index


# ----------------------------------------------------------------------------------------------------------- errors


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name!r} is a broken GGUF file, {what}: download it again")


def _unsupported(path: Path, what: str, instead: str) -> CheckpointError:
    return CheckpointError(f"{path.name!r} cannot be imported, {what}: take {instead}")


def _short(value: object) -> str:
    """A value from the file, harmless to a terminal and not long."""
    shown = repr(value[:80] if isinstance(value, str | list) else value).replace("\n", " ")
    return shown if len(shown) <= 80 else shown[:77] + "..."
