"""Stacks of small networks in torch: parameters ``[networks, ...]``. The file mirrors ``engines/mlx/networks.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.checkpoints import read_arrays, write_arrays
from engines.networks import LAYER_NORM_EPSILON, NetworkShape, NetworkTraining, check_state, first_weights
from engines.torch.model import rotate, rotations
from engines.torch.short_attention import SAFE_LOGIT, short_attention

LOG2E = 1 / math.log(2)
Parameters = Mapping[str, Tensor]


class TorchNetworks:
    """See ``engines.networks.Networks`` for what each method promises."""

    def __init__(
        self, shape: NetworkShape, seeds: Sequence[int], training: NetworkTraining, device: torch.device
    ) -> None:
        shape.check()
        self.shape, self.training, self.device = shape, training, device
        self.weights = {n: torch.from_numpy(a).to(device) for n, a in first_weights(shape, seeds).items()}
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.steps = torch.zeros(1)

    def step(self, tokens: np.ndarray, rates: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens).to(self.device, torch.long)
        losses, gradients = self._gradients(ids)
        self._adam(gradients, torch.from_numpy(rates).to(self.device, torch.float32))
        return losses.cpu().double().numpy()

    def _adam(self, gradients: Parameters, rates: Tensor) -> None:
        """One step of Adam, each network at its rate (Kingma & Ba, arXiv:1412.6980, algorithm 1)."""
        first_decay, second_decay = self.training.betas
        self.steps += 1
        count = int(self.steps)
        for name, gradient in gradients.items():
            first, second = self.first[name], self.second[name]
            first.lerp_(gradient, 1 - first_decay)
            second.lerp_(gradient.square_(), 1 - second_decay)
            spread = (second / (1 - second_decay**count)).sqrt_().add_(self.training.epsilon)
            stride = (rates / (1 - first_decay**count)).view(-1, *[1] * (first.ndim - 1))
            self.weights[name].sub_(first * stride / spread)

    def _gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean losses ``[networks]`` and their gradients, summed over parts of the batch."""
        networks, batch, length = ids.shape
        used = {name: self._computed(weight).requires_grad_() for name, weight in self.weights.items()}
        losses = torch.zeros(networks, device=self.device)
        for part in ids.split(self.shape.part(networks, batch), dim=1):
            labels = part[:, :, 1:].flatten(1)
            rows = self.shape.rows(networks, labels.shape[1])
            summed: Any = StackedCrossEntropy.apply(self._hidden(used, part), used[self.shape.embedding], labels, rows)
            loss = summed / (batch * (length - 1))
            loss.sum().backward()
            losses += loss.detach()
        return losses, {name: weight.grad for name, weight in used.items() if weight.grad is not None}

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens).to(self.device, torch.long)
        used = {name: self._computed(weight) for name, weight in self.weights.items()}
        found = []
        with torch.no_grad():
            for part in ids.split(self.shape.part(*ids.shape[:2]), dim=1):
                labels = part[:, :, 1:].flatten(1)
                rows = self.shape.rows(len(labels), labels.shape[1])
                each = position_losses(self._hidden(used, part), used[self.shape.embedding], labels, rows)
                found.append(each.double().unflatten(1, (part.shape[1], -1)).sum(2))
        return torch.cat(found, dim=1).cpu().numpy()

    def keep(self, chosen: Sequence[int]) -> None:
        index = torch.tensor(chosen, dtype=torch.long, device=self.device)
        self.weights, self.first, self.second = (
            {name: tensor[index] for name, tensor in part.items()} for part in (self.weights, self.first, self.second)
        )

    def parameters(self, network: int) -> dict[str, np.ndarray]:
        return {name: self._computed(weight)[network].cpu().numpy() for name, weight in self.weights.items()}

    def save_state(self, path: Path) -> None:
        write_arrays(path, {name: tensor.cpu().numpy() for name, tensor in self._state().items()})

    def load_state(self, path: Path) -> None:
        arrays, state = read_arrays(path), self._state()
        check_state(path, arrays, {name: tuple(tensor.shape) for name, tensor in state.items()})
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(arrays[name]))

    def _state(self) -> dict[str, Tensor]:
        parts = {"weights": self.weights, "first": self.first, "second": self.second}
        named = {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
        return {"steps": self.steps, **named}

    def _computed(self, weight: Tensor) -> Tensor:
        """A copy of a weight as the networks compute with it."""
        return weight.to(torch.bfloat16).float() if self.training.dtype == "bfloat16" else weight.clone()

    def _hidden(self, parameters: Parameters, ids: Tensor) -> Tensor:
        """Final hidden states ``[networks, batch * (length - 1), width]`` of all tokens but the last."""
        body = gpt2 if self.shape.arch == "gpt2" else gemma3
        return body(parameters, ids[:, :, :-1], self.shape)


def gpt2(parameters: Parameters, tokens: Tensor, shape: NetworkShape) -> Tensor:
    """GPT-2 (Radford et al., 2019) for ``[networks, batch, length]``: ``[networks, batch * length, width]``.

    The gain and bias of a layer norm go into the linear after it, which saves two passes over the activations.
    """
    networks, batch, length = tokens.shape
    x = embedded(parameters["wte.weight"], tokens).unflatten(1, (batch, length))
    x = (x + parameters["wpe.weight"][:, None, :length]).flatten(1, 2)
    for i in range(shape.layers):
        block = f"h.{i}."
        y = _after_norm(parameters, x, block + "ln_1", block + "attn.c_attn")
        q, k, v = y.view(networks * batch, length, 3, shape.heads, -1).permute(2, 0, 3, 1, 4)
        y = short_attention(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).reshape(x.shape)
        x = x + _linear(parameters, y, block + "attn.c_proj")
        y = F.gelu(_after_norm(parameters, x, block + "ln_2", block + "mlp.c_fc"), approximate="tanh")
        x = x + _linear(parameters, y, block + "mlp.c_proj")
    gain, bias = parameters["ln_f.weight"], parameters["ln_f.bias"]
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON) * gain[:, None] + bias[:, None]


