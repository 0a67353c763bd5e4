"""Everything that computes on tensors: two interchangeable engines behind one contract."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from engines.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

    from engines.base import Engine

ENGINES = ("torch", "mlx")
INSTALL = {"torch": "pip install torch", "mlx": "pip install 'mlx[cpu]' on Linux, pip install mlx on a Mac"}


def available_engines() -> list[str]:
    """Names of the engines whose framework is installed; nothing is imported to find out."""
    return [name for name in ENGINES if importlib.util.find_spec("mlx.core" if name == "mlx" else name)]


def default_engine() -> str:
    """MLX on a Mac, torch elsewhere, or the one that is installed."""
    available = available_engines()
    preferred = "mlx" if sys.platform == "darwin" else "torch"
    return preferred if preferred in available else next(iter(available), preferred)


def open_engine(name: str = "auto") -> Engine:
    """Import a framework and open its engine on the calling thread, which is the engine's from then on.

    Args:
        name: ``"torch"``, ``"mlx"`` or ``"auto"``.

    Raises:
        UnsupportedError: the name is unknown or its framework is not installed.
    """
    available = available_engines()
    if name == "auto":
        name = default_engine()
    if name not in ENGINES:
        raise UnsupportedError(f"engine {name!r} is unknown: choose torch or mlx")
    if name not in available:
        raise UnsupportedError(f"engine {name} is not installed here: {INSTALL[name]}")
    if name == "mlx":
        from engines.mlx.engine import MLXEngine

        return MLXEngine()
    _bound_mps_memory()
    from engines.torch.engine import TorchEngine

    return TorchEngine()


def eager_attention(folder: Path, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The attention weights of every layer by transformers, in float32; see ``engines.torch.eager``.

    Raises:
        UnsupportedError: transformers or torch is not installed, or it does not read the folder.
    """
    from engines.torch import eager

    return eager.eager_attention(folder, tokens)


def _bound_mps_memory() -> None:
    """Make torch fail rather than swap on a Mac: its own limit of 1.7 times the working set is more than the memory.

    Both are read when torch is imported, and the lower one must not exceed the higher.
    """
    os.environ.setdefault("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.9")
    os.environ.setdefault("PYTORCH_MPS_LOW_WATERMARK_RATIO", "0.8")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
