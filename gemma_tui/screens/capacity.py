"""Capacity: sweeps over small networks, and measurements of what models have memorised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from textual.binding import Binding
from textual.events import Resize
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Static

from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.figure import Figure
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.screens import steering
from gemma_tui.screens.capacity_plans import MEASURE, CapacityPlans
from gemma_tui.screens.exporting import ask_and_export
from gemma_tui.screens.followed_run import LISTED, MEASUREMENT, SWEEP, FollowedRun, check_idle, in_words
from gemma_tui.screens.workbench import Workbench
from gemma_tui.studies.capacity.plan import CapacityPlan, cells_of
from gemma_tui.studies.capacity.sweep import extended, sweep_plan
from gemma_tui.studies.plan import Option
from gemma_tui.text import one_line
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import Field
from gemma_tui.widgets.run_table import RunTable

if TYPE_CHECKING:
    from gemma_tui.session import Job

SECONDS = 1.0
"""Between two looks at the store."""

STUDIES, JOBS = (SWEEP, MEASUREMENT), ("sweep", "measure")
"""Runs that are listed, and the kinds of the jobs that compute them."""

SIZES = Option("sizes", str, "", "numbers of strings of the cells that are added, with commas")
NOTHING = "no run yet: n plans a sweep, m measures what a model has memorised"


class CapacityScreen(Workbench):
    """The runs, the figure of one of them, and the plans of new ones as forms behind keys."""

    MODE = "capacity"
    BINDINGS = [
        Binding("n", "plan('sweep')", "Sweep", id="capacity.sweep", tooltip="Plan a capacity sweep"),
        Binding("m", "plan('measure')", "Measure", id="capacity.measure",
                tooltip="Plan a measurement of what a model has memorised"),
        Binding("s", "start", "Start", id="capacity.start", tooltip="Start what the form says"),
        Binding("p", "preset", "Preset", id="capacity.preset", tooltip="Fill the form with the next preset"),
        Binding("escape", "close", "Back", id="capacity.back", show=False, tooltip="Leave the form"),
        Binding("a", "add", "Add", id="capacity.add", show=False, tooltip="Add cells to the sweep that is shown"),
        Binding("space", "pause", "Pause", id="capacity.pause", key_display="␣", tooltip="Pause, and go on"),
        Binding("x", "stop", "Stop", id="capacity.stop", tooltip="End after the step in hand, and save"),
        Binding("u", "resume", "Resume", id="capacity.resume", show=False,
                tooltip="Go on with the run under the cursor, or the one that is shown"),
        Binding("v", "turn", "Part", id="capacity.part", tooltip="The next chart or table"),
        Binding("o", "export", "Export", id="capacity.export", show=False, tooltip="Write the figure to a file"),
    ]  # fmt: skip

    class Grown(Message):
        """A run was read."""

        def __init__(self, followed: FollowedRun, error: str) -> None:
            super().__init__()
            self.followed, self.error = followed, error

    def __init__(self) -> None:
        super().__init__()
        self.run_shown: Run | None = None
        self._followed: FollowedRun | None = None
        self._job: Job | None = None
        """What was followed last."""
        self._awaited: Job | None = None
        """The same until its run is shown, or another one."""
        self._store: RunStore | None = None

    def body(self) -> Iterable[Widget]:
        """The runs, one line on the one that is shown, its figure, and the plans, which are hidden at first."""
        yield RunTable("studies")
        yield Static(NOTHING, id="looked", markup=False)
        yield FigureView(id="figure", grabs=False)
        yield CapacityPlans()

    def on_mount(self) -> None:
        """Open the store, and look at it from now on."""
        self.query_one(RunTable).focus()
        try:
            self._store = RunStore()
        except GemmaTuiError as error:
            self.bench.tell(str(error), "error")
            return
        self.set_interval(SECONDS, self._look)
        self._look()

    def on_screen_resume(self) -> None:
        """Show at once what began elsewhere."""
        for job in self.bench.session.jobs:
            if job.kind in JOBS and job is not self._job:
                self._follow(job)
        self._look()

    def job_ended(self) -> None:
        """The last of a run is there."""
        self._look()

    def on_resize(self, event: Resize) -> None:
        """Wide and narrow show different parts."""
        self.call_after_refresh(self._figure.relayout)

    def command(self) -> str:
        """The command of the form that is open, or of the run that is shown."""
        if self.run_shown is not None and not self._plans.kind:
            return self.run_shown.command
        return self._plans.command(self.bench.session.engine)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys of a form are on while it is open, those of a run while none is."""
        kind = self._plans.kind if self.is_mounted else ""
        if action == "preset":
            return kind == "sweep"
        if action in ("start", "close"):
            return bool(kind)
        return not (kind and action in ("pause", "stop", "turn", "add", "resume", "export"))

    def action_plan(self, kind: str) -> None:
        """Open a form, or close it."""
        if kind == MEASURE and self._store is not None:
            self._plans.measure_of(self.bench.session.place.model, self._store)
        self._open("" if kind == self._plans.kind else kind)

    def action_close(self) -> None:
        """Go back to the runs."""
        self._open("")

    def action_preset(self) -> None:
        """Fill the form with the next preset, or with no one's values."""
        self._plans.turn_preset()
        self._tell()

    def action_start(self) -> None:
        """Do what the form says."""

        def begin() -> Job:
            plan, session = self._plans.plan(), self.bench.session
            return session.sweep(plan) if isinstance(plan, CapacityPlan) else session.measure(plan)

        self._begin(begin)

    def action_add(self) -> None:
        """Type sizes, and add cells of them to the sweep."""
        run = self._chosen()
        if run is None or run.study != SWEEP:
            self.bench.tell("choose a sweep to add cells to", "warning")
            return

        def typed(text: str | None) -> None:
            if text and text.strip():
                self._begin(lambda: add({"sizes": text.strip()}))

        def add(more: dict[str, str]) -> Job:
            check_idle(run, self.bench.session.engine)
            cells_of(extended(sweep_plan(run), more))
            return self.bench.session.resume_sweep(run.run_id, more)

        self.app.push_screen(Field(SIZES, ""), typed)

    def action_resume(self) -> None:
        """Go on with a run that has ended before its time."""
        session = self.bench.session

        def go_on() -> Job:
            if (run := self._chosen()) is None:
                raise UsageError("choose a run first")
            check_idle(run, session.engine)
            if run.state == "done":
                more = ": a adds cells to it" if run.study == SWEEP else ""
                raise UsageError(f"{run.run_id} is done{more}")
            return session.resume_sweep(run.run_id) if run.study == SWEEP else session.resume_measure(run.run_id)

        self._begin(go_on)

    def action_pause(self) -> None:
        """Pause the run that is shown, of whatever process, or let it go on."""
        steering.pause(self.bench, self._job_shown(), self.run_shown, self._store)

    def action_stop(self) -> None:
        """End the run that is shown after its step; it saves."""
        steering.stop(self.bench, self._job_shown(), self.run_shown, self._store)

    def action_turn(self) -> None:
        """Show the next part of the figure."""
        self._figure.turn()
        self._tell()

    def action_export(self) -> None:
        """Write the figure to a file."""
        figure = self._followed.figure if self._followed else None
        if figure is None or self.run_shown is None:
            self.bench.tell("nothing is shown yet", "warning")
        else:
            ask_and_export(self.bench, lambda: figure, f"{self.run_shown.run_id}.html")

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Open the run under the cursor."""
        if event.data_table.id == "studies" and event.row_key.value is not None:
            self._show(event.row_key.value)

    def on_capacity_screen_grown(self, message: Grown) -> None:
        """Draw what was read, if it is still what is shown."""
        if message.error:
            self.bench.tell(message.error, "warning")
        if message.followed is self._followed:
            # Under one title all along, so that the part that is seen stays.
            self._figure.show(replace(message.followed.figure or Figure(""), title=message.followed.name))
            self._tell()

    @property
    def _figure(self) -> FigureView:
        return self.query_one(FigureView)

    @property
    def _plans(self) -> CapacityPlans:
        return self.query_one(CapacityPlans)

    def _begin(self, begin: Callable[[], Job]) -> None:
        """Start something, and show its run once it is there; if it is refused, say why."""
        self.bench.attempt(lambda: self._follow(begin()))

    def _follow(self, job: Job) -> None:
        self._job = self._awaited = job
        self._open("")

    def _chosen(self) -> Run | None:
        """The run under the cursor of the list, or else the one that is shown."""
        name = self.query_one(RunTable).chosen
        with suppress(EngineError):
            return self._store.run(name) if name and self._store else self.run_shown
        return self.run_shown

    def _job_shown(self) -> Job | None:
        """The job of the run that is shown, or what is starting."""
        return self._awaited or (self.bench.session.job_of(self.run_shown.run_id) if self.run_shown else None)

    def _open(self, kind: str) -> None:
        """Show a form in place of the runs, or the runs."""
        for beside in (self._figure, self.query_one(RunTable)):
            beside.display = not kind
        self._plans.open(kind)
        if not kind:
            self.query_one(RunTable).focus()
        self.refresh_bindings()
        self._tell()

    def _show(self, name: str) -> None:
        """Show a run; one that is shown already goes on."""
        self._awaited = None
        if self._followed is None or self._followed.name != name:
            self._followed, self.run_shown = FollowedRun(name), None
            self._figure.show(Figure(name))
        self._look()
        self.query_one(RunTable).go_to(name)

    def _look(self) -> None:
        """Bring the list up to date, and let a thread read the run that is shown if it has grown."""
        store = self._store
        if store is None or not self.is_current:
            return
        if self._awaited is not None and self._awaited.run:
            self._show(self._awaited.run)
            return

        def look() -> None:
            runs, followed = store.runs(LISTED, STUDIES), self._followed
            self.query_one(RunTable).show((), runs)
            if followed is None:
                return
            self.run_shown = next((run for run in runs if run.run_id == followed.name), None)
            if self.run_shown is not None:
                followed.follow(self.run_shown, lambda error: self.post_message(self.Grown(followed, error)))

        if not self.bench.attempt(look):
            self._store = None
        self._tell()

    def _tell(self) -> None:
        """One line: the run and what is seen of it, or what is planned."""
        run, job = self.run_shown, self._awaited
        if self._plans.kind:
            line = self._plans.line
        elif job is not None:
            line = "did not start" if job.future.done() else f"starting {job.label}…"
        elif run is None:
            line = NOTHING
        else:
            line = " · ".join(part for part in (in_words(run), self._figure.place, run.error) if part)
        self.query_one("#looked", Static).update(one_line(line, 200), layout=False)
