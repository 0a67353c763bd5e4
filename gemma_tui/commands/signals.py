"""Signals that ask a command to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let ^C, SIGTERM and SIGHUP come to a handler; one that is ignored stays so, as nohup has it.

    Python hears signals on the main thread; on another one nothing is changed.
    """
    wanted = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    here = threading.current_thread() is threading.main_thread()
    kept = {n: signal.signal(n, handler) for n in {*wanted} if here and signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before)
