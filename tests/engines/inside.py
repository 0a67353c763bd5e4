"""What tests read from inside the engines, since the contract does not give it: caches and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from engines.base import Engine
from engines.training import Batch


def module(engine: Engine, name: str) -> ModuleType:
    """One of the engine's modules; both engines name them and what is in them alike."""
    return importlib.import_module(f"engines.{engine.name}.{name}")


def call(engine: Engine) -> str:
    """The method that runs a layer."""
    return "forward" if engine.name == "torch" else "__call__"


def model(engine: Engine) -> Any:
    return engine._loaded()


def cached_logits(engine: Engine, tokens: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Logits of ``tokens [1, length]`` given to the cache part by part, ``parts`` tokens at a time."""
    cache, found, start = model(engine).make_cache(), [], 0
    for count in parts:
        found.append(_logits(engine, tokens[:, start : start + count], cache))
        start += count
    assert start == tokens.shape[1]
    return np.concatenate(found, axis=1)


def _logits(engine: Engine, tokens: np.ndarray, cache: Any) -> np.ndarray:
    network = model(engine)
    if engine.name == "torch":
        import torch

        with torch.inference_mode():
            return network.logits(network(torch.from_numpy(tokens).long(), cache)).float().numpy()
    import mlx.core as mx

    return np.array(network.logits(network(mx.array(tokens), cache)).astype(mx.float32))


def gradients(engine: Engine, batch: Batch) -> dict[str, np.ndarray]:
    """The gradient of the summed loss for every trained parameter."""
    network, training = model(engine), module(engine, "training")
    network.train()
    if engine.name == "torch":
        training.summed_loss(network, batch).backward()
        found = {name: p.grad.numpy() for name, p in network.named_parameters() if p.requires_grad}
        network.zero_grad(set_to_none=True)
        return found
    from mlx import nn
    from mlx.utils import tree_flatten

    _, tree = nn.value_and_grad(network, lambda: training.summed_loss(network, batch))()
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def weights(engine: Engine) -> dict[str, np.ndarray]:
    """Copies of all parameters, float32, by name."""
    if engine.name == "torch":
        return {name: p.detach().float().numpy().copy() for name, p in model(engine).named_parameters()}
    import mlx.core as mx
    from mlx.utils import tree_flatten

    return {name: np.array(p.astype(mx.float32)) for name, p in tree_flatten(model(engine).parameters())}


def set_clip(engine: Engine, clip: float) -> None:
    """Bound the gradient's norm otherwise from the next step on."""
    training = engine._training
    training.settings = replace(training.settings, clip=clip)


def zeros(engine: Engine, shape: tuple[int, ...]) -> Any:
    """A float32 tensor of the engine's framework."""
    if engine.name == "torch":
        import torch

        return torch.zeros(shape)
    import mlx.core as mx

    return mx.zeros(shape)


def chunked_loss(
    engine: Engine, hidden: np.ndarray, weight: np.ndarray, labels: np.ndarray, scale: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """``scale`` times the engine's loss of a linear head, and its gradients for ``hidden`` and ``weight``."""
    training = module(engine, "training")
    if engine.name == "torch":
        import torch

        h, w = (torch.from_numpy(value).requires_grad_() for value in (hidden, weight))
        loss = scale * training.ChunkedCrossEntropy.apply(h, w, torch.from_numpy(labels))
        loss.backward()
        return loss.item(), h.grad.numpy(), w.grad.numpy()
    import mlx.core as mx

    def scaled(h: Any, w: Any) -> Any:
        return scale * training.chunked_cross_entropy(h, w, mx.array(labels), True)

    loss, (grad_h, grad_w) = mx.value_and_grad(scaled, argnums=(0, 1))(mx.array(hidden), mx.array(weight))
    return float(loss), np.array(grad_h), np.array(grad_w)


def masked_layer(engine: Engine, layer: Any, x: np.ndarray, mask: np.ndarray, monkeypatch: Any) -> np.ndarray:
    """What an adapted linear gives in training where dropout multiplies by ``mask [in]``."""
    if engine.name == "torch":
        import torch

        monkeypatch.setattr(module(engine, "adapters").F, "dropout", lambda x, *terms: x * torch.from_numpy(mask))
        return layer(torch.from_numpy(x)).detach().numpy()
    import mlx.core as mx

    layer.dropout = lambda x: x * mx.array(mask)
    return np.array(layer(mx.array(x)))


def bfloat16_layer(engine: Engine, layer: Any, x: np.ndarray) -> np.ndarray:
    """What a linear gives for inputs in bfloat16."""
    if engine.name == "torch":
        import torch

        return layer(torch.from_numpy(x).bfloat16()).detach().float().numpy()
    import mlx.core as mx

    return np.array(layer(mx.array(x).astype(mx.bfloat16)).astype(mx.float32))
