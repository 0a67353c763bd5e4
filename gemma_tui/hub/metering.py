"""How far a download is: bytes, rate and time left, and the places where it pauses, stops or finds the disk full."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tui.errors import GemmaTuiError

Tell = Callable[..., None]
"""``tell(kind, **values)``"""

TELL_SECONDS = 0.25
RATE_SECONDS = 5.0
LOWEST_FREE = 256 << 20
"""Bytes of the disk at which a download ends: other programs need some, too."""


class CancelledError(Exception):
    """The download was cancelled."""


@dataclass
class Control:
    """What others want of a download that goes on."""

    stop: threading.Event = field(default_factory=threading.Event)
    paused: threading.Event = field(default_factory=threading.Event)


class Watch:
    """Bytes, rate and time left of one try, told a few times a second; pauses and stops between two pieces."""

    def __init__(self, there: int, total: int, tell: Tell, control: Control, place: Path) -> None:
        self.done, self.total, self.place = there, total, place
        self._tell, self._control = tell, control
        self._seen = deque([(time.monotonic(), there)])
        self._told = 0.0
        self._lock = threading.Lock()

    def more(self, count: float) -> None:
        """Bytes that came, from whichever thread; fewer when the client begins a file again."""
        if self._control.paused.is_set():
            self._wait()
        if self._control.stop.is_set():
            raise CancelledError
        with self._lock:
            self.done += int(count)
            if self.done > self.total:
                raise GemmaTuiError(f"the hub sends more than the {self.total:,} bytes that it named: nothing is kept")
            if time.monotonic() - self._told > TELL_SECONDS:
                self.tell_now()
                if free_bytes(self.place) < LOWEST_FREE:
                    raise OSError(errno.ENOSPC, "the disk is nearly full")

    def tell_now(self) -> None:
        """Tell where it is."""
        now = self._told = time.monotonic()
        self._seen.append((now, self.done))
        while now - self._seen[0][0] > RATE_SECONDS and len(self._seen) > 2:
            self._seen.popleft()
        began, before = self._seen[0]
        rate = max(0.0, (self.done - before) / (now - began)) if now > began else 0.0
        left = (self.total - self.done) / rate if rate else None
        shown = None if left is None else round(left, 1)
        self._tell("progress", bytes=self.done, total=self.total, rate=round(rate), seconds_left=shown)

    def _wait(self) -> None:
        while self._control.paused.is_set() and not self._control.stop.is_set():
            time.sleep(0.05)
        self._seen = deque([(time.monotonic(), self.done)])


def meter(more: Callable[[float], None] | None = None) -> Any:
    """A class that the client takes for a progress bar. It makes three of it; one counts the bytes on disk."""

    class Meter:
        def __init__(self, *args: Any, total: Any = None, desc: str = "", unit: str = "it", **options: Any) -> None:
            self.n, self.total = 0.0, total
            self._counts = more is not None and unit == "B" and str(desc).startswith("Reconstructing")
            self.format_dict: Mapping[str, Any] = {"rate": None}

        def update(self, count: float | None = 1) -> None:
            self.n += count or 0
            if self._counts and more is not None:
                more(count or 0)

        def ignore(self, *args: Any, **options: Any) -> None: ...

        refresh = close = set_description = set_description_str = set_postfix_str = __exit__ = ignore

        def __enter__(self) -> Meter:
            return self

    return Meter


def free_bytes(place: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
