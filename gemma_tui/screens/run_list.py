"""The runs and the queue as a list, and what can be done with those in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from textual.binding import Binding

from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs.comparison import Comparison
from gemma_tui.runs.processes import Detached
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.screens.comparison import ComparisonScreen
from gemma_tui.studies.plan import command
from gemma_tui.studies.queueing import enqueue, plan_of, start_runner
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.widgets.run_table import QUEUED, RunTable

if TYPE_CHECKING:
    from gemma_tui.app import GemmaTui

LIST_SECONDS = 2.0
LISTED = 200


class RunList(RunTable):
    """What is queued, and the runs; enter opens one, m marks, o compares what is marked or a group, delete cancels."""

    BINDINGS = [
        Binding("m", "mark", "Mark", id="runs.mark", tooltip="Mark the run for a comparison, or take it out"),
        Binding("o", "overlay", "Over", id="runs.overlay",
                tooltip="Compare the runs that are marked, or else the group under the cursor"),
        Binding("delete,backspace", "cancel", "Cancel", id="runs.cancel", show=False,
                tooltip="Take the plan out of the queue"),
    ]  # fmt: skip

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self._store: RunStore | None = None
        self._queue: Queue | None = None
        self._runner: Detached | None = None
        self._marked = Comparison()

    @property
    def bench(self) -> GemmaTui:
        """The app, by its own type."""
        return cast("GemmaTui", self.app)

    def open(self, store: RunStore, queue: Queue) -> None:
        """List what is in them, from now on."""
        self._store, self._queue = store, queue
        self.set_interval(LIST_SECONDS, self.look)
        self.look()

    def look(self) -> None:
        """Bring the list up to date."""
        store, queue = self._store, self._queue
        if store is None or queue is None or not self.screen.is_current:
            return
        if self._runner is not None and first_row(self._runner, self.bench) is not None:
            self._runner = None

        def show() -> None:
            runs = store.runs(LISTED)
            self.show(queue.queued(), runs, {run.run_id for run in runs if run.run_id in self._marked})

        self.bench.attempt(show)

    def command(self) -> str:
        """The command of the run or plan under the cursor; nothing if there is none."""
        key, store, queue = self.chosen, self._store, self._queue
        if not key or store is None or queue is None:
            return ""
        try:
            if not key.startswith(QUEUED):
                return store.run(key).command
            item = queue.item(int(key.removeprefix(QUEUED)))
            return command(("train", "--engine", item.engine), plan_of(item))
        except GemmaTuiError:
            return ""

    def enqueue(self, plans: Callable[[], Sequence[TrainingPlan]], group: str = "") -> None:
        """Put plans into the queue, and see to it that something works through that.

        Args:
            plans: makes them; where it refuses, that is told.
            group: what the runs are to share, with a number behind it if it is taken.
        """
        queue = self._queue
        if queue is None:
            return

        def add() -> None:
            made = plans()
            shared = queue.free_group(made[0].group or group) if group else ""
            numbers = enqueue(queue, made, self.bench.session.engine, shared)
            several = f"plans {numbers[0]} to {numbers[-1]}, group {shared}; o on one of its runs compares them"
            text = f"queued as {several if group else f'plan {numbers[0]}'}"
            if self._runner is None and queue.leader() is None:
                self._runner = start_runner()
                text += "; a process that works through the queue was started, and goes on when the app ends"
            self.bench.tell(text)
            self.look()

        self.bench.attempt(add)

    def action_mark(self) -> None:
        """Mark the run under the cursor for a comparison, or take it out."""
        key, store = self.chosen, self._store
        if not key or key.startswith(QUEUED) or store is None:
            self.bench.tell("choose a run to mark", "warning")
            return

        def mark() -> None:
            if key in self._marked:
                self._marked.remove(key)
            elif (run := store.run(key)).study != "training":
                self.bench.tell(what_else(run), "warning")
            else:
                self._marked.add(run)
            self.look()

        self.bench.attempt(mark)

    def action_overlay(self) -> None:
        """Compare the runs that are marked; where none is, those of the group that the run under the cursor is of."""
        store = self._store
        if store is None:
            return

        def overlay() -> None:
            compared = self._marked if self._marked.runs else Comparison(self._group_under_cursor(store))
            if len(compared.runs) < 2:
                self.bench.tell("mark two runs or more with m, or choose one whose group has several", "warning")
            else:
                self.app.push_screen(ComparisonScreen(compared, store))

        self.bench.attempt(overlay)

    def _group_under_cursor(self, store: RunStore) -> Sequence[Run]:
        """The runs that share the group of the run or plan under the cursor."""
        key, queue = self.chosen, self._queue
        if not key or queue is None:
            return ()
        waits = key.startswith(QUEUED)
        group = queue.item(int(key.removeprefix(QUEUED))).group if waits else store.run(key).group
        return store.group(group) if group else ()

    def action_cancel(self) -> None:
        """Take the plan under the cursor out of the queue."""
        key, queue = self.chosen, self._queue
        if queue is None or not key.startswith(QUEUED):
            self.bench.tell("only a queued plan can be cancelled; x stops the run that is shown", "warning")
            return

        def take_out() -> None:
            item = queue.cancel(int(key.removeprefix(QUEUED)))
            begins = "is beginning: x stops its run" if item.state == "running" else f"is {item.state}"
            self.bench.tell(f"plan {item.id} {begins}")
            self.look()

        self.bench.attempt(take_out)


def what_else(run: Run) -> str:
    """What a run is that is no training run, and what can be done with it."""
    resumed = f"`gemma-tui runs resume {run.run_id}` goes on with it or prints it"
    known = {
        "heads": ("study of heads over texts", "u in the list goes on with it and shows it"),
        "memorization": ("measurement of memorization", "press 3, where it is listed"),
        "where": ("study of which parts hold what was memorised", resumed),
        "curve": ("speed-quality curve of block decoding", "press 5, then k, where it is listed"),
        "bench": ("benchmark of both engines", "press 1, then b, where it is listed"),
        "capacity": ("capacity sweep", "press 3, where it is listed"),
    }
    kind, again = known.get(run.study, (run.study, f"`gemma-tui runs show {run.run_id}` tells of it"))
    return f"{run.run_id} is a {kind}, no training run: {again}"


def first_row(process: Detached, bench: GemmaTui) -> Mapping[str, Any] | None:
    """What a process began with; nothing in it if it did not, which is told; None while that is open."""
    try:
        return process.look()
    except EngineError as error:
        bench.tell(str(error), "error")
        return {}
