"""What a model was trained to be decoded in blocks with: ``set_blocks.json`` beside its weights or its adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engines.checkpoints import write_json
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.models import Model

FILE = "set_blocks.json"
MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class SetBlocks:
    """How a model was trained on masked copies.

    Attributes:
        mask_token: the id that stood for a place that was not decided.
        max_block: the longest block it has seen.
    """

    mask_token: int
    max_block: int


def write_set_blocks(folder: Path, trained: SetBlocks | None) -> None:
    """Put the file beside weights or an adapter; none where there was no such training."""
    if trained is not None:
        write_json(folder / FILE, asdict(trained))


def set_blocks_of(model: Model) -> SetBlocks | None:
    """How a model was trained on masked copies; None if it was not, or has an adapter that was not.

    Raises:
        GemmaTuiError: the file is broken.
    """
    path = (model.adapter or model.folder) / FILE
    return _read(path) if path.is_file() else None


def _read(path: Path) -> SetBlocks:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError
        found = json.loads(path.read_text(encoding="utf-8"))
        read = SetBlocks(found["mask_token"], found["max_block"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise GemmaTuiError(f"{path} does not tell mask_token and max_block: train again, or remove it") from None
    if not all(type(value) is int and value >= 0 for value in (read.mask_token, read.max_block)):
        raise GemmaTuiError(f"{path} does not tell mask_token and max_block: train again, or remove it")
    return read
