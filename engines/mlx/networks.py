"""Stacks of small networks in MLX: parameters ``[networks, ...]``. The file mirrors ``engines/torch/networks.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engines.checkpoints import read_arrays, write_arrays
from engines.mlx.attention import CAUSAL, attention
from engines.mlx.device import number
from engines.mlx.model import rotate, rotations
from engines.networks import LAYER_NORM_EPSILON, NetworkShape, NetworkTraining, check_state, first_weights

Parameters = dict[str, mx.array]
PARTS = ("weights", "first", "second")


class MLXNetworks:
    """See ``engines.networks.Networks`` for what each method promises."""

    def __init__(self, shape: NetworkShape, seeds: Sequence[int], training: NetworkTraining) -> None:
        shape.check()
        self.shape, self.training = shape, training
        self.weights = {name: mx.array(array) for name, array in first_weights(shape, seeds).items()}
        self.first = {name: mx.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = {name: mx.zeros_like(weight) for name, weight in self.weights.items()}
        self.steps = mx.zeros((1,))

    def step(self, tokens: np.ndarray, rates: np.ndarray) -> np.ndarray:
        losses, gradients = self._gradients(mx.array(tokens))
        self._adam(gradients, mx.array(rates.astype(np.float32)))
        mx.eval(self._state())
        return np.array(losses).astype(np.float64)

    def _adam(self, gradients: Parameters, rates: mx.array) -> None:
        """One step of Adam, each network at its rate (Kingma & Ba, arXiv:1412.6980, algorithm 1)."""
        first_decay, second_decay = self.training.betas
        self.steps = self.steps + 1
        count = round(number(self.steps))
        for name, gradient in gradients.items():
            first = first_decay * self.first[name] + (1 - first_decay) * gradient
            second = second_decay * self.second[name] + (1 - second_decay) * gradient.square()
            spread = mx.sqrt(second / (1 - second_decay**count)) + self.training.epsilon
            stride = (rates / (1 - first_decay**count)).reshape(-1, *[1] * (first.ndim - 1))
            self.first[name], self.second[name] = first, second
            self.weights[name] = self.weights[name] - first * stride / spread

    def _gradients(self, ids: mx.array) -> tuple[mx.array, Parameters]:
        """Mean losses ``[networks]`` and their gradients, summed over parts of the batch."""
        networks, batch, length = ids.shape
        used = {name: self._computed(weight) for name, weight in self.weights.items()}
        losses, gradients = mx.zeros((networks,)), {name: mx.zeros_like(weight) for name, weight in used.items()}

        def summed(parameters: Parameters, part: mx.array) -> tuple[mx.array, mx.array]:
            loss = self._summed(parameters, part) / (batch * (length - 1))
            return loss.sum(), loss

        differentiated = mx.value_and_grad(summed)
        for part in _parts(ids, self.shape.part(networks, batch)):
            (_, loss), found = differentiated(used, part)
            losses = losses + loss
            gradients = {name: gradient + found[name] for name, gradient in gradients.items()}
            mx.eval(losses, gradients)
        return losses, gradients

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        ids = mx.array(tokens)
        used, found = {name: self._computed(weight) for name, weight in self.weights.items()}, []
        for part in _parts(ids, self.shape.part(*ids.shape[:2])):
            hidden, labels = self._hidden(used, part), part[:, :, 1:].flatten(1)
            each = position_losses(hidden, used[self.shape.embedding], labels, self._rows(labels))
            found.append(np.array(each).astype(np.float64).reshape(*part.shape[:2], -1).sum(2))
        return np.concatenate(found, axis=1)

    def keep(self, chosen: Sequence[int]) -> None:
        index = mx.array(np.array(chosen, np.int32))
        self.weights, self.first, self.second = (
            {name: array[index] for name, array in part.items()} for part in (self.weights, self.first, self.second)
        )

    def parameters(self, network: int) -> dict[str, np.ndarray]:
        return {name: np.array(self._computed(weight)[network]) for name, weight in self.weights.items()}

    def save_state(self, path: Path) -> None:
        write_arrays(path, {name: np.array(array) for name, array in self._state().items()})

    def load_state(self, path: Path) -> None:
        arrays = read_arrays(path)
        check_state(path, arrays, {name: tuple(array.shape) for name, array in self._state().items()})
        self.steps = mx.array(arrays["steps"])
        self.weights, self.first, self.second = (
            {name: mx.array(arrays[f"{part}.{name}"]) for name in self.weights} for part in PARTS
        )

    def _state(self) -> Parameters:
        held = zip(PARTS, (self.weights, self.first, self.second), strict=True)
        return {"steps": self.steps, **{f"{part}.{name}": array for part, each in held for name, array in each.items()}}

    def _computed(self, weight: mx.array) -> mx.array:
        """A weight as the networks compute with it."""
        return weight.astype(mx.bfloat16).astype(mx.float32) if self.training.dtype == "bfloat16" else weight

    def _rows(self, labels: mx.array) -> int:
        return self.shape.rows(*labels.shape)

    def _hidden(self, parameters: Parameters, ids: mx.array) -> mx.array:
        """Final hidden states ``[networks, batch * (length - 1), width]`` of all tokens but the last."""
        body = gpt2 if self.shape.arch == "gpt2" else gemma3
        return body(parameters, ids[:, :, :-1], self.shape)

    def _summed(self, parameters: Parameters, ids: mx.array) -> mx.array:
        """Negative log-likelihood of the predicted tokens of ``[networks, batch, length]``: ``[networks]``, nats."""
        hidden, labels = self._hidden(parameters, ids), ids[:, :, 1:].flatten(1)
        return stacked_cross_entropy(hidden, parameters[self.shape.embedding], labels, self._rows(labels))


def gpt2(parameters: Parameters, tokens: mx.array, shape: NetworkShape) -> mx.array:
    """GPT-2 (Radford et al., 2019) for ``[networks, batch, length]``: ``[networks, batch * length, width]``.

    The gain and bias of a layer norm go into the linear after it, which saves two passes over the activations.
    """
    networks, batch, length = tokens.shape
    x = embedded(parameters["wte.weight"], tokens).reshape(networks, batch, length, -1)
    x = (x + parameters["wpe.weight"][:, None, :length]).flatten(1, 2)
    for i in range(shape.layers):
        block = f"h.{i}."
        y = _after_norm(parameters, x, block + "ln_1", block + "attn.c_attn")
        q, k, v = y.reshape(networks * batch, length, 3, shape.heads, -1).transpose(2, 0, 3, 1, 4)
        y = attention(q, k, v, q.shape[-1] ** -0.5, CAUSAL).swapaxes(1, 2).reshape(x.shape)
        x = x + _linear(parameters, y, block + "attn.c_proj")
        y = nn.gelu_approx(_after_norm(parameters, x, block + "ln_2", block + "mlp.c_fc"))
        x = x + _linear(parameters, y, block + "mlp.c_proj")
    gain, bias = parameters["ln_f.weight"], parameters["ln_f.bias"]
    return mx.fast.layer_norm(x, None, None, LAYER_NORM_EPSILON) * gain[:, None] + bias[:, None]


def gemma3(parameters: Parameters, tokens: mx.array, shape: NetworkShape) -> mx.array:
    """Gemma-3 as ``engines/mlx/model.py`` has it, for ``[networks, batch, length]``; see ``gpt2``."""
    networks, batch, length = tokens.shape
    config = shape.config
    rotation = rotations(mx.arange(length), config.rope_global, config.head_dim)
    x = embedded(parameters["model.embed_tokens.weight"], tokens) * config.hidden_size**0.5

    def normed(y: mx.array, name: str) -> mx.array:
        gain = 1.0 + parameters[name + ".weight"]
        return mx.fast.rms_norm(y, None, config.rms_norm_eps) * gain.reshape(networks, *[1] * (y.ndim - 2), -1)

    def linear(y: mx.array, name: str) -> mx.array:
        return y @ parameters[name + ".weight"].swapaxes(1, 2)

    def heads(y: mx.array) -> mx.array:
        return y.reshape(networks, batch, length, shape.heads, -1)

    def meeting(y: mx.array) -> mx.array:
        return y.flatten(0, 1).swapaxes(1, 2)

    for i in range(shape.layers):
        block = f"model.layers.{i}."
        y = normed(x, block + "input_layernorm")
        q, k, v = (heads(linear(y, f"{block}self_attn.{name}_proj")) for name in "qkv")
        q = rotate(meeting(normed(q, block + "self_attn.q_norm")), rotation)
        k = rotate(meeting(normed(k, block + "self_attn.k_norm")), rotation)
        y = attention(q, k, meeting(v), config.query_pre_attn_scalar**-0.5, CAUSAL)
        y = linear(y.swapaxes(1, 2).reshape(x.shape), block + "self_attn.o_proj")
        x = x + normed(y, block + "post_attention_layernorm")
        y = normed(x, block + "pre_feedforward_layernorm")
        gate = nn.gelu_approx(linear(y, block + "mlp.gate_proj"))
        y = linear(gate * linear(y, block + "mlp.up_proj"), block + "mlp.down_proj")
        x = x + normed(y, block + "post_feedforward_layernorm")
    return normed(x, "model.norm")


def embedded(table: mx.array, tokens: mx.array) -> mx.array:
    """Rows of ``[networks, vocabulary, d]`` for ``[networks, batch, length]``: ``[networks, batch * length, d]``."""
    return table.flatten(0, 1)[_places(table, tokens.flatten(1))].reshape(len(table), -1, table.shape[2])


def _places(table: mx.array, tokens: mx.array) -> mx.array:
    """Where the rows of ``[networks, n]`` tokens are when the tables of all networks lie behind one another."""
    first = table.shape[1] * mx.arange(len(table))
    return (tokens + first[:, None]).flatten()


def _linear(parameters: Parameters, x: mx.array, name: str) -> mx.array:
    return x @ parameters[name + ".weight"] + parameters[name + ".bias"][:, None]


def _after_norm(parameters: Parameters, x: mx.array, norm: str, name: str) -> mx.array:
    """A linear after a layer norm: ``(n g + b) W + c = n (g W) + (b W + c)``."""
    gain, shift = parameters[norm + ".weight"], parameters[norm + ".bias"][:, None]
    weight, bias = parameters[name + ".weight"], parameters[name + ".bias"][:, None]
    normal = mx.fast.layer_norm(x, None, None, LAYER_NORM_EPSILON)
    return normal @ (gain[:, :, None] * weight) + (shift @ weight + bias)


def stacked_cross_entropy(hidden: mx.array, head: mx.array, labels: mx.array, rows: int) -> mx.array:
    """Summed negative log-likelihood of tied heads, a few positions of every network at a time.

    With p = softmax(h Wᵀ) the gradients are (p - onehot) W and (p - onehot)ᵀ h. Both are made with the logits while
    these are in the cache, from their exponentials and the sum of those: no pass over the logits divides or subtracts.

    Args:
        hidden: ``[networks, n, d]``.
        head: ``[networks, vocabulary, d]``.
        labels: ``[networks, n]``.

    Returns:
        float32 ``[networks]``, nats.
    """

    @mx.custom_function
    def loss_and_gradients(hidden: mx.array, head: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        mean_rows, partition = [], []
        head_gradient = mx.zeros(head.shape)
        for part, scores, top in exponentials(hidden, head, rows):
            mass = scores.sum(axis=2, keepdims=True)
            partition.append((mx.log(mass) + top).squeeze(2))
            mean_rows.append((scores @ head) / mass)
            head_gradient = head_gradient + scores.swapaxes(1, 2) @ (hidden[:, part] / mass)
        places = _places(head, labels)
        targets = head.flatten(0, 1)[places].reshape(hidden.shape)
        head_gradient = head_gradient.flatten(0, 1).at[places].add(-hidden.flatten(0, 1)).reshape(head.shape)
        losses = mx.concatenate(partition, axis=1) - (hidden * targets).sum(axis=2)
        return losses.sum(axis=1), mx.concatenate(mean_rows, axis=1) - targets, head_gradient

    @loss_and_gradients.vjp
    def scaled(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
        """Scale the gradients made on the way forward."""
        scale = cotangents[0][:, None, None]
        return scale * outputs[1], scale * outputs[2]

    outputs: Any = loss_and_gradients(hidden, head)
    return outputs[0]


def position_losses(hidden: mx.array, head: mx.array, labels: mx.array, rows: int) -> mx.array:
    """Negative log-likelihood of every label, float32 ``[networks, n]``, nats; see ``stacked_cross_entropy``."""
    found = [(mx.log(mass.sum(axis=2, keepdims=True)) + top).squeeze(2)
             for _, mass, top in exponentials(hidden, head, rows)]  # fmt: skip
    targets = head.flatten(0, 1)[_places(head, labels)].reshape(hidden.shape)
    return mx.concatenate(found, axis=1) - (hidden * targets).sum(axis=2)


def exponentials(hidden: mx.array, head: mx.array, rows: int) -> Iterator[tuple[slice, mx.array, mx.array]]:
    """For some positions after the other ``exp(logits - top)`` ``[networks, rows, vocabulary]``, and ``top``."""
    transposed = head.swapaxes(1, 2)
    for start in range(0, hidden.shape[1], rows):
        part = slice(start, start + rows)
        scores = hidden[:, part] @ transposed
        top = scores.max(axis=2, keepdims=True)
        yield part, mx.exp(scores - top), top


def _parts(ids: mx.array, size: int) -> Iterator[mx.array]:
    """Some sequences of every network after the others."""
    for start in range(0, ids.shape[1], size):
        yield ids[:, start : start + size]
