"""From a key to the screen, idle and while a run trains beside four live charts (Training screen, 120 x 40).

python -m tests.benchmarks.latency [KEYS]
"""

from __future__ import annotations

import fcntl
import os
import pty
import random
import select
import signal
import statistics
import struct
import sys
import tempfile
import termios
import time

from tests.benchmarks.measure import machine

DOWN, UP = b"\x1b[B", b"\x1b[A"
FIRST_ROW, SECOND_ROW = b"model: a name", b"text: .jsonl"


class Terminal:
    """The app in a pseudo-terminal of 120 by 40."""

    def __init__(self) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, [sys.executable, "-m", "gemma_tui"])
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self.file, keys)

    def type(self, *keys: bytes) -> None:
        """Press keys as a person does, one after the other: Textual may handle a burst out of order."""
        for key in keys:
            self.press(key)
            self.drain(0.15)

    def until(self, mark: bytes, seconds: float = 30) -> float:
        """Read until ``mark`` is drawn; returns how long that took."""
        began, seen = time.perf_counter(), b""
        while mark not in seen:
            if time.perf_counter() - began > seconds:
                sys.exit(f"{mark!r} was not drawn within {seconds} s")
            if select.select([self.file], [], [], 0.2)[0]:
                seen += os.read(self.file, 65536)
        return time.perf_counter() - began

    def drain(self, seconds: float) -> None:
        """Read what comes for a while."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if select.select([self.file], [], [], left)[0]:
                os.read(self.file, 65536)

    def close(self) -> None:
        """End the app."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def latencies(terminal: Terminal, keys: int) -> list[float]:
    """Seconds from an arrow key to the changed line that explains the row."""
    found = []
    for index in range(keys):
        key, mark = (DOWN, SECOND_ROW) if index % 2 == 0 else (UP, FIRST_ROW)
        terminal.press(key)
        found.append(terminal.until(mark))
        terminal.drain(random.uniform(0.03, 0.2))  # not in step with the charts
    return found


def main(keys: int) -> None:
    """Idle first, then with a run."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEMMA_TUI_HOME"] = folder
        terminal = Terminal()
        terminal.until(b"parameters")
        terminal.press(b"2")
        terminal.until(FIRST_ROW)
        terminal.drain(1)
        idle = latencies(terminal, keys)
        terminal.type(*[DOWN] * 6, b"\r", *[b"\x7f"] * 3, *(bytes([digit]) for digit in b"5000"), b"\r", b"s")
        terminal.until(b" left", 60)
        terminal.drain(5)
        terminal.type(b"p", *[UP] * 6)
        terminal.drain(1)
        training = latencies(terminal, keys)
        terminal.close()
    print(f"key to screen\n  {machine()}, {keys} keys each")
    for name, values in (("idle", idle), ("training", training)):
        middle, late = statistics.median(values) * 1000, statistics.quantiles(values, n=20)[-1] * 1000
        print(f"  {name}: median {middle:.1f} ms, p95 {late:.1f} ms, max {max(values) * 1000:.1f} ms")
    p95 = [statistics.quantiles(v, n=20)[-1] for v in (training, idle)]
    print(f"  ratio of p95, training / idle: {p95[0] / p95[1]:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
