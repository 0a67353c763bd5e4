from __future__ import annotations

import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engines import available_engines
from engines.torch.engine import TorchEngine
from gemma_tui.runs.store import RunStore
from gemma_tui.widgets.dialogs import Question

from .conftest import Open, Opened, Size
from .terminal import ENTERED, RESTORED, Terminal, adapter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")

LONG = 100_000
AT_ONCE = 2.0
"""Seconds; what leaving may take, with a run going on."""


async def left(it: Opened) -> float:
    """Wait for the end of the app; the seconds it took."""
    began = time.monotonic()
    while it.app._running and not it.app._exit:
        assert time.monotonic() - began < 20, it.text()
        await it.pilot.pause(0.01)
    return time.monotonic() - began


async def asked(it: Opened, key: str = "q") -> None:
    await it.press(key)
    await it.until(lambda: isinstance(it.app.screen, Question), "the question")


@pytest.mark.parametrize("key", ["q", "ctrl+q", "ctrl+c"])
async def test_without_a_run_it_leaves(opened: Open, key: str) -> None:
    async with opened() as it:
        await it.press(key)
        assert await left(it) < AT_ONCE
        assert it.app.return_code == 0


@pytest.mark.parametrize(("size", "key"), [((80, 24), "q"), ((120, 40), "ctrl+q"), ((30, 8), "ctrl+c")], ids=str)
async def test_with_a_run_it_asks_and_escape_goes_back(
    opened: Open, tiny: str, corpus: Path, size: Size, key: str
) -> None:
    async with opened(size) as it:
        run = await it.started(tiny, corpus, steps=LONG)
        await asked(it, key)
        assert size[1] < 24 or it.sees(f"{run} is running.", "s save and quit", "d quit at once", "escape back")
        await it.press("escape")
        await it.until(lambda: not isinstance(it.app.screen, Question), "the screen before")
        assert it.app.session.jobs[0].run == run
        assert not it.app.session.jobs[0].control.stop.is_set()


async def test_the_palettes_quit_asks_too(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        await it.started(tiny, corpus, steps=LONG)
        await it.app.run_action("quit")
        await it.until(lambda: isinstance(it.app.screen, Question), "the question")


@pytest.mark.parametrize("paused", [False, True])
async def test_save_and_quit_leaves_in_time_with_everything_saved(
    opened: Open, tiny: str, corpus: Path, home: Path, engine_name: str, paused: bool
) -> None:
    async with opened(engine=engine_name) as it:
        run = await it.started(tiny, corpus, steps=LONG)
        if paused:
            await it.until(lambda: run in it.static("#headline"), "the headline")
            await it.press("space")
            await it.until(lambda: RunStore().run(run).state == "paused", "the pause")
        await asked(it)
        await it.press("s")
        assert await left(it) < AT_ONCE
        assert it.app.return_code == 0
        assert adapter(home, run).is_file()
        kept = RunStore().run(run)
        assert kept.state == "stopped"
        assert kept.step > 0


async def test_a_step_that_takes_long_does_not_keep_it(
    opened: Open, tiny: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, held, go_on, step = threading.Event(), threading.Event(), threading.Event(), TorchEngine.train_step

    def train_step(self: TorchEngine, *arguments: object) -> object:
        if slow.is_set():
            held.set()
            go_on.wait(30)
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchEngine, "train_step", train_step)
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=LONG)
        slow.set()
        await it.until(held.is_set, "the slow step")
        await asked(it)
        await it.press("s")
        try:
            assert await left(it) < AT_ONCE
            kept = RunStore().run(run)
            assert kept.state == "stopped"
            assert "left during a step" in kept.error
        finally:
            go_on.set()


async def test_quit_at_once_waits_for_nothing(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=LONG)
        await asked(it)
        await it.press("d")
        assert await left(it) < 0.5
        assert RunStore().run(run).step > 0


# What follows happens in a real terminal.


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """``terminal(size)``: the program in a terminal."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made: list[Terminal] = []

    def make(size: Size = (80, 24), program: str = "") -> Terminal:
        made.append(Terminal(size, program) if program else Terminal(size))
        return made[-1]

    yield make
    for terminal in made:
        terminal.close()


def program(tiny: str, corpus: Path, steps: int = LONG) -> str:
    """The app with a run that starts by itself."""
    return f"""
