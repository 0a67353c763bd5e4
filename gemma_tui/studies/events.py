"""What a study tells while it runs: the run store keeps it, the command line prints it, the screen draws it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """One fact of a run.

    Attributes:
        kind: ``run``, ``load``, ``start``, ``resumed``, ``step``, ``merge``, ``diagnosis``, ``matrices``,
            ``evaluation``, ``best``, ``early_stop``, ``checkpoint``, ``pause``, ``resume``, ``warning``, ``end``; or
            ``waiting``, which tells only that a paused study is alive.
        step: the optimizer step it belongs to, 0 before the first.
        values: numbers and plain texts, ready for JSON.
    """

    kind: str
    step: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """One flat JSON object."""
        return {"kind": self.kind, "step": self.step, **self.values}


@dataclass(frozen=True)
class Control:
    """How a front steers a running study from another thread."""

    stop: threading.Event = field(default_factory=threading.Event)
    pause: threading.Event = field(default_factory=threading.Event)
