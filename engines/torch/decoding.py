"""Reading prompts side by side in torch. The file mirrors ``engines/mlx/decoding.py``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engines.blocks import Predictions
from engines.cache import PREFILL
from engines.torch.attention import causal
from engines.torch.model import Gemma3


class Reader:
    """See ``engines.decoding.Reader``.

    Args:
        pads: int64 ``[rows]``, how many columns come before the first token of each prompt.
        banned: a token that is never predicted.
    """

    def __init__(self, model: Gemma3, pads: np.ndarray, banned: int | None) -> None:
        self._model = model
        self._device = model.model.embed_tokens.weight.device
        self._cache = model.make_cache()
        self._pads = torch.from_numpy(pads).to(self._device) if pads.any() else None
        self._banned = banned

    def read(self, tokens: np.ndarray, block: np.ndarray, wanted: np.ndarray, full: bool) -> Predictions:
        width = block.shape[1]
        # Not a decorator: a mode left on while a generator waits would leak to its caller.
        with torch.inference_mode():
            ids = torch.from_numpy(np.concatenate((tokens, block), axis=1)).to(self._device, torch.long)
            while ids.shape[1] > PREFILL + width:
                self._forward(ids[:, :PREFILL], 0)
                ids = ids[:, PREFILL:]
            hidden = self._forward(ids, width)[:, -max(1, width) :]
            for layer in self._cache:
                layer.crop(width)
            at = torch.from_numpy(wanted).to(self._device)
            return self._predictions(self._model.logits(hidden[at]).float(), full)

    def keep(self, rows: np.ndarray) -> None:
        chosen = torch.from_numpy(rows).to(self._device)
        for layer in self._cache:
            layer.select(chosen)
        self._pads = None if self._pads is None else self._pads[chosen]

    def _forward(self, ids: Tensor, block: int) -> Tensor:
        window, start = self._model.config.sliding_window, self._cache[0].length
        layout = causal(start, ids.shape[1], window, self._device, block, self._pads)
        return self._model(ids, self._cache, layout)

    def _predictions(self, logits: Tensor, full: bool) -> Predictions:
        if self._banned is not None:
            # Finite, because 0 times infinity is not a number.
            logits[:, self._banned] = torch.finfo(logits.dtype).min
        kept = logits.cpu().numpy().copy() if full else None
        top, best = logits.max(dim=-1, keepdim=True)
        scores = logits.sub_(top)
        p = scores.softmax(dim=-1)
        first = p.gather(-1, best)
        entropies = (-first.log()[:, 0] - torch.linalg.vecdot(p, scores)).clamp_(min=0)
        seconds = p.scatter_(-1, best, 0).amax(dim=-1)
        return Predictions(
            best[:, 0].int().cpu().numpy(),
            entropies.cpu().numpy(),
            first[:, 0].cpu().numpy(),
            seconds.cpu().numpy(),
            kept,
        )
