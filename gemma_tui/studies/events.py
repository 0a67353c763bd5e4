"""What a study tells while it runs: the run store keeps it, the command line prints it, the screen draws it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gemma_tui.output import duration

PACE_SECONDS = 1.0
PASSING = ("waiting", "evaluating", "diagnosing", "scoring", "measuring", "decoding", "training")
"""Kinds that tell only what a study is at between two steps: a pause, an evaluation, the spectra of all matrices, the
scores of sequences, bits or masked losses while a run trains, greedy decoding. They are shown and not kept."""


@dataclass(frozen=True)
class Event:
    """One fact of a run.

    Attributes:
        kind: ``run``, ``load``, ``start``, ``resumed``, ``step``, ``merge``, ``diagnosis``, ``matrices``,
            ``evaluation``, ``memorized``, ``best``, ``early_stop``, ``checkpoint``, ``heads``, ``scored``,
            ``memorization``, ``decoded``, ``membership``, ``extraction``, ``exposure``, ``part``, ``bits``, ``cell``,
            ``curve``, ``pause``, ``resume``, ``warning``, ``end``; or one of ``PASSING``.
        step: the optimizer step it belongs to, 0 before the first.
        values: numbers and plain texts, ready for JSON.
    """

    kind: str
    step: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """One flat JSON object."""
        return {"kind": self.kind, "step": self.step, **self.values}


def passing(event: Event) -> str:
    """What a study is at between two steps, in words; nothing of other events."""
    v = event.values
    if event.kind not in PASSING or not v:
        return ""
    left = v["seconds_left"]
    return f"{event.kind} {v['done']}/{v['total']}" + ("" if left is None else f", {duration(left)} left")


@dataclass
class Pace:
    """How far something has come that goes on between two steps, told when it begins and then once a second.

    Attributes:
        total: the parts it has.
        whole: what they weigh together.
    """

    kind: str
    step: int
    total: int
    whole: float
    done: int = 0
    weight: float = 0.0
    _began: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)

    def advance(self, weight: float = 1.0) -> Iterator[Event]:
        """Count a part that is done; the event of it, if it is time for one."""
        self.done, self.weight = self.done + 1, self.weight + weight
        now = time.monotonic()
        if now - self._told < PACE_SECONDS:
            return
        self._told = now
        yield self.now()

    def now(self) -> Event:
        """How far it is; also that it begins."""
        left = (time.monotonic() - self._began) * (self.whole / self.weight - 1) if self.weight else None
        return Event(self.kind, self.step, {"done": self.done, "total": self.total, "seconds_left": left})


@dataclass(frozen=True)
class Control:
    """How a front steers a running study from another thread."""

    stop: threading.Event = field(default_factory=threading.Event)
    pause: threading.Event = field(default_factory=threading.Event)


def wait_while_paused(control: Control, step: int) -> Iterator[Event]:
    """Wait as long as a front wants it, telling when that begins and ends."""
    if not control.pause.is_set():
        return
    yield Event("pause", step)
    while control.pause.is_set() and not control.stop.wait(0.1):
        yield Event("waiting", step)
    yield Event("resume", step)
