"""A pseudo-terminal with the program in it, for what only a real terminal shows."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0

ENTERED = ("\x1b[?1049h", "\x1b[?25l", "\x1b[?1000h")
"""Alternate screen, hidden cursor, mouse."""

RESTORED = ("\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l", "\x1b[?1003l", "\x1b[?1006l", "\x1b[?2004l")

ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")


class Terminal:
    """The program in a terminal of a given size."""

    def __init__(self, size: tuple[int, int] = (80, 24), program: str = "import sys, gemma_tui.cli as c; c.console()"):
        self.said = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(size[0]), "LINES": str(size[1])}
            os.execv(sys.executable, [sys.executable, "-c", program])
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.before = termios.tcgetattr(self.master)
        self.status: int | None = None

    def read(self, seconds: float = 0.05) -> bool:
        """Take in what the program wrote; False once its side is closed."""
        ready, _, _ = select.select([self.master], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.said += data.decode("utf-8", "replace")
        return bool(data)

    def text(self, since: int = 0) -> str:
        """What was written, without the escape sequences; cells that did not change are not in it."""
        return ESCAPE.sub("", self.said[since:])

    def until(self, *words: str, since: int = 0) -> None:
        """Wait until all these were written."""
        self.wait(lambda: all(word in self.text(since) for word in words), str(words))

    def wait(self, condition: Callable[[], bool], what: str = "it") -> None:
        """Wait for a condition while the program goes on."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.read(), f"the program ended: {self.text()[-2000:]}"
            assert time.monotonic() < deadline, f"{what} never came: {self.text()[-2000:]}"

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, within: float = SECONDS) -> int:
        """The exit code, negative for a signal; the program has so many seconds to end."""
        deadline = time.monotonic() + within
        while self.status is None:
            self.read(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            else:
                assert time.monotonic() < deadline, f"still there after {within} s: {self.text()[-500:]}"
        for _ in range(100):
            if not self.read(0.01):
                break
        return self.status

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        if self.master >= 0:
            os.close(self.master)
            self.master = -1

    def hang_up(self) -> None:
        """Close the terminal's window."""
        os.close(self.master)
        self.master = -1


def adapter(home: Path, run: str) -> Path:
    return home / "runs" / run / "adapter" / "adapter_model.safetensors"
