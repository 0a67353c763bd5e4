"""Reading prompts side by side in MLX. The file mirrors ``engines/torch/decoding.py``."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from engines.blocks import Predictions
from engines.cache import PREFILL
from engines.mlx.attention import causal
from engines.mlx.model import Gemma3


class Reader:
    """See ``engines.decoding.Reader``.

    Args:
        pads: int64 ``[rows]``, how many columns come before the first token of each prompt.
        banned: a token that is never predicted.
    """

    def __init__(self, model: Gemma3, pads: np.ndarray, banned: int | None) -> None:
        self._model = model
        self._cache = model.make_cache()
        self._pads = mx.array(pads.astype(np.int32)) if pads.any() else None
        self._banned = banned

    def read(self, tokens: np.ndarray, block: np.ndarray, wanted: np.ndarray, full: bool) -> Predictions:
        width = block.shape[1]
        ids = mx.array(np.concatenate((tokens, block), axis=1))
        while ids.shape[1] > PREFILL + width:
            mx.eval(self._forward(ids[:, :PREFILL], 0))
            ids = ids[:, PREFILL:]
        hidden = self._forward(ids, width)[:, -max(1, width) :]
        for layer in self._cache:
            layer.crop(width)
        at = mx.array(np.flatnonzero(wanted))
        chosen = hidden.reshape(-1, hidden.shape[-1])[at]
        return self._predictions(self._model.logits(chosen).astype(mx.float32), full)

    def keep(self, rows: np.ndarray) -> None:
        chosen = mx.array(rows)
        for layer in self._cache:
            layer.select(chosen)
        self._pads = None if self._pads is None else self._pads[chosen]

    def _forward(self, ids: mx.array, block: int) -> mx.array:
        layout = causal(self._cache[0].length, ids.shape[1], self._model.config.sliding_window, block, self._pads)
        return self._model(ids, self._cache, layout)

    def _predictions(self, logits: mx.array, full: bool) -> Predictions:
        if self._banned is not None:
            # Finite, because 0 times infinity is not a number.
            logits[:, self._banned] = mx.finfo(mx.float32).min
        best = logits.argmax(axis=-1, keepdims=True)
        scores = logits - logits.max(axis=-1, keepdims=True)
        p = mx.softmax(scores, axis=-1)
        first = mx.take_along_axis(p, best, axis=-1)
        entropies = mx.maximum(-mx.log(first)[:, 0] - (p * scores).sum(axis=-1), 0)
        seconds = mx.put_along_axis(p, best, mx.array(0.0), axis=-1).max(axis=-1)
        return Predictions(
            np.array(best[:, 0].astype(mx.int32)),
            np.array(entropies),
            np.array(first[:, 0]),
            np.array(seconds),
            np.array(logits) if full else None,
        )
