"""The files of a training's state, for both engines."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import CheckpointError

PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"
PLACE = "place.json"


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
