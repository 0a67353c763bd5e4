"""Saying that something does not fit before the machine swaps or kills the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engines.errors import EngineError

if TYPE_CHECKING:  # numpy comes with them, and `--help` needs none
    from engines.base import TrainingSettings
    from engines.gemma3 import Gemma3Config

TRAINED_BYTES = 16
"""Of a trained parameter: float32 master, gradient and AdamW's two moments."""

SIGNS = ("out of memory", "can't allocate memory", "unable to allocate", "failed to allocate", "bad_alloc")


def trained_count(config: Gemma3Config, settings: TrainingSettings) -> int:
    """Parameters that have a gradient and an optimizer's state of their own."""
    whole, lora, rank1 = config.parameter_count(), settings.lora, settings.rank1
    if lora is None and rank1 is None:
        return whole
    chosen = lora or rank1
    assert chosen is not None
    share = 1.0 if chosen.layers is None else len(chosen.layers) / config.num_hidden_layers
    adapters = round(share * config.lora_count(lora.rank if lora else 1, chosen.targets))
    return adapters + (whole if settings.rest else 0)


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
