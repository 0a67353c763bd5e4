"""Saying that something does not fit before the machine swaps or kills the process."""

from __future__ import annotations

from engines.errors import EngineError

TRAINED_BYTES = 16
"""Of a trained parameter: float32 master, gradient and AdamW's two moments."""

SIGNS = ("out of memory", "can't allocate memory", "unable to allocate", "failed to allocate", "bad_alloc")


def ensure_memory(what: str, needed: int, free: int) -> None:
    """Check that ``needed`` bytes are free on a device.

    Raises:
        EngineError: they are not; the message has both numbers.
    """
    if needed > free:
        raise EngineError(
            f"{what} needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
            "close other programs, or choose a smaller model, rank or dtype"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a framework or of Python means that memory ran out; each framework has its own words."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in SIGNS)
