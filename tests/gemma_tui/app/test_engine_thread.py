from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

import engines.thread
from engines.errors import UnsupportedError
from engines.thread import EngineThread

SECONDS = 10


class Nothing:
    """An engine that only knows where it was made."""

    opened: list[int] = []

    def __init__(self) -> None:
        self.opened.append(threading.get_ident())


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineThread]:
    monkeypatch.setattr(Nothing, "opened", [])
    monkeypatch.setattr(engines.thread, "open_engine", lambda name: Nothing())
    thread = EngineThread("nothing")
    yield thread
    thread.close()
    thread._thread.join(SECONDS)
    assert not thread._thread.is_alive()


def test_all_jobs_run_on_one_thread_which_is_not_the_callers(thread: EngineThread) -> None:
    idents = {thread.submit(lambda engine: threading.get_ident()).result(SECONDS) for _ in range(20)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    assert Nothing.opened == list(idents), "the engine is made once, and there"


def test_jobs_run_in_order_and_one_at_a_time(thread: EngineThread) -> None:
    running, order = threading.Lock(), []

    def job(number: int) -> int:
        assert running.acquire(blocking=False)
        time.sleep(0.001)
        order.append(number)
        running.release()
        return number

    futures = [thread.submit(lambda engine, n=n: job(n)) for n in range(50)]
    assert [f.result(SECONDS) for f in futures] == list(range(50)) == order


def test_every_job_gets_the_same_engine(thread: EngineThread) -> None:
    first, second = (thread.submit(lambda engine: engine).result(SECONDS) for _ in range(2))
    assert first is second


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), MemoryError()], ids=repr)
def test_an_error_goes_to_the_one_who_waits_and_the_thread_goes_on(thread: EngineThread, error: BaseException) -> None:
    def fail(engine: object) -> None:
        raise error

    future = thread.submit(fail)
    assert future.exception(SECONDS) is error
    assert thread.submit(lambda engine: 7).result(SECONDS) == 7


def test_a_cancelled_job_is_left_out(thread: EngineThread) -> None:
    gate, done = threading.Event(), []
    thread.submit(lambda engine: gate.wait(SECONDS))
    cancelled = thread.submit(lambda engine: done.append(1))
    assert cancelled.cancel()
    gate.set()
    thread.submit(lambda engine: None).result(SECONDS)
    assert not done


def test_an_engine_that_does_not_open_is_tried_again_with_the_next_job(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise UnsupportedError(f"engine {name} is not installed here")

    with monkeypatch.context() as patch:
        patch.setattr(engines.thread, "open_engine", missing)
        with pytest.raises(UnsupportedError, match="nothing is not installed"):
            thread.submit(lambda engine: 1).result(SECONDS)
    assert thread.submit(lambda engine: 1).result(SECONDS) == 1


def test_closing_lets_the_queue_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.thread, "open_engine", lambda name: Nothing())
    thread = EngineThread("nothing")
    gate = threading.Event()
    futures = [thread.submit(lambda engine: gate.wait(SECONDS)) for _ in range(3)]
    thread.close()
    gate.set()
    assert all(f.result(SECONDS) for f in futures)
    thread._thread.join(SECONDS)
    assert not thread._thread.is_alive()


def test_the_thread_does_not_keep_the_program(thread: EngineThread) -> None:
    assert thread._thread.daemon
    assert thread._thread.name == "engine-nothing"
    assert not Nothing.opened, "nothing is opened before the first job"
