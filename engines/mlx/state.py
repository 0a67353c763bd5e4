"""What training goes on from, on disk, in MLX. The file mirrors ``engines/torch/state.py``."""

from __future__ import annotations

import base64
from collections.abc import Collection
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from engines.checkpoints import read_arrays, write_arrays, write_json
from engines.errors import CheckpointError
from engines.mlx import optimizers
from engines.mlx.adapters import lora_layers
from engines.mlx.device import random_state
from engines.mlx.model import Gemma3
from engines.mlx.rank1 import rank1_layers
from engines.mlx.training import Training
from engines.states import OPTIMIZER, PARAMETERS, PLACE, SEEN, check_parameters, read_place, read_seen, seen_arrays


def save(model: Gemma3, training: Training, touched: Collection[str], folder: Path) -> list[Path]:
    """Write everything that steps changed, those of a training before (``touched``) too."""
    before = {n: a for n, a in tree_flatten(model.parameters()) if n in touched}
    arrays = changing(model, training) | before
    write_arrays(folder / PARAMETERS, {n: np.array(a.astype(mx.float32)) for n, a in arrays.items()})
    write_arrays(folder / OPTIMIZER, optimizers.state_of(training.optimizer))
    pending = [name for name, layer in rank1_layers(model).items() if layer.pending]
    random = {"mlx": base64.b64encode(np.array(random_state()).tobytes()).decode()}
    place = {
        "step": training.step,
        "optimizer": training.settings.optimizer.name,
        "pending": pending,
        "random": random,
    }
    write_json(folder / PLACE, place)
    written = [folder / PARAMETERS, folder / OPTIMIZER, folder / PLACE]
    if training.seen:
        pairs = {name: (np.array(u), np.array(v)) for name, (u, v) in training.seen.items()}
        write_arrays(folder / SEEN, seen_arrays(pairs))
        written.append(folder / SEEN)
    return written


def load(model: Gemma3, training: Training, folder: Path) -> None:
    """Put back what ``save`` wrote.

    Raises:
        CheckpointError: the files are broken, or of a training with other parameters.
    """
    place, state = read_place(folder / PLACE), read_arrays(folder / OPTIMIZER)
    changed, arrays = changing(model, training), read_arrays(folder / PARAMETERS)
    known = changed | dict(tree_flatten(model.parameters()))
    shapes = {n: tuple(t.shape) for n, t in known.items()}
    check_parameters(folder, changed, shapes, arrays)
    seen = read_seen(folder, shapes)
    if optimizers.foreign(state, training.trained) or place.get("optimizer") != training.settings.optimizer.name:
        raise CheckpointError(f"{folder} was saved by another training: its optimizer does not fit")
    if len(place["random"].get("mlx", b"")) != 8:
        raise CheckpointError(f"{folder} holds no random state of MLX: take an earlier checkpoint")
    model.update(tree_unflatten([(n, mx.array(a)) for n, a in arrays.items()]))
    optimizers.restore(training.optimizer, state)
    training.step = place["step"]
    training.seen = {name: (mx.array(u), mx.array(v)) for name, (u, v) in seen.items()}
    for name, layer in rank1_layers(model).items():
        layer.pending = name in place["pending"]
    high, low = np.frombuffer(place["random"]["mlx"], np.uint32)
    mx.random.seed(int(high) << 32 | int(low))
    mx.eval(model.parameters())


def changing(model: Gemma3, training: Training) -> dict[str, mx.array]:
    """All arrays that steps and merges change, float32, by name."""
    parameters = dict(tree_flatten(model.parameters()))
    merged = {**(lora_layers(model) if training.settings.merging else {}), **rank1_layers(model)}
    names = {*training.trained, *(n for n in parameters if n.rpartition(".")[0] in merged)}
    return {name: array for name, array in parameters.items() if name in names}