import sys
from gemma_tui import app
from gemma_tui.studies.training_plan import TrainingPlan
plan = TrainingPlan(model={tiny!r}, data={str(corpus)!r}, steps={steps}, batch_size=2, sequence_length=16, rank=2)
make, mount = app.GemmaTui.__init__, app.GemmaTui.on_mount
def on_mount(self):
    mount(self)
    self.set_timer(0.3, lambda: self.session.begin("training", plan))
app.GemmaTui.__init__ = lambda self: make(self, model="", engine={available_engines()[-1]!r})
app.GemmaTui.on_mount = on_mount
sys.exit(app.run())
"""


def stepping(terminal: Terminal) -> None:
    """Wait until the run has taken a step."""
    terminal.until("lora-1", "/100,000")
    store = RunStore()
    terminal.wait(lambda: store.run("lora-1").step > 0)
    store.close()


def restored(terminal: Terminal) -> None:
    assert all(mode in terminal.said for mode in ENTERED)
    after = terminal.said[terminal.said.rindex("\x1b[?1049h") :]
    for mode in RESTORED:
        on = mode[:-1] + {"l": "h", "h": "l"}[mode[-1]]
        assert terminal.said.rfind(mode) > terminal.said.rfind(on), f"{mode!r} did not come last"
    assert "Traceback" not in after
    if terminal.master >= 0 and sys.platform == "linux":
        assert termios.tcgetattr(terminal.master)[3] == terminal.before[3], "echo and line mode are as before"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_gives_the_terminal_back(terminal: Callable[..., Terminal], number: signal.Signals) -> None:
    it = terminal()
    it.until("Models", "Help")
    it.signal(number)
    assert it.ended(5) == 128 + number
    restored(it)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_during_a_run_saves_it_and_gives_the_terminal_back(
    terminal: Callable[..., Terminal], tiny: str, corpus: Path, home: Path, number: signal.Signals
) -> None:
    it = terminal(program=program(tiny, corpus))
    stepping(it)
    it.signal(number)
    assert it.ended(5) == 128 + number
    restored(it)
    assert adapter(home, "lora-1").is_file()
    assert RunStore().run("lora-1").state == "stopped"


def test_closing_the_window_saves_the_run_and_ends_the_program(
    terminal: Callable[..., Terminal], tiny: str, corpus: Path, home: Path
) -> None:
    it = terminal(program=program(tiny, corpus))
    stepping(it)
    it.hang_up()
    deadline = time.monotonic() + 8
    while it.status is None:
        pid, status = os.waitpid(it.pid, os.WNOHANG)
        if pid:
            it.status = os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert it.status == 128 + signal.SIGHUP
    assert adapter(home, "lora-1").is_file()
    assert RunStore().run("lora-1").state == "stopped"


@pytest.mark.parametrize(("key", "state"), [("s", "stopped"), ("d", "lost")])
def test_quitting_during_a_run_leaves_the_terminal_as_it_was(
    terminal: Callable[..., Terminal], tiny: str, corpus: Path, home: Path, key: str, state: str
) -> None:
    it = terminal(program=program(tiny, corpus))
    stepping(it)
    it.press("q")
    it.until("save and quit")
    it.press(key)
    assert it.ended(3 * AT_ONCE) == 0
    restored(it)
    assert RunStore().run("lora-1").state == state
    assert adapter(home, "lora-1").is_file() or key == "d"


def test_quitting_before_anything_was_loaded(terminal: Callable[..., Terminal]) -> None:
    it = terminal()
    it.until("Help")
    it.press("q")
    assert it.ended(10) == 0
    restored(it)


def test_a_crash_gives_the_terminal_back_and_is_told(terminal: Callable[..., Terminal]) -> None:
    it = terminal(
        program="import sys\nfrom gemma_tui import app\n"
        "app.GemmaTui.action_help = lambda self: 1 / 0\nsys.exit(app.run())"
    )
    it.until("Help")
    it.press("?")
    assert it.ended(10) == 1
    assert "ZeroDivisionError" in it.text()
    for mode in RESTORED:
        assert mode in it.said
