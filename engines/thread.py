"""One long-lived thread that owns one engine.

MLX arrays and streams belong to the thread that made them, so neither a pool nor the event loop may touch an engine:
jobs go in by a queue, numpy and plain values come out by futures.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from engines import open_engine

if TYPE_CHECKING:
    from engines.base import Engine

T = TypeVar("T")


class EngineThread:
    """Runs jobs on an engine, one after the other.

    The framework is imported on the thread, with the first job. The thread is a daemon: a job that does not look at
    its stop sign cannot keep the program from leaving.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[Engine], T]) -> Future[T]:
        """Queue a job; the future has its result, or the error it or the opening of the engine raised."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Let the thread end after the jobs in the queue."""
        self._jobs.put(None)

    def _run(self) -> None:
        engine: Engine | None = None
        while (item := self._jobs.get()) is not None:
            job, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                engine = engine or open_engine(self.name)
                result = job(engine)
            except BaseException as error:  # whatever a job raises belongs to the one who waits for it
                future.set_exception(error)
            else:
                future.set_result(result)
