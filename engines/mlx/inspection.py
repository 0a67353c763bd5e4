"""One text's way through the model, in MLX. The file mirrors ``engines/torch/inspection.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

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
from engines.mlx import circuits, tiles
from engines.mlx.attention import attention
from engines.mlx.device import number
from engines.mlx.model import Block, Gemma3, Linear, RMSNorm, rotations

ROWS = 64
"""Positions whose logits are there at a time."""

STRIP = 4
"""Positions that pass after pass goes over, few enough to stay in a processor's cache."""


class MLXInspection:
    """See ``engines.inspection.Inspection``, which tells what each method promises."""

    def __init__(self, model: Gemma3, tokens: np.ndarray, edits: Sequence[Edit], base: Inspection | None) -> None:
        self.config, self.tokens, self.edits = model.config, tokens, tuple(edits)
        check_tokens(self.config, tokens)
        check_edits(self.config, len(tokens), edits)
        self._shared = _base(base, model, tokens)
        self.tick: Callable[[], object] = self._shared.tick if self._shared else no_tick
        self._first = first_edited(self.config, edits)
        self._model = model.eval()
        self._ids = mx.array(tokens)
        places = mx.arange(len(tokens))
        ropes = {self.config.rope_local, self.config.rope_global}
        self._rotations = {rope: rotations(places, rope, self.config.head_dim) for rope in ropes}
        x = self._shared._stream(0) if self._shared else model.model.embed_tokens(self._ids, model.dtype)
        self._streams = [self._patched(x, 0)]
        self._made: tuple[int, tiles.Layer] | None = None
        self._known: tuple[Span, mx.array] | None = None

    def advance(self, layers: int) -> None:
        if layers != self.config.num_hidden_layers:
            check_layer(self.config, layers)
        while len(self._streams) <= layers:
            self._streams.append(self._next(len(self._streams) - 1))
            mx.eval(self._streams)

    def statistics(self, layer: int) -> LayerStatistics:
        check_layer(self.config, layer)
        return tiles.statistics(self._layer(layer), self._ids, self.config.sliding_window)

    def attention(self, layer: int, head: int, queries: Span) -> np.ndarray:
        check_heads(self.config, layer, (head,))
        check_span(queries, len(self.tokens))
        return tiles.rows(self._layer(layer), head, queries)

    def queries_keys(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        check_layer(self.config, layer)
        made = self._layer(layer)
        return np.array(made.q), np.array(made.k)

    def divergence(self, layer: int, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        check_layer(self.config, layer)
        made = self._layer(layer)
        if queries.shape != made.q.shape or keys.shape != made.k.shape:
            raise UnsupportedError(f"queries {queries.shape} are of another text or model, not {tuple(made.q.shape)}")
        q, k = (mx.array(array) for array in (queries, keys))
        return tiles.divergence(made, tiles.Layer(q, k, made.v, made.scale, made.window))

    def residual(self, layer: int) -> ResidualFacts:
        h = self._stream(layer).astype(mx.float32)
        size = mx.abs(h).flatten()
        order = mx.argsort(size)
        places = [int(place) for place in np.array(order[-3:])[::-1]]
        largest = tuple((number(size[place]), *divmod(place, h.shape[1])) for place in places)
        median = number(size[order[(size.size - 1) // 2]])
        return ResidualFacts(np.array(mx.sqrt(mx.square(h).mean(axis=-1))), median, largest)

    def stream(self, layer: int, positions: Span) -> np.ndarray:
        check_span(positions, len(self.tokens))
        return np.array(self._stream(layer)[slice(*positions)].astype(mx.float32))

    def head_outputs(self, layer: int, heads: Sequence[int], positions: Span) -> np.ndarray:
        check_heads(self.config, layer, heads)
        check_span(positions, len(self.tokens))
        z = self._outputs(layer)
        return np.array(z[0, mx.array(list(heads)), slice(*positions)].astype(mx.float32))

    def lens(self, positions: Span, targets: np.ndarray) -> Iterator[LensRows]:
        check_span(positions, len(self.tokens))
        wanted = mx.array(targets)
        last, blocks = self.config.num_hidden_layers, list(spans(positions, ROWS))
        final = [_log_probs(self._logits(span, last)) for span in blocks]
        for layer in range(last + 1):
            found = (self._logits(span, layer) for span in blocks)
            parts = map(_lens, found, final, _split(wanted))
            yield LensRows(*(np.array(mx.concatenate(list(column))) for column in zip(*parts, strict=True)))

    def attribution(self, position: int, token: int, contrast: int | None = None) -> Attribution:
        check_span((position, position + 1), len(self.tokens))
        if self.edits:
            raise UnsupportedError("attribution splits what the model itself computes: take the edits away")
        decoder, last = self._model.model, self.config.num_hidden_layers
        rows = decoder.embed_tokens.rows(mx.array([token, token if contrast is None else contrast])).astype(mx.float32)
        row = rows[0] - (rows[1] if contrast is not None else 0)
        logits = self._model.logits(decoder.norm(self._stream(last)[position])).astype(mx.float32)
        logit = logits[token] - (logits[contrast] if contrast is not None else 0)
        toward = _through(decoder.norm, self._stream(last)[position], row)
        layers = [self._layer_parts(layer, position, toward) for layer in range(last)]
        embedding = number(toward @ self._stream(0)[position].astype(mx.float32))
        sources = np.array(mx.stack([heads for heads, _ in layers]))
        return Attribution(sources, np.array([mlp for _, mlp in layers], np.float32), embedding, number(logit))

    def carried(self, layer: int, rows: np.ndarray) -> np.ndarray:
        check_layer(self.config, layer)
        check_mass(rows, len(self.tokens))
        return np.array(tiles.carried(self._layer(layer), mx.array(rows)))

    def circuit(self, layer: int, tokens: np.ndarray, position: int, count: int) -> Circuit:
        check_layer(self.config, layer)
        check_span((position, position + 1), len(self.tokens))
        check_circuit(self.config, tokens, count, self.edits)
        block, norm = self._block(layer), self._model.model.norm
        end = self._stream(self.config.num_hidden_layers)[position]
        toward = _through(norm, end, mx.ones(end.shape))
        scale = _through(block.post_attention_layernorm, self._row(layer, position)[2], toward)
        return circuits.circuit(self._model, layer, mx.array(tokens), scale, count, self.tick)

    def token_scores(self, layer: int, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        check_layer(self.config, layer)
        check_ids(self.config, queries, keys)
        return np.array(circuits.scores(self._model, layer, mx.array(queries), mx.array(keys)))

    def effect(self, base: Inspection, positions: Span, targets: np.ndarray) -> Effect:
        if not isinstance(base, MLXInspection):
            raise UnsupportedError("the other text is on another engine: inspect both on one")
        check_span(positions, min(len(self.tokens), len(base.tokens)))
        parts = []
        for span, some in zip(spans(positions, ROWS), _split(mx.array(targets)), strict=True):
            parts.append(_effect(base._kept_logits(span), self._kept_logits(span), some[:, None]))
        return Effect(*(np.array(mx.concatenate(list(column))) for column in zip(*parts, strict=True)))

    def _block(self, index: int) -> Block:
        return self._model.model.layers[index]

    def _stream(self, layer: int) -> mx.array:
        """The residual stream before a layer, ``[T, hidden]``."""
        self.advance(layer)
        return self._streams[layer]

    def _next(self, index: int) -> mx.array:
        """The residual stream after a layer."""
        if self._shared is not None and index < self._first:
            return self._patched(self._shared._stream(index + 1), index + 1)
        layer, x = self._block(index), self._stream(index)
        y = layer.self_attn.join(self._outputs(index))[0]
        x = x + layer.post_attention_layernorm(y)
        x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
        return self._patched(x, index + 1)

    def _outputs(self, index: int) -> mx.array:
        """What the heads of a layer give, ``[1, heads, T, head_dim]``, edited."""
        layer, parts = self._layer(index), []
        q, k, v = (part[None].astype(self._model.dtype) for part in (layer.q, layer.k, layer.v))
        for start, stop in spans((0, len(self.tokens))):
            self.tick()
            keys = slice(first_key(start, layer.window), stop)
            mask = tiles.allowed(layer, start, stop, range(q.shape[1]))
            parts.append(attention(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], layer.scale, mask))
            mx.eval(parts[-1])
        z = mx.concatenate(parts, axis=2)
        for edit in self.edits:
            if isinstance(edit, Ablation) and edit.layer == index:
                heads = mx.array(edit.heads)
                mean = z[:, heads].astype(mx.float32).mean(axis=2, keepdims=True)
                z[:, heads] = 0 if edit.how == "zero" else mean.astype(z.dtype)
            elif isinstance(edit, Patch) and edit.layer == index and edit.heads is not None:
                z[0, mx.array(edit.heads), slice(*edit.positions)] = mx.array(edit.values).astype(z.dtype)
        return z

    def _patched(self, x: mx.array, layer: int) -> mx.array:
        """A residual stream with what other runs put into it."""
        for edit in self.edits:
            if isinstance(edit, Patch) and edit.layer == layer and edit.heads is None:
                x = mx.array(x)  # it may be another inspection's too
                x[slice(*edit.positions)] = mx.array(edit.values).astype(x.dtype)
        return x

    def _layer(self, index: int) -> tiles.Layer:
        """Queries, keys and values of a layer in float32; those asked for last are kept."""
        if self._made is None or self._made[0] != index:
            layer, x = self._block(index), self._stream(index)
            rotation = self._rotations[self.config.rope(index)]
            projected = layer.self_attn.project(layer.input_layernorm(x)[None], rotation)
            q, k, v = (part[0].astype(mx.float32) for part in projected)
            mx.eval(q, k, v)
            cuts = [edit for edit in self.edits if isinstance(edit, Knockout) and edit.layer == index]
            scale, window = layer.self_attn.scale, self.config.window(index)
            self._made = index, tiles.Layer(q, k, v, scale, window, cuts, lambda: self.tick())
        return self._made[1]

    def _logits(self, positions: Span, layer: int) -> mx.array:
        """Float32 ``[positions, vocabulary]``, through the lens before a layer."""
        h = self._stream(layer)[slice(*positions)]
        logits = self._model.logits(self._model.model.norm(h)).astype(mx.float32)
        mx.eval(logits)
        return logits

    def _kept_logits(self, positions: Span) -> mx.array:
        """The model's own, at no more than ``ROWS`` positions; those asked for last are kept."""
        if self._known is None or self._known[0] != positions:
            self._known = None
            self._known = positions, self._logits(positions, self.config.num_hidden_layers)
        return self._known[1]

    def _row(self, index: int, position: int) -> tuple[tiles.Tile, mx.array, mx.array]:
        """The attention of one query: weights, values ``[heads, keys, head_dim]``, what ``o_proj`` makes of them."""
        layer, made = self._block(index), self._layer(index)
        weights = next(tiles.tiles(made, (position, position + 1)))
        values = mx.repeat(made.v[:, weights.first : position + 1], made.q.shape[0] // made.k.shape[0], axis=0)
        return weights, values, layer.self_attn.join((weights.weights @ values)[None].astype(self._model.dtype))[0, 0]

    def _layer_parts(self, index: int, position: int, toward: mx.array) -> tuple[mx.array, float]:
        """A layer's shares of ``<toward, residual>`` at a position: heads by source ``[heads, position + 1]``; MLP."""
        layer, x = self._block(index), self._stream(index)
        weights, values, y = self._row(index, position)
        heads, inner = values.shape[0], values.shape[0] * values.shape[2]
        back = _transposed(layer.self_attn.o_proj, _through(layer.post_attention_layernorm, y, toward), inner)
        sources = mx.zeros((heads, position + 1))
        sources[:, weights.first :] = weights.weights[:, 0] * (values @ back.reshape(heads, -1, 1))[..., 0]
        after = x[position] + layer.post_attention_layernorm(y)
        m = layer.mlp(layer.pre_feedforward_layernorm(after[None]))[0]
        mx.eval(sources)
        return sources, number(_through(layer.post_feedforward_layernorm, m, toward) @ m.astype(mx.float32))


def _base(base: Inspection | None, model: Gemma3, tokens: np.ndarray) -> MLXInspection | None:
    """The inspection whose streams are shared, once it is seen to be of the same text and model."""
    if base is None:
        return None
    if not isinstance(base, MLXInspection) or base._model is not model:
        raise UnsupportedError("the base is of another engine or model: give one of the model that is loaded")
    check_base(tokens, base)
    return base


def _through(norm: RMSNorm, x: mx.array, toward: mx.array) -> mx.array:
    """The vector g with ``<g, x> = <toward, norm(x)>``, the norm's scale being that of ``x``; float32."""
    rms = mx.sqrt(mx.square(x.astype(mx.float32)).mean() + norm.eps)
    return toward * (1.0 + norm.weight.astype(mx.float32)) / rms


def _transposed(linear: Linear, vector: mx.array, inner: int) -> mx.array:
    """``Wᵀ vector`` of a linear map, adapters counted in."""
    _, (found,) = mx.vjp(linear, [mx.zeros((1, 1, inner))], [vector[None, None]])
    return found


def _split(array: mx.array, size: int = ROWS) -> list[mx.array]:
    return [array[start : start + size] for start in range(0, array.shape[0], size)]


def _in_strips(columns: Callable[..., tuple[mx.array, ...]], *blocks: mx.array) -> tuple[mx.array, ...]:
    """The columns that a function makes of blocks with a row per position, a few rows at a time."""
    parts = []
    for strips in zip(*(_split(block, STRIP) for block in blocks), strict=True):
        parts.append(columns(*strips))
        mx.eval(parts[-1])
    return tuple(mx.concatenate(list(column)) for column in zip(*parts, strict=True))


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _log_probs(logits: mx.array) -> mx.array:
    """Log-probabilities of logits."""
    log_probs = _log_softmax(logits)
    mx.eval(log_probs)
    return log_probs


def _lens(logits: mx.array, final: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    """The columns of ``LensRows`` from logits and the model's own log-probabilities, ``[positions, vocabulary]``."""
    return _in_strips(_lens_strip, logits, final, targets[:, None])


def _lens_strip(logits: mx.array, final: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    log_probs = _log_softmax(logits)
    wanted = mx.take_along_axis(log_probs, targets, axis=1)
    return (
        log_probs.argmax(axis=-1).astype(mx.int32), mx.exp(log_probs.max(axis=-1)),
        -(mx.exp(log_probs) * log_probs).sum(axis=-1), (mx.exp(final) * (final - log_probs)).sum(axis=-1),
        wanted[:, 0], (log_probs > wanted).sum(axis=-1),
    )  # fmt: skip


def _effect(base: mx.array, edited: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    """The columns of an ``Effect`` from logits ``[positions, vocabulary]`` and targets ``[positions, 1]``."""
    return _in_strips(_effect_strip, base, edited, targets)


def _effect_strip(base: mx.array, edited: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    p, q = _log_softmax(base), _log_softmax(edited)
    found = [mx.take_along_axis(array, targets, axis=1)[:, 0] for array in (p, q, base, edited)]
    tops = (logits.argmax(axis=-1).astype(mx.int32) for logits in (base, edited))
    return ((mx.exp(p) * (p - q)).sum(axis=-1), *found, *tops)
