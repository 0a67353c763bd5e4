"""What training goes on from, on disk, in torch. The file mirrors ``engines/mlx/state.py``."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.checkpoints import read_arrays, write_arrays, write_json
from engines.errors import CheckpointError
from engines.states import OPTIMIZER, PARAMETERS, PLACE, SEEN, check_parameters, read_place, read_seen, seen_arrays
from engines.torch import optimizers
from engines.torch.adapters import lora_layers
from engines.torch.model import Gemma3
from engines.torch.rank1 import rank1_layers
from engines.torch.training import Training


def save(model: Gemma3, training: Training, touched: Collection[str], folder: Path) -> list[Path]:
    """Write everything that steps changed, those of a training before (``touched``) too."""
    tensors = changing(model, training) | {n: p for n, p in model.named_parameters() if n in touched}
    write_arrays(folder / PARAMETERS, {n: t.detach().float().cpu().numpy() for n, t in tensors.items()})
    write_arrays(folder / OPTIMIZER, optimizers.state_of(training.optimizers, training.trained))
    pending = [name for name, layer in rank1_layers(model).items() if layer.pending]
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        random["mps"] = torch.mps.get_rng_state()
    place = {
        "step": training.step,
        "optimizer": training.settings.optimizer.name,
        "pending": pending,
        "random": {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in random.items()},
    }
    write_json(folder / PLACE, place)
    written = [folder / PARAMETERS, folder / OPTIMIZER, folder / PLACE]
    if training.seen:
        pairs = {name: (u.cpu().numpy(), v.cpu().numpy()) for name, (u, v) in training.seen.items()}
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
    known = changed | dict(model.named_parameters())
    shapes = {n: tuple(t.shape) for n, t in known.items()}
    check_parameters(folder, changed, shapes, arrays)
    seen = read_seen(folder, shapes)
    foreign = [place for place in state if place.rpartition(":")[0] not in training.trained]
    if foreign or place.get("optimizer") != training.settings.optimizer.name:
        raise CheckpointError(f"{folder} was saved by another training: its optimizer does not fit")
    _set_random(place["random"], folder)
    for name, array in arrays.items():
        known[name].data = torch.from_numpy(array.copy()).to(known[name].device)
    optimizers.restore(training.optimizers, training.trained, state)
    training.step = place["step"]
    device = model.model.embed_tokens.weight.device
    training.seen = {n: (torch.tensor(u, device=device), torch.tensor(v, device=device)) for n, (u, v) in seen.items()}
    for name, layer in rank1_layers(model).items():
        layer.pending = name in place["pending"]


def _set_random(states: Mapping[str, bytes], folder: Path) -> None:
    setters: dict[str, Callable[[Tensor], None]] = {"cpu": torch.set_rng_state}
    if torch.cuda.is_available():
        setters["cuda"] = torch.cuda.set_rng_state
    if torch.backends.mps.is_available():
        setters["mps"] = torch.mps.set_rng_state
    try:
        for name in states.keys() & setters.keys() | {"cpu"}:
            setters[name](torch.from_numpy(np.frombuffer(states[name], np.uint8).copy()))
    except (KeyError, RuntimeError):
        raise CheckpointError(f"{folder} holds no random state of torch: take an earlier checkpoint") from None


def changing(model: Gemma3, training: Training) -> dict[str, Tensor]:
    """All tensors that steps and merges change, float32, by name."""
    found: dict[str, Tensor] = dict(training.trained)
    merged = {**(lora_layers(model) if training.settings.merging else {}), **rank1_layers(model)}
    for name, layer in merged.items():
        found |= {f"{name}.{leaf}": parameter for leaf, parameter in layer.named_parameters()}
        if (buffer := getattr(layer, "buffer", None)) is not None:
            found[f"{name}.buffer"] = buffer
    return found
