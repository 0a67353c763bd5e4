"""Saying that something does not fit before the machine swaps or kills the process."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import EngineError

if TYPE_CHECKING:
    from engines.gemma3 import Gemma3Config
    from engines.training import TrainingSettings

STATUS = Path("/proc/self/status")

TRAINED_BYTES = 16
"""Of a trained parameter: float32 master, gradient and AdamW's two moments."""

SIGNS = ("out of memory", "can't allocate memory", "unable to allocate", "failed to allocate", "bad_alloc")


def training_bytes(config: Gemma3Config, settings: TrainingSettings, item: int) -> int:
    """What training holds beside a model whose weights take ``item`` bytes each, before activations."""
    from engines.adapters import target_modules  # it brings numpy, which `--help` does without

    whole, lora, rank1 = config.parameter_count(), settings.lora, settings.rank1
    chosen = lora or rank1
    if chosen is None:
        return TRAINED_BYTES * whole
    matrices = target_modules(config, chosen.targets, chosen.layers)
    size = sum(out * inner for out, inner in matrices.values())
    adapters = sum(lora.rank * (out + inner) for out, inner in matrices.values()) if lora else 0
    rest = whole - size if settings.rest else 0
    # Weights that are merged into are float32; a buffer comes with a gradient that is formed.
    masters = (4 - item) * size if rank1 or settings.merging else 0
    buffers = 8 * size if rank1 and rank1.buffered else 0
    return TRAINED_BYTES * (adapters + rest) + masters + buffers


def process_peak() -> int:
    """The most bytes of this process that were in memory at once, since it began or ``reset_process_peak``."""
    if STATUS.exists():  # what getrusage tells on Linux counts the process before exec as well
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_process_peak() -> None:
    """Count from what is in memory now, where the system lets one: on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def trim_process() -> None:
    """Give the system back what was freed, where the allocator would keep it for the process: glibc's."""
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # another C library has no such function, Windows no such name
        ctypes.CDLL(None).malloc_trim(0)


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
