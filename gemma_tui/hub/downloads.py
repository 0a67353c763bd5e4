"""Downloads as the fronts see them: a process each, what it says, and a queue of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub import cache
from gemma_tui.hub.fetching import Request
from gemma_tui.text import one_line

KILL_SECONDS = 0.75
"""How long a cancelled process may take to end by itself."""

WAITING, RUNNING, PAUSED, DONE, FAILED, CANCELLED = "waiting", "running", "paused", "done", "failed", "cancelled"
KEPT = "finished files are kept; one that was not finished begins again"
"""What the client can resume, and what not."""


@dataclass
class Download:
    """One model that is fetched.

    Attributes:
        state: ``waiting``, ``running``, ``paused``, ``done``, ``failed`` or ``cancelled``.
        done: bytes that are here, of ``total``; 0 of 0 before the size is known.
        rate: bytes per second, over the last seconds.
        seconds_left: None while there is nothing to go by.
        detail: what is done now, or what became of it.
        folder: where it lies, once it is done; else empty.
        told: whether ``Downloads.ended`` has given it.
        events: where what it says is put for ``follow``; without it nothing is kept.
    """

    request: Request
    state: str = WAITING
    done: int = 0
    total: int = 0
    rate: float = 0.0
    seconds_left: float | None = None
    detail: str = ""
    folder: str = ""
    told: bool = False
    events: queue.SimpleQueue[Mapping[str, Any] | None] | None = field(default=None, repr=False)
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def active(self) -> bool:
        """Whether a process of it runs."""
        return self.state in (RUNNING, PAUSED)

    @property
    def share(self) -> float:
        """How much of it is here, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    def start(self) -> None:
        """Begin, in a process of its own that no signal of this terminal reaches.

        Raises:
            GemmaTuiError: the process cannot be started.
        """
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gemma_tui.hub.fetching"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                encoding="utf-8", errors="replace", env=_environment(),
            )  # fmt: skip
        except OSError as error:
            raise GemmaTuiError(f"no process could be started for the download: {error.strerror}") from None
        self.state, self.detail = RUNNING, "asking the hub"
        self._order(json.dumps(asdict(self.request)))
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def pause(self) -> None:
        """Let no more bytes come; after some minutes the server may drop the line."""
        if self.state == RUNNING:
            self.state, self.rate, self.seconds_left = PAUSED, 0.0, None
            self._order("pause")

    def resume(self) -> None:
        """Go on after a pause."""
        if self.state == PAUSED:
            self.state = RUNNING
            self._order("resume")

    def cancel(self) -> None:
        """End it within a second. Finished files stay, unfinished ones are deleted."""
        if self.state == WAITING:
            self.state, self.detail = CANCELLED, "before it began"
        elif self.active and self._process is not None:
            self.state, self.detail, self.rate, self.seconds_left = CANCELLED, KEPT, 0.0, None
            self._order("cancel")
            threading.Thread(target=self._end, args=(self._process,), daemon=True).start()

    def follow(self) -> Iterator[Mapping[str, Any]]:
        """What it says, until its process has ended and what it left is tidied; nothing without ``events``."""
        while self.events is not None and (event := self.events.get()) is not None:
            yield event

    def _listen(self, process: subprocess.Popen[str]) -> None:
        try:
            assert process.stdout is not None
            with process.stdout as said:
                for line in said:
                    with suppress(ValueError):  # a line of a process that was killed
                        event = json.loads(line)
                        self._take(event)
                        self._put(event)
            code = process.wait()
            with suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
            with suppress(OSError):  # what stays is no harm: `models clean` takes it
                cache.tidy(self.request.repo)
            if self.state != DONE:
                self.done = min(self.done, cache.finished_bytes(self.request.repo))
            if self.active:
                self.state, self.detail = FAILED, f"the download's process ended ({code}); try again: {KEPT}"
                self._put({"kind": "failed", "error": self.detail})
        finally:
            self._put(None)

    def _put(self, event: Mapping[str, Any] | None) -> None:
        if self.events is not None:
            self.events.put(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "plan":
            self.total, self.done = event["bytes"], event["bytes"] - event["download"]
            self.detail = f"{event['files']} files, commit {event['commit'][:12]}"
        elif kind == "progress":
            self.done, self.total = event["bytes"], event["total"]
            if self.state == RUNNING:
                self.rate, self.seconds_left = event["rate"], event["seconds_left"]
        elif kind == "retry":
            self.detail = f"again in {event['seconds']:.0f} s: {one_line(event['reason'], 120)}"
        elif kind == "checking":
            self.detail, self.rate, self.seconds_left = f"checksums {event['share']:.0%}", 0.0, None
        elif self.active and kind == "fetched":
            self.state, self.detail, self.done = DONE, f"commit {event['commit'][:12]}", self.total
            self.folder = event["folder"]
        elif self.active and kind == "failed":
            self.state, self.detail = FAILED, one_line(str(event["error"]), 300)

    def _order(self, line: str) -> None:
        with suppress(OSError, ValueError):  # it has ended meanwhile, which its own thread tells
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()

    def _end(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + KILL_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)


class Downloads:
    """A queue: one download at a time, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.items: list[Download] = []

    def add(self, request: Request) -> Download:
        """Append one.

        Raises:
            GemmaTuiError: the same is in the queue already.
        """
        if any(item.request == request and (item.active or item.state == WAITING) for item in self.items):
            raise GemmaTuiError(f"{request.repo} is in the queue already")
        item = Download(request)
        self.items.append(item)
        return item

    def again(self, item: Download) -> None:
        """Let one that has failed or was cancelled wait for its turn again; finished files do not come twice.

        Raises:
            GemmaTuiError: the same is in the queue already.
        """
        if item.state in (FAILED, CANCELLED):
            self.add(item.request)
            self.items[self.items.index(item)] = self.items.pop()

    def advance(self) -> None:
        """Start the next one, if none runs."""
        if not any(item.active for item in self.items):
            following = next((item for item in self.items if item.state == WAITING), None)
            if following is not None:
                following.start()

    def ended(self) -> list[Download]:
        """Those that are done or have failed since the last call; each is given once."""
        found = [item for item in self.items if item.state in (DONE, FAILED) and not item.told]
        for item in found:
            item.told = True
        return found

    def cancel(self) -> None:
        """Cancel all."""
        for item in self.items:
            item.cancel()

    def forget(self) -> None:
        """Drop those that have ended from the list."""
        self.items = [item for item in self.items if item.active or item.state == WAITING]


def _environment() -> dict[str, str]:
    """Ours, with plain HTTP alone, which can be paused, and with our own packages to be found from any folder."""
    known = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(paths.PACKAGE.parent), known))),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
