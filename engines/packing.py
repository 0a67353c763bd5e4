"""Documents packed into rows, for both engines."""

from __future__ import annotations

import numpy as np


def document_positions(segments: np.ndarray) -> np.ndarray:
    """The place of each token in its document: int32 ``[batch, length]``, from 0 on wherever ``segments`` changes."""
    places = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
