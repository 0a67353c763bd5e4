"""From starting the process to the first frame on the terminal, against a Textual app that does nothing.

python -m tests.benchmarks.first_frame [ROUNDS]
"""

from __future__ import annotations

import os
import pty
import select
import signal
import statistics
import sys
import tempfile
import time

from tests.benchmarks.measure import machine

MINIMAL = """
from textual.app import App
from textual.widgets import Static
class Minimal(App):
    def compose(self):
        yield Static("READY-MARK")
Minimal().run()
"""


def first_frame(arguments: list[str], mark: bytes) -> float:
    """Seconds until ``mark`` is on the terminal; the process is ended then."""
    began = time.perf_counter()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, *arguments])
    seen = b""
    while mark not in seen:
        if select.select([terminal], [], [], 20)[0]:
            seen += os.read(terminal, 65536)
    seconds = time.perf_counter() - began
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    return seconds


def main(rounds: int) -> None:
    """Both in turn."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEMMA_TUI_HOME"] = folder
        pairs = [
            (first_frame(["-m", "gemma_tui"], b"Models"), first_frame(["-c", MINIMAL], b"READY-MARK"))
            for _ in range(rounds + 1)
        ][1:]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"first frame\n  {machine()}, {rounds} rounds in turn")
    print(f"  gemma-tui {ours * 1000:.0f} ms, minimal Textual app {theirs * 1000:.0f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
