"""Models of other formats to the Hugging Face layout, in the data folder."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engines.base import Progress
from engines.checkpoints import as_bfloat16, write_json, write_safetensors
from engines.gemma3 import parse_config
from engines.gguf import read_gguf
from engines.gguf_gemma3 import gemma3_config, gemma3_tensors, tokenizer_json
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.metering import free_bytes
from gemma_tui.hub.naming import free_name
from gemma_tui.output import bytes_text
from gemma_tui.rows import read_split_rows
from gemma_tui.tokenizer import train_tokenizer

RESERVE_BYTES = 1 << 30
"""Left free on the disk: a full one freezes a Mac."""

SMALLEST_VOCABULARY = 363


def import_gguf(source: Path, target: Path, progress: Progress) -> Path:
    """Write a Gemma-3 GGUF as bfloat16 safetensors with config and tokenizer to a new folder, which is returned.

    The folder appears under its name only when everything in it is whole.

    Raises:
        EngineError: the file is broken, or the disk is too small.
    """
    progress(0.0, "reading the file")
    file = read_gguf(source)
    config = gemma3_config(file)
    shapes = parse_config(config, str(source)).parameter_shapes()
    total = sum(math.prod(shape) for shape in shapes.values())
    ensure_space(target.parent, 2 * total + (64 << 20))

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        done = 0
        for tensor, array in gemma3_tensors(file):
            yield tensor, as_bfloat16(array)
            done += array.size
            progress(0.75 * done / total, f"converting {tensor}")

    with staging(target) as folder:
        write_safetensors(folder / "model.safetensors", arrays(), {n: ("BF16", s) for n, s in shapes.items()})
        progress(0.8, "rebuilding the tokenizer")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(file), ensure_ascii=False), encoding="utf-8")
        write_json(folder / "config.json", config)
    progress(1.0, "done")
    return target


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write in, removed at the end.

    Raises:
        GemmaTuiError: the disk is full or not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".partial", dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        raise GemmaTuiError(
            f"{target} cannot be written ({error.strerror}): free some space, or name another place"
        ) from None


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes ``target`` when the block ends well.

    Raises:
        GemmaTuiError: the disk is full or not writable.
    """
    with scratch(target) as folder:
        whole = folder / "whole"
        whole.mkdir()
        yield whole
        # Another process may have been quicker with the same model; its folder is as good.
        if not target.exists():
            whole.rename(target)


def ensure_space(folder: Path, needed: int, remedy: str = "set GEMMA_TUI_HOME") -> None:
    """Check that a disk holds what is to be written, with a reserve.

    Args:
        remedy: what else than freeing space may be done.

    Raises:
        GemmaTuiError: it does not; the message has the numbers.
    """
    free = free_bytes(folder)
    if free < needed + RESERVE_BYTES:
        short = bytes_text(needed + RESERVE_BYTES - free)
        raise GemmaTuiError(
            f"{folder} has no room for {bytes_text(needed)} and a reserve: free {short} more, or {remedy}"
        )


def new_model(name: str, data: Path, shape: Mapping[str, int]) -> Path:
    """An untrained Gemma-3: a config of the given shape, with a tokenizer learnt from the training rows of ``data``.

    Raises:
        EngineError: the name is taken, the shape is not valid, or the data are not readable.
    """
    target = paths.models() / free_name(name)
    config = parse_config({"model_type": "gemma3_text", "query_pre_attn_scalar": shape["head_dim"], **shape}, name)
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(f"vocab-size {config.vocab_size}: bytes and special tokens alone take {SMALLEST_VOCABULARY}")
    rows = read_split_rows(data).train
    tokenizer = train_tokenizer((row.text for row in rows), config.vocab_size)
    with staging(target) as folder:
        write_json(folder / "config.json", config.to_dict() | {"vocab_size": tokenizer.size})
        tokenizer.backend.save(str(folder / "tokenizer.json"))
    return target
