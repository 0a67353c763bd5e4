"""One text's way through the model, in torch. The file mirrors ``engines/mlx/inspection.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engines.edits import (
    Ablation,
    Edit,
    Knockout,
    Patch,
    Span,
    check_edits,
    check_heads,
    check_layer,
    check_span,
    first_edited,
)
from engines.errors import UnsupportedError
from engines.inspection import (
    Attribution,
    Circuit,
    Effect,
    Inspection,
    LayerStatistics,
    LensRows,
    ResidualFacts,
    check_base,
    check_circuit,
    check_ids,
    check_mass,
    check_tokens,
    first_key,
    no_tick,
    spans,
)
from engines.torch import circuits, tiles
from engines.torch.attention import attention
from engines.torch.model import Block, Gemma3, RMSNorm, rotations

ROWS = 64
"""Positions whose logits are there at a time."""

STRIP = 4
"""Positions that pass after pass goes over, few enough to stay in a processor's cache."""


class TorchInspection:
    """See ``engines.inspection.Inspection``, which tells what each method promises."""

    def __init__(
        self, model: Gemma3, tokens: np.ndarray, edits: Sequence[Edit], base: Inspection | None, device: torch.device
    ) -> None:
        self.config, self.tokens, self.edits = model.config, tokens, tuple(edits)
        check_tokens(self.config, tokens)
        check_edits(self.config, len(tokens), edits)
        self._shared = _base(base, model, tokens)
        self.tick: Callable[[], object] = self._shared.tick if self._shared else no_tick
        self._first = first_edited(self.config, edits)
        self._model = model.eval()
        self._ids = torch.from_numpy(tokens).to(device, torch.long)
        places = torch.arange(len(tokens), device=device)
        ropes = {self.config.rope_local, self.config.rope_global}
        self._rotations = {rope: rotations(places, rope, self.config.head_dim) for rope in ropes}
        with torch.no_grad():
            x = self._shared._stream(0) if self._shared else model.model.embed_tokens(self._ids, model.dtype)
        self._streams = [self._patched(x, 0)]
        self._made: tuple[int, tiles.Layer] | None = None
        self._known: tuple[Span, Tensor] | None = None

    def advance(self, layers: int) -> None:
        if layers != self.config.num_hidden_layers:
            check_layer(self.config, layers)
        while len(self._streams) <= layers:
            self._streams.append(self._next(len(self._streams) - 1))

    def statistics(self, layer: int) -> LayerStatistics:
        check_layer(self.config, layer)
        with torch.no_grad():
            return tiles.statistics(self._layer(layer), self._ids, self.config.sliding_window)

    def attention(self, layer: int, head: int, queries: Span) -> np.ndarray:
        check_heads(self.config, layer, (head,))
        check_span(queries, len(self.tokens))
        with torch.no_grad():
            return tiles.rows(self._layer(layer), head, queries)

    def queries_keys(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        check_layer(self.config, layer)
        made = self._layer(layer)
        return made.q.cpu().numpy(), made.k.cpu().numpy()

    def divergence(self, layer: int, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        check_layer(self.config, layer)
        made = self._layer(layer)
        if queries.shape != made.q.shape or keys.shape != made.k.shape:
            raise UnsupportedError(f"queries {queries.shape} are of another text or model, not {tuple(made.q.shape)}")
        q, k = (torch.from_numpy(array).to(self._ids.device) for array in (queries, keys))
        with torch.no_grad():
            return tiles.divergence(made, tiles.Layer(q, k, made.v, made.scale, made.window))

    def residual(self, layer: int) -> ResidualFacts:
        h = self._stream(layer).float()
        size = h.abs()
        values, places = size.flatten().topk(min(3, size.numel()))
        where = [divmod(place, h.shape[1]) for place in places.tolist()]
        largest = tuple((value, *at) for value, at in zip(values.tolist(), where, strict=True))
        return ResidualFacts(h.square().mean(-1).sqrt().cpu().numpy(), float(size.median()), largest)

    def stream(self, layer: int, positions: Span) -> np.ndarray:
        check_span(positions, len(self.tokens))
        return self._stream(layer)[slice(*positions)].float().cpu().numpy()

    def head_outputs(self, layer: int, heads: Sequence[int], positions: Span) -> np.ndarray:
        check_heads(self.config, layer, heads)
        check_span(positions, len(self.tokens))
        with torch.no_grad():
            z = self._outputs(layer)
        return z[0, list(heads), slice(*positions)].float().cpu().numpy()

    def lens(self, positions: Span, targets: np.ndarray) -> Iterator[LensRows]:
        check_span(positions, len(self.tokens))
        wanted = torch.from_numpy(targets).to(self._ids.device, torch.long)
        last, blocks = self.config.num_hidden_layers, list(spans(positions, ROWS))
        final = [_log_probs(self._logits(span, last)) for span in blocks]
        for layer in range(last + 1):
            found = (self._logits(span, layer) for span in blocks)
            parts = map(_lens, found, final, wanted.split(ROWS))
            yield LensRows(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))

    def attribution(self, position: int, token: int, contrast: int | None = None) -> Attribution:
        check_span((position, position + 1), len(self.tokens))
        if self.edits:
            raise UnsupportedError("attribution splits what the model itself computes: take the edits away")
        decoder, last = self._model.model, self.config.num_hidden_layers
        with torch.no_grad():
            table = decoder.embed_tokens.weight
            row = table[token].float() - (table[contrast].float() if contrast is not None else 0)
            logits = self._model.logits(decoder.norm(self._stream(last)[position])).float()
            logit = logits[token] - (logits[contrast] if contrast is not None else 0)
            toward = _through(decoder.norm, self._stream(last)[position], row)
            layers = [self._layer_parts(layer, position, toward) for layer in range(last)]
            embedding = float(toward @ self._stream(0)[position].float())
        sources = torch.stack([heads for heads, _ in layers]).cpu().numpy()
        return Attribution(sources, np.array([mlp for _, mlp in layers], np.float32), embedding, float(logit))

    def carried(self, layer: int, rows: np.ndarray) -> np.ndarray:
        check_layer(self.config, layer)
        check_mass(rows, len(self.tokens))
        with torch.no_grad():
            return tiles.carried(self._layer(layer), torch.from_numpy(rows).to(self._ids.device)).cpu().numpy()

    def circuit(self, layer: int, tokens: np.ndarray, position: int, count: int) -> Circuit:
        check_layer(self.config, layer)
        check_span((position, position + 1), len(self.tokens))
        check_circuit(self.config, tokens, count, self.edits)
        block, norm = self._block(layer), self._model.model.norm
        with torch.no_grad():
            end = self._stream(self.config.num_hidden_layers)[position]
            toward = _through(norm, end, torch.ones_like(end, dtype=torch.float32))
            scale = _through(block.post_attention_layernorm, self._row(layer, position)[2], toward)
            ids = torch.from_numpy(tokens).to(self._ids.device, torch.long)
            return circuits.circuit(self._model, layer, ids, scale, count, self.tick)

    def token_scores(self, layer: int, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        check_layer(self.config, layer)
        check_ids(self.config, queries, keys)
        ids = (torch.from_numpy(tokens).to(self._ids.device, torch.long) for tokens in (queries, keys))
        with torch.no_grad():
            return circuits.scores(self._model, layer, *ids).cpu().numpy()

    def effect(self, base: Inspection, positions: Span, targets: np.ndarray) -> Effect:
        if not isinstance(base, TorchInspection):
            raise UnsupportedError("the other text is on another engine: inspect both on one")
        check_span(positions, min(len(self.tokens), len(base.tokens)))
        parts = []
        wanted = torch.from_numpy(targets).to(self._ids.device, torch.long)
        for span, some in zip(spans(positions, ROWS), wanted.split(ROWS), strict=True):
            parts.append(_effect(base._kept_logits(span), self._kept_logits(span), some[:, None]))
        return Effect(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))

    def _block(self, index: int) -> Block:
        return cast("Block", self._model.model.layers[index])

    def _stream(self, layer: int) -> Tensor:
        """The residual stream before a layer, ``[T, hidden]``."""
        self.advance(layer)
        return self._streams[layer]

    def _next(self, index: int) -> Tensor:
        """The residual stream after a layer."""
        if self._shared is not None and index < self._first:
            return self._patched(self._shared._stream(index + 1), index + 1)
        layer, x = self._block(index), self._stream(index)
        with torch.no_grad():
            y = layer.self_attn.join(self._outputs(index))[0]
            x = x + layer.post_attention_layernorm(y)
            x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
            return self._patched(x, index + 1)

    def _outputs(self, index: int) -> Tensor:
        """What the heads of a layer give, ``[1, heads, T, head_dim]``, edited."""
        layer, parts = self._layer(index), []
        q, k, v = (part[None].to(self._model.dtype) for part in (layer.q, layer.k, layer.v))
        for start, stop in spans((0, len(self.tokens))):
            self.tick()
            keys = slice(first_key(start, layer.window), stop)
            mask = tiles.allowed(layer, start, stop, range(q.shape[1]))
            parts.append(attention(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], layer.scale, mask))
        z = torch.cat(parts, 2)
        for edit in self.edits:
            if isinstance(edit, Ablation) and edit.layer == index:
                heads = list(edit.heads)
                z[:, heads] = 0 if edit.how == "zero" else z[:, heads].float().mean(2, keepdim=True).to(z.dtype)
            elif isinstance(edit, Patch) and edit.layer == index and edit.heads is not None:
                z[0, list(edit.heads), slice(*edit.positions)] = torch.from_numpy(edit.values).to(z)
        return z

    def _patched(self, x: Tensor, layer: int) -> Tensor:
        """A residual stream with what other runs put into it."""
        for edit in self.edits:
            if isinstance(edit, Patch) and edit.layer == layer and edit.heads is None:
                x = x.clone()  # it may be another inspection's too
                x[slice(*edit.positions)] = torch.from_numpy(edit.values).to(x)
        return x

    def _layer(self, index: int) -> tiles.Layer:
        """Queries, keys and values of a layer in float32; those asked for last are kept."""
        if self._made is None or self._made[0] != index:
            layer, x = self._block(index), self._stream(index)
            with torch.no_grad():
                rotation = self._rotations[self.config.rope(index)]
                q, k, v = layer.self_attn.project(layer.input_layernorm(x)[None], rotation)
            cuts = [edit for edit in self.edits if isinstance(edit, Knockout) and edit.layer == index]
            scale, window = layer.self_attn.scale, self.config.window(index)
            self._made = (
                index,
                tiles.Layer(q[0].float(), k[0].float(), v[0].float(), scale, window, cuts, lambda: self.tick()),
            )
        return self._made[1]

    def _logits(self, positions: Span, layer: int) -> Tensor:
        """Float32 ``[positions, vocabulary]``, through the lens before a layer."""
        h = self._stream(layer)[slice(*positions)]
        with torch.no_grad():
            return self._model.logits(self._model.model.norm(h)).float()

    def _kept_logits(self, positions: Span) -> Tensor:
        """The model's own, at no more than ``ROWS`` positions; those asked for last are kept."""
        if self._known is None or self._known[0] != positions:
            self._known = None
            self._known = positions, self._logits(positions, self.config.num_hidden_layers)
        return self._known[1]

    def _row(self, index: int, position: int) -> tuple[tiles.Tile, Tensor, Tensor]:
        """The attention of one query: weights, values ``[heads, keys, head_dim]``, what ``o_proj`` makes of them."""
        layer, made = self._block(index), self._layer(index)
        weights = next(tiles.tiles(made, (position, position + 1)))
        values = made.v[:, weights.first : position + 1].repeat_interleave(made.q.shape[0] // made.k.shape[0], 0)
        return weights, values, layer.self_attn.join((weights.weights @ values)[None].to(self._model.dtype))[0, 0]

    def _layer_parts(self, index: int, position: int, toward: Tensor) -> tuple[Tensor, float]:
        """A layer's shares of ``<toward, residual>`` at a position: heads by source ``[heads, position + 1]``; MLP."""
        layer, x = self._block(index), self._stream(index)
        weights, values, y = self._row(index, position)
        heads, inner = values.shape[0], values.shape[0] * values.shape[2]
        back = _transposed(layer.self_attn.o_proj, _through(layer.post_attention_layernorm, y, toward), inner)
        sources = values.new_zeros(heads, position + 1)
        sources[:, weights.first :] = weights.weights[:, 0] * (values @ back.view(heads, -1, 1))[..., 0]
        after = x[position] + layer.post_attention_layernorm(y)
        m = layer.mlp(layer.pre_feedforward_layernorm(after[None]))[0]
        return sources, float(_through(layer.post_feedforward_layernorm, m, toward) @ m.float())


def _base(base: Inspection | None, model: Gemma3, tokens: np.ndarray) -> TorchInspection | None:
    """The inspection whose streams are shared, once it is seen to be of the same text and model."""
    if base is None:
        return None
    if not isinstance(base, TorchInspection) or base._model is not model:
        raise UnsupportedError("the base is of another engine or model: give one of the model that is loaded")
    check_base(tokens, base)
    return base


def _through(norm: RMSNorm, x: Tensor, toward: Tensor) -> Tensor:
    """The vector g with ``<g, x> = <toward, norm(x)>``, the norm's scale being that of ``x``; float32."""
    rms = (x.float().square().mean() + norm.eps).sqrt()
    return toward * (1.0 + norm.weight.float()) / rms


def _transposed(linear: torch.nn.Module, vector: Tensor, inner: int) -> Tensor:
    """``Wᵀ vector`` of a linear map, adapters counted in."""
    zeros = vector.new_zeros(1, 1, inner)
    return torch.autograd.functional.vjp(linear, zeros, vector[None, None])[1]


def _in_strips(columns: Callable[..., tuple[Tensor, ...]], *blocks: Tensor) -> tuple[Tensor, ...]:
    """The columns that a function makes of blocks with a row per position, a few rows at a time."""
    parts = [columns(*strips) for strips in zip(*(block.split(STRIP) for block in blocks), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _log_probs(logits: Tensor) -> Tensor:
    """Logits turned into log-probabilities in their place."""
    for strip in logits.split(STRIP):
        strip.copy_(strip.log_softmax(-1))
    return logits


def _lens(logits: Tensor, final: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The columns of ``LensRows`` from logits and the model's own log-probabilities, ``[positions, vocabulary]``."""
    return _in_strips(_lens_strip, logits, final, targets[:, None])


def _lens_strip(logits: Tensor, final: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_probs = logits.log_softmax(-1)
    probability, top = log_probs.max(-1)
    wanted = log_probs.gather(1, targets)
    return (
        top.int(), probability.exp(), -(log_probs.exp() * log_probs).sum(-1),
        (final.exp() * (final - log_probs)).sum(-1), wanted[:, 0], (log_probs > wanted).sum(-1).int(),
    )  # fmt: skip


def _effect(base: Tensor, edited: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The columns of an ``Effect`` from logits ``[positions, vocabulary]`` and targets ``[positions, 1]``."""
    return _in_strips(_effect_strip, base, edited, targets)


def _effect_strip(base: Tensor, edited: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    p, q = base.log_softmax(-1), edited.log_softmax(-1)
    found = [tensor.gather(1, targets)[:, 0] for tensor in (p, q, base, edited)]
    return ((p.exp() * (p - q)).sum(-1), *found, base.argmax(-1).int(), edited.argmax(-1).int())
