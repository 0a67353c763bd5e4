"""The app: five screens on the keys 1 to 5, one session with two engines, and what all of them share.

No engine, no numpy and no plot is imported before the first frame.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.dom import DOMNode
from textual.screen import Screen

from engines.errors import EngineError
from engines.memory import is_out_of_memory
from gemma_tui.screens.workbench import AFTER_FIRST_FRAME, Workbench
from gemma_tui.session import Job, Session
from gemma_tui.text import clean, one_line
from gemma_tui.widgets.dialogs import Question, Reading
from gemma_tui.widgets.status import StatusLine, describe

if TYPE_CHECKING:
    from gemma_tui.hub.downloads import Downloads

QUIT_SECONDS = 1.5
"""How long leaving waits for a step in hand; with what the terminal takes it stays under two seconds."""

GOES_ON = {
    "study": "y with its name",
    "sweep": "u on the capacity screen",
    "measure": "u on the capacity screen",
    "where": "u on the capacity screen",
    "curve": "u among the curves of the generation screen",
    "bench": "u among the benchmarks of the models screen",
}
"""Jobs that are runs beside training, and the key that goes on with one that was stopped."""

LATER = (
    "screens.training", "screens.generation", "screens.attention", "screens.capacity", "studies.forecast",
    "screens.model_figures", "studies.fitting", "studies.architecture", "studies.weights", "screens.bench",
    "screens.conversion",
)  # fmt: skip
"""Modules that are imported once the first frame is there: on the event loop it would be felt."""

HUNG_UP = 129
STDIN = 0

SWITCH_INTERVAL = 0.001
"""Seconds after which a thread that computes in Python must let the screen go on."""


def _models() -> Screen[None]:
    from gemma_tui.screens.models import ModelsScreen

    return ModelsScreen()


def _training() -> Screen[None]:
    from gemma_tui.screens.training import TrainingScreen

    return TrainingScreen()


def _capacity() -> Screen[None]:
    from gemma_tui.screens.capacity import CapacityScreen

    return CapacityScreen()


def _attention() -> Screen[None]:
    from gemma_tui.screens.attention import AttentionScreen

    return AttentionScreen()


def _generation() -> Screen[None]:
    from gemma_tui.screens.generation import GenerationScreen

    return GenerationScreen()


class GemmaTui(App[None]):
    """The workbench.

    Args:
        model: what is loaded first; nothing if empty.
    """

    TITLE = "gemma-tui"
    MODES = {
        "models": _models,
        "training": _training,
        "capacity": _capacity,
        "attention": _attention,
        "generation": _generation,
    }
    DEFAULT_MODE = "models"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-low"), (30, "-high")]
    CSS_PATH = "app.tcss"
    BINDINGS = [
        Binding("1", "switch_mode('models')", "Models", id="app.models", show=False),
        Binding("2", "switch_mode('training')", "Training", id="app.training", show=False),
        Binding("3", "switch_mode('capacity')", "Capacity", id="app.capacity", show=False),
        Binding("4", "switch_mode('attention')", "Attention", id="app.attention", show=False),
        Binding("5", "switch_mode('generation')", "Generation", id="app.generation", show=False),
        Binding("e", "switch_engine", "Engine", id="app.engine", tooltip="Switch between torch and MLX"),
        Binding("c", "show_command", "Cmd", id="app.command", tooltip="Show and copy the command that does this"),
        Binding("f1,question_mark", "help", "Help", id="app.help", key_display="?"),
        Binding("ctrl+p", "command_palette", "Palette", id="app.palette", show=False),
        Binding("ctrl+q,q", "leave", "Quit", id="app.quit", key_display="q", priority=False),
        Binding("ctrl+c", "leave", "Quit", id="app.interrupt", show=False),
    ]

    def __init__(self, model: str = "nano", engine: str = "auto") -> None:
        super().__init__()
        self.session = Session(engine)
        self.first_model = model
        self.downloads: Downloads | None = None
        """What is fetched from the hub; made when the first is asked for."""
        self._leaving = False

    def on_mount(self) -> None:
        """Start watching the session, after the first frame."""
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            try:
                asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)
            except (NotImplementedError, RuntimeError, ValueError):
                break  # not on this platform, or not the main thread
        self.set_interval(0.1, self._watch)
        if self.first_model:
            self.set_timer(AFTER_FIRST_FRAME, lambda: self.load(self.first_model))
        self.set_timer(AFTER_FIRST_FRAME, self._import_screens)

    def attempt(self, action: Callable[[], object]) -> bool:
        """Do something; if it is refused, say why. Returns whether it was done."""
        try:
            action()
        except EngineError as error:
            self.tell(str(error), "warning")
            return False
        return True

    def tell(self, text: str, severity: str = "information") -> None:
        """A short message, cleaned."""
        self.notify(one_line(text, 300), severity=severity, markup=False)  # type: ignore[arg-type]

    def load(self, name: str) -> bool:
        """Load a model on the chosen engine."""
        return self.attempt(lambda: self.session.load(name))

    def fetch(self, repo: str, include: tuple[str, ...] = ()) -> None:
        """Queue a download; ``include`` are patterns of files beside the usual ones.

        Raises:
            GemmaTuiError: it is queued already.
        """
        from gemma_tui.hub.downloads import Downloads
        from gemma_tui.hub.fetching import Request

        if self.downloads is None:
            self.downloads = Downloads()
        self.downloads.add(Request(repo, include=include))

    def action_switch_engine(self) -> None:
        """Choose the other engine."""
        self.attempt(lambda: self.tell(self.session.switch()))

    def action_show_command(self) -> None:
        """Show the command that does what the screen is set to, and copy it."""
        screen = self.screen
        if isinstance(screen, Workbench):
            text = clean(screen.command())  # a shell obeys what it is pasted
            self.copy_to_clipboard(text)
            self.push_screen(Reading("the same as a command (copied)", text))

    def action_help(self) -> None:
        """All keys that work here."""
        if not isinstance(self.screen, Workbench):
            return
        ours: dict[str, str] = {}
        other: dict[str, str] = {}
        for _, binding, enabled, tooltip in self.screen.active_bindings.values():
            if enabled and binding.description:
                key = binding.key_display or self.get_key_display(binding)
                meaning = tooltip or binding.tooltip or binding.description
                (ours if binding.id else other).setdefault(key, meaning)
        width = max(map(len, ours | other))
        lines = [f"{key:>{width}}  {text}" for part in (ours, {"": ""}, other) for key, text in part.items()]
        self.push_screen(Reading(f"{self.current_mode}: keys", "\n".join(lines)))

    async def action_quit(self) -> None:
        """What Textual calls by itself; it must not pass over the question."""
        await self.action_leave()

    async def action_leave(self) -> None:
        """Quit; with a run going on, ask first."""
        training = [job for job in self.session.jobs if job.kind in ("train", *GOES_ON)]
        fetching = [item for item in self.downloads.items if item.active] if self.downloads is not None else []
        if not (training or fetching) or isinstance(self.screen, Question):
            self._leave()
            return
        if not training:
            waiting = sum(item.state == "waiting" for item in self.downloads.items) if self.downloads is not None else 0
            text = f"{fetching[0].request.repo} is being fetched{f', {waiting} more in the queue' if waiting else ''}."
            self.push_screen(Question(text, {"s": "stop it and quit; finished files are kept"}), self._answered)
            return
        answers = {"s": "save and quit", "d": "quit at once; finished steps and the last save stay"}
        self.push_screen(Question(f"{training[0].label} is running.", answers), self._answered)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: every action of ours that has a key, and what Textual has besides."""
        offered = set()
        for node, binding, enabled, _ in screen.active_bindings.values():
            if enabled and binding.id and binding.description not in offered and binding.id != "app.palette":
                offered.add(binding.description)

                async def act(action: str = binding.action, node: DOMNode = node) -> None:
                    await self.run_action(action, node)

                yield SystemCommand(binding.description, binding.tooltip or f"key {binding.key}", act)
        for command in super().get_system_commands(screen):
            if command.title not in offered:
                yield command

    def _import_screens(self) -> None:
        """Import what the other screens need before a key asks for it."""

        def imports() -> None:
            for name in LATER:
                importlib.import_module(f"gemma_tui.{name}")

        threading.Thread(target=imports, daemon=True).start()  # no worker: leaving would wait for one

    def _watch(self) -> None:
        if not self.screen_stack:
            return  # the app is closing
        for job in self.session.finished():
            self._ended(job)
        status = describe(self.session)
        for line in self.screen.query(StatusLine):
            line.text = status

    def _ended(self, job: Job) -> None:
        if isinstance(self.screen, Workbench):
            self.screen.job_ended()
        error = job.future.exception()
        if error is not None:
            text = str(error) if isinstance(error, EngineError) else _fault(error)
            self.tell(text, "error")
        elif job.kind == "train":
            self.tell(f"{job.run} has ended and is saved; the tuned model is loaded")
        elif job.kind in GOES_ON:
            again = f"; {GOES_ON[job.kind]}, or `gemma-tui runs resume {job.run}`, goes on with it"
            stopped = again if job.control.stop.is_set() else ""
            self.tell(f"{job.run} has ended and is kept{stopped}")
        elif job.kind == "convert":
            self.tell(job.detail)

    def _answered(self, answer: str | None) -> None:
        if answer == "s":
            self._leave()
        elif answer == "d":
            self.exit()

    def _leave(self, code: int = 0) -> None:
        """Ask everything to stop, wait for the step in hand as long as one may, and go."""
        if self._leaving:
            return
        self._leaving = True
        self.session.stop()
        if self.downloads is not None:
            self.downloads.cancel()
        deadline = time.monotonic() + QUIT_SECONDS

        def wait() -> None:
            self.session.finished()
            if not self.session.jobs or time.monotonic() > deadline:
                self._close_runs()
                self.exit(return_code=code)

        self.set_interval(0.02, wait)

    def _close_runs(self) -> None:
        """Runs whose step could not be waited for: their steps are kept, and their state says what happened."""
        unfinished = [job for job in self.session.jobs if job.run]
        if unfinished:
            from gemma_tui.runs.store import RunStore

            store = RunStore()
            for job in unfinished:
                if store.run(job.run).active:
                    store.set_state(job.run, "stopped", "left during a step; the last save holds the steps before")
            store.close()

    def _signalled(self, number: int) -> None:
        self._leave(128 + number)


def _fault(error: BaseException) -> str:
    """A line for an error that no one foresaw; out of memory is the one that has a remedy."""
    if is_out_of_memory(error):
        return "not enough memory: choose a smaller model, batch or sequence length"
    return f"{type(error).__name__}: {error}; please report this"


def _watch_terminal(session: Session) -> None:
    """End the program when its terminal is gone; Textual would wait for it for ever, and read it at full speed."""
    while os.isatty(STDIN):
        time.sleep(1)
    session.stop()
    deadline = time.monotonic() + QUIT_SECONDS
    while session.jobs and time.monotonic() < deadline:
        session.finished()
        time.sleep(0.05)
    os._exit(HUNG_UP)


def run() -> int:
    """Run the app in this terminal; returns the exit code."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    app = GemmaTui()
    threading.Thread(target=_watch_terminal, args=(app.session,), daemon=True).start()
    app.run()
    code = app.return_code or 0
    if app.session.jobs:
        # The interpreter would wait for an engine in the middle of a step; what there was to save is saved.
        sys.stdout.flush()
        os._exit(code)
    return code
