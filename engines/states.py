"""The files of a training's state, for both engines."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.checkpoints import read_arrays
from engines.errors import CheckpointError

PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"
PLACE = "place.json"
SEEN = "seen.safetensors"
"""Not there before the first step that is observed."""


def read_place(path: Path) -> dict[str, Any]:
    """Step, optimizer, unmerged updates and random states, which are bytes by the generator's name.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    try:
        place = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(place["step"], int) or not isinstance(place["pending"], list):
            raise TypeError
        random = {name: base64.b64decode(text, validate=True) for name, text in place["random"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): take an earlier checkpoint") from None
    return {**place, "random": random}


def check_parameters(
    folder: Path, changed: Collection[str], known: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray]
) -> None:
    """Whether saved parameters are those of a training: all that it changes, none that it has not, in their shapes.

    Raises:
        CheckpointError: they are not.
    """
    fits = set(changed) <= set(arrays) <= set(known)
    if not fits or any(known[name] != array.shape for name, array in arrays.items()):
        raise CheckpointError(f"{folder} was saved by another training: its parameters do not fit")


def seen_arrays(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The leading singular vectors of each observed matrix, as arrays of a file."""
    return {f"{name}:{side}": vector for name, pair in pairs.items() for side, vector in zip("uv", pair, strict=True)}


def read_seen(folder: Path, known: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What ``seen_arrays`` made, float32; nothing where no step was observed.

    Args:
        known: the shape of each parameter of the model, by name.

    Raises:
        CheckpointError: the file is broken, or of a model with other matrices.
    """
    arrays = read_arrays(folder / SEEN) if (folder / SEEN).exists() else {}
    names = {name.rpartition(":")[0] for name in arrays}
    shapes = {f"{n}:{side}": known.get(f"{n}.weight", (0, 0))[i : i + 1] for n in names for i, side in enumerate("uv")}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise CheckpointError(f"{folder} was saved by another training: the directions it saw do not fit")
    return {name: (arrays[f"{name}:u"], arrays[f"{name}:v"]) for name in names}