def gemma3(parameters: Parameters, tokens: Tensor, shape: NetworkShape) -> Tensor:
    """Gemma-3 as ``engines/torch/model.py`` has it, for ``[networks, batch, length]``; see ``gpt2``."""
    networks, batch, length = tokens.shape
    config = shape.config
    rotation = rotations(torch.arange(length, device=tokens.device), config.rope_global, config.head_dim)
    x = embedded(parameters["model.embed_tokens.weight"], tokens) * config.hidden_size**0.5

    def normed(y: Tensor, name: str) -> Tensor:
        gain = 1.0 + parameters[name + ".weight"]
        return F.rms_norm(y, y.shape[-1:], eps=config.rms_norm_eps) * gain.view(networks, *[1] * (y.ndim - 2), -1)

    def linear(y: Tensor, name: str) -> Tensor:
        return torch.bmm(y, parameters[name + ".weight"].transpose(1, 2))

    def heads(y: Tensor) -> Tensor:
        return y.view(networks, batch, length, shape.heads, -1)

    def meeting(y: Tensor) -> Tensor:
        return y.flatten(0, 1).transpose(1, 2)

    for i in range(shape.layers):
        block = f"model.layers.{i}."
        y = normed(x, block + "input_layernorm")
        q, k, v = (heads(linear(y, f"{block}self_attn.{name}_proj")) for name in "qkv")
        q = rotate(meeting(normed(q, block + "self_attn.q_norm")), rotation)
        k = rotate(meeting(normed(k, block + "self_attn.k_norm")), rotation)
        y = short_attention(q, k, meeting(v), config.query_pre_attn_scalar**-0.5)
        y = linear(y.transpose(1, 2).reshape(x.shape), block + "self_attn.o_proj")
        x = x + normed(y, block + "post_attention_layernorm")
        y = normed(x, block + "pre_feedforward_layernorm")
        gate = F.gelu(linear(y, block + "mlp.gate_proj"), approximate="tanh")
        y = linear(gate * linear(y, block + "mlp.up_proj"), block + "mlp.down_proj")
        x = x + normed(y, block + "post_feedforward_layernorm")
    return normed(x, "model.norm")


