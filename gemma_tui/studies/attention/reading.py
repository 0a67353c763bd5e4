"""A text on a loaded model, with what was found out about it so far."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.base import Engine
from engines.edits import Edit
from engines.inspection import Inspection, LayerStatistics
from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure
from gemma_tui.text import one_line
from gemma_tui.tokenizer import BOS, Tokenizer

View = Generator[float, None, Figure]
"""Yields the share that is done, 0 to 1, and returns the figure."""

LABEL = 24


@dataclass
class Reading:
    """One text, inspected; what was computed for one view is there for the next.

    Attributes:
        labels: the tokens as they are shown, cleaned; half a character and control bytes are told by their ids.
        facts: where numbers about it come from.
    """

    engine: Engine
    tokenizer: Tokenizer
    inspection: Inspection
    labels: list[str]
    facts: dict[str, Any]
    _statistics: dict[int, LayerStatistics] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """T, in tokens."""
        return len(self.labels)

    @property
    def tokens(self) -> np.ndarray:
        """int32 ``[T]``."""
        return self.inspection.tokens

    def statistics(self, layer: int) -> LayerStatistics:
        """The statistics of a layer, computed once."""
        if layer not in self._statistics:
            self._statistics[layer] = self.inspection.statistics(layer)
        return self._statistics[layer]

    def all_statistics(self) -> Generator[float, None, list[LayerStatistics]]:
        """Those of every layer, one after the other."""
        count = self.inspection.config.num_hidden_layers
        found = []
        for layer in range(count):
            found.append(self.statistics(layer))
            yield (layer + 1) / count
        return found

    def edited(self, edits: Sequence[Edit]) -> Inspection:
        """The same text with edits; what they do not change is shared."""
        return self.engine.inspect(self.tokens, edits, self.inspection)

    def top_token(self, position: int) -> int:
        """What the model finds most probable after a position."""
        here = position, position + 1
        return int(self.inspection.effect(self.inspection, here, self.tokens[slice(*here)]).base_top[0])

    def targets(self, last: int | None = None) -> np.ndarray:
        """The token that follows each position; after the last, ``last`` or what the model thinks most probable."""
        if last is None:
            last = self.top_token(self.length - 1)
        return np.append(self.tokens[1:], np.int32(last)).astype(np.int32)


def read(engine: Engine, tokenizer: Tokenizer, text: str, bos: bool = True) -> Reading:
    """Tokenise a text for the model that is loaded.

    Args:
        bos: whether ``<bos>`` comes first, as the model was trained.

    Raises:
        UsageError: the text is empty.
        UnsupportedError: it is longer than the model's context, or no model is loaded.
    """
    ids = tokenizer.encode(text)
    ids = ids if bos else ids[1:]
    if len(ids) < (2 if bos else 1):
        raise UsageError("the text is empty: give --text or --text-file with at least one token")
    return read_tokens(engine, tokenizer, ids)


def read_tokens(engine: Engine, tokenizer: Tokenizer, ids: Sequence[int]) -> Reading:
    """As ``read``, of token ids."""
    inspection = engine.inspect(np.array(ids, np.int32))
    info, device = engine.model(), engine.device()
    config = inspection.config
    facts = {
        "model": info.folder if info else "",
        "adapter": info.adapter if info else None,
        "trained": bool(info and info.trained),
        "engine": device.engine,
        "device": device.device,
        "version": device.version,
        "dtype": info.dtype if info else "",
        "tokens": len(ids),
        "bos": ids[0] == BOS,
        "sliding_window": config.sliding_window,
        "global_layers": list(config.global_layers),
    }
    return Reading(engine, tokenizer, inspection, [label(tokenizer, i) for i in ids], facts)


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is shown: spaces are seen, line ends are ⏎, and what is not text is its place in the vocabulary."""
    written = tokenizer.token(token)
    shown = one_line(written.replace("\n", "⏎").replace("\t", "⇥"), LABEL)
    return shown or f"#{token}"


def window_notes(reading: Reading) -> list[str]:
    """What there is to know of the window, loudly where it does nothing."""
    window = reading.inspection.config.sliding_window
    if reading.length <= window:
        return [
            f"WINDOW IDLE: the text has {reading.length:,} tokens and the window {window:,}, "
            "so local layers see all that global ones see"
        ]
    return []