def embedded(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of ``[networks, vocabulary, d]`` for ``[networks, batch, length]``: ``[networks, batch * length, d]``."""
    return F.embedding(_places(table, tokens.flatten(1)), table.flatten(0, 1)).view(len(table), -1, table.shape[2])


def _places(table: Tensor, tokens: Tensor) -> Tensor:
    """Where the rows of ``[networks, n]`` tokens are when the tables of all networks lie behind one another."""
    first = table.shape[1] * torch.arange(len(table), device=table.device)
    return (tokens + first[:, None]).flatten()


def _linear(parameters: Parameters, x: Tensor, name: str) -> Tensor:
    return torch.baddbmm(parameters[name + ".bias"][:, None], x, parameters[name + ".weight"])


def _after_norm(parameters: Parameters, x: Tensor, norm: str, name: str) -> Tensor:
    """A linear after a layer norm: ``(n g + b) W + c = n (g W) + (b W + c)``."""
    gain, shift = parameters[norm + ".weight"], parameters[norm + ".bias"][:, None]
    weight, bias = parameters[name + ".weight"], parameters[name + ".bias"][:, None]
    normal = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON)
    return torch.baddbmm(torch.baddbmm(bias, shift, weight), normal, gain[:, :, None] * weight)


class StackedCrossEntropy(torch.autograd.Function):
    """Summed negative log-likelihood of tied heads, a few positions of every network at a time.

    With p = softmax(h Wᵀ) the gradients are (p - onehot) W and (p - onehot)ᵀ h. Both are made with the logits while
    these are in the cache, from their exponentials and the sum of those: no pass over the logits divides or subtracts.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, rows: int) -> Tensor:
        """``hidden [networks, n, d]``, ``head [networks, vocabulary, d]``, ``labels [networks, n]``: ``[networks]``."""
        mean_rows = torch.empty_like(hidden)
        head_gradient = head.new_zeros((len(head), head.shape[2], head.shape[1]))
        partition = hidden.new_empty(labels.shape)
        for part, scores, top in exponentials(hidden, head, rows):
            mass = scores.sum(2, keepdim=True)
            partition[:, part] = (mass.log() + top).squeeze(2)
            torch.div(torch.bmm(scores, head), mass, out=mean_rows[:, part])
            head_gradient.baddbmm_((hidden[:, part] / mass).transpose(1, 2), scores)
        places = _places(head, labels)
        targets = head.flatten(0, 1)[places].view_as(hidden)
        head_gradient = head_gradient.transpose(1, 2).contiguous()
        head_gradient.view(-1, head.shape[2]).index_add_(0, places, hidden.flatten(0, 1), alpha=-1)
        ctx.save_for_backward(mean_rows.sub_(targets), head_gradient)
        return (partition - (hidden * targets).sum(2)).sum(1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale the gradients made on the way forward."""
        scale = outputs[0][:, None, None]
        mean_rows, head_gradient = ctx.saved_tensors
        return mean_rows * scale, head_gradient * scale, None, None


def position_losses(hidden: Tensor, head: Tensor, labels: Tensor, rows: int) -> Tensor:
    """Negative log-likelihood of every label, float32 ``[networks, n]``, nats; see ``StackedCrossEntropy``."""
    partition = torch.cat([(mass.sum(2, keepdim=True).log() + top).squeeze(2)
                           for _, mass, top in exponentials(hidden, head, rows)], dim=1)  # fmt: skip
    return partition - (hidden * head.flatten(0, 1)[_places(head, labels)].view_as(hidden)).sum(2)


def exponentials(hidden: Tensor, head: Tensor, rows: int) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """For some positions after the other ``exp(logits - top)`` ``[networks, rows, vocabulary]``, and ``top``.

    The next ones are written over the last: memory that is in the cache already is a tenth faster than new memory.
    Where no logit can reach ``SAFE_LOGIT``, by Cauchy and Schwarz, ``top`` is 0 and no pass looks for the largest.
    """
    transposed, turned = head.transpose(1, 2), hidden * LOG2E  # 2 ** x is made two times as fast as e ** x
    safe = float(hidden.norm(dim=2).amax() * head.norm(dim=2).amax()) < SAFE_LOGIT
    room = hidden.new_empty((len(hidden), rows, head.shape[1]))
    for start in range(0, hidden.shape[1], rows):
        part = slice(start, min(start + rows, hidden.shape[1]))
        scores = room[:, : part.stop - start]
        torch.bmm(turned[:, part], transposed, out=scores)
        top: Tensor | float = 0.0
        if not safe:
            peak = scores.amax(2, keepdim=True)
            scores.sub_(peak)
            top = peak / LOG2E
        yield part, scores.exp2_(), top
