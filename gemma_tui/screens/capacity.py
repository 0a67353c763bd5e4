"""Capacity: sweeps over small networks, what models have memorised, and which of their parts hold it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from textual.binding import Binding
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.errors import UsageError
from gemma_tui.screens.capacity_plans import MEASURE, MORE, CapacityPlans
from gemma_tui.screens.exporting import ask_and_export, write_aside
from gemma_tui.screens.followed_run import MEASUREMENT, SWEEP, WHERE, check_idle, in_words
from gemma_tui.screens.following import FollowingScreen
from gemma_tui.studies.capacity.plan import CapacityPlan, MoreCells, cells_of
from gemma_tui.studies.capacity.sweep import extended, sweep_plan
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.planting import CanaryPlan, plant_files
from gemma_tui.studies.memorization.where import WherePlan
from gemma_tui.text import one_line
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.run_table import RunTable

if TYPE_CHECKING:
    from gemma_tui.session import Job

JOBS = ("sweep", "measure", "where")
"""The kinds of the jobs that compute the runs."""

NOTHING = "enter opens a run, n plans a sweep, m measures what a model has memorised"


class CapacityScreen(FollowingScreen):
    """The runs, the figure of one of them, and the plans of new ones as forms behind keys."""

    MODE = "capacity"
    STUDIES = (SWEEP, MEASUREMENT, WHERE)
    BINDINGS = [
        Binding("n", "plan('sweep')", "Sweep", id="capacity.sweep", tooltip="Plan a capacity sweep"),
        Binding("m", "plan('measure')", "Bits", id="capacity.measure",
                tooltip="Plan a measurement of what a model has memorised"),
        Binding("w", "plan('where')", "Where", id="capacity.where",
                tooltip="Plan which parts of a measured model hold what it has memorised"),
        Binding("s", "start", "Start", id="capacity.start", tooltip="Start what the form says"),
        Binding("p", "preset", "Preset", id="capacity.preset", tooltip="Fill the form with the next preset"),
        Binding("escape", "close", "Back", id="capacity.back", show=False, tooltip="Leave the form"),
        Binding("a", "add", "Add", id="capacity.add", show=False,
                tooltip="Plan more sizes or seeds of the sweep that is shown"),
        Binding("k", "plan('canaries')", "Canaries", id="capacity.canaries", show=False,
                tooltip="Plan canaries: random strings among the rows of data, whose exposure is measured later"),
        Binding("space", "pause", "Pause", id="capacity.pause", key_display="␣", tooltip="Pause, and go on"),
        Binding("x", "stop", "Stop", id="capacity.stop", tooltip="End after the step in hand, and save"),
        Binding("u", "resume", "Resume", id="capacity.resume", show=False,
                tooltip="Go on with the run under the cursor, or the one that is shown"),
        Binding("v", "turn", "Part", id="capacity.part", tooltip="The next chart or table"),
        Binding("i", "notes", "Notes", id="capacity.notes", show=False,
                tooltip="All notes: how it was measured, against what, and warnings"),
        Binding("y", "log_axis", "Log", id="capacity.log", show=False, tooltip="Logarithmic or linear x axis"),
        Binding("o", "export", "Export", id="capacity.export", show=False, tooltip="Write the figure to a file"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._known: list[Job] = []
        """What was followed, so that it is not taken for something new."""

    def body(self) -> Iterable[Widget]:
        """The runs, one line on the one that is shown, its figure, and the plans, which are hidden at first."""
        yield RunTable("studies")
        yield Static(NOTHING, id="looked", markup=False)
        yield FigureView(id="figure", grabs=False, notes_key="i")
        yield CapacityPlans()

    def on_mount(self) -> None:
        """The keys go to the list."""
        self.query_one(RunTable).focus()

    def on_screen_resume(self) -> None:
        """Show at once what began elsewhere, even if it has ended meanwhile."""
        session = self.bench.session
        for job in (*session.jobs, session.newest):
            if job is not None and job.kind in JOBS and all(job is not known for known in self._known):
                self._follow(job)
        self._look()

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
        return not (kind and action in ("pause", "stop", "turn", "add", "resume", "log_axis", "notes", "export"))

    def action_plan(self, kind: str) -> None:
        """Open a form, or close it."""
        if kind == MEASURE and self._store is not None:
            self._plans.measure_of(self.bench.session.place.model, self._store)
        elif kind == WHERE:
            self._plans.parts_of(self._chosen())
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

        def start() -> None:
            plan, session = self._plans.plan(), self.bench.session
            match plan:
                case CapacityPlan():
                    self._follow(session.begin(SWEEP, plan))
                case MemorizationPlan():
                    self._follow(session.begin(MEASUREMENT, plan))
                case WherePlan():
                    self._follow(session.begin(WHERE, plan))
                case MoreCells():
                    self._follow(self._add(plan))
                case CanaryPlan():
                    write_aside(self.bench, lambda: plant_files(plan).told)

        self.bench.attempt(start)

    def action_add(self) -> None:
        """Plan more sizes or seeds of the sweep under the cursor, or the one that is shown."""
        run = self._chosen()
        if run is None or run.study != SWEEP:
            self.bench.tell("choose a sweep to add cells to", "warning")
            return
        self._plans.more_of(run)
        self._open(MORE)

    def action_resume(self) -> None:
        """Go on with a run that has ended before its time."""
        session = self.bench.session

        def go_on() -> Job:
            if (run := self._chosen()) is None:
                raise UsageError("choose a run first")
            if run.state == "done":
                more = ": a adds cells to it" if run.study == SWEEP else ""
                raise UsageError(f"{run.run_id} is done{more}")
            check_idle(run, session.engine)
            return session.resume(run.study, run.run_id)

        self.bench.attempt(lambda: self._follow(go_on()))

    def action_notes(self) -> None:
        """All that is said of the figure, to scroll."""
        if (figure := self._figure.figure).notes and self.run_shown is not None:
            self.app.push_screen(Reading(f"{self.run_shown.run_id}: notes", "\n\n".join(figure.notes)))
        else:
            self.bench.tell("nothing is shown yet", "warning")

    def action_log_axis(self) -> None:
        """Draw charts against a logarithmic x axis, or a linear one."""
        self._figure.switch_axis()

    def action_export(self) -> None:
        """Write the figure to a file."""
        figure = self._followed.figure if self._followed else None
        if figure is None or self.run_shown is None:
            self.bench.tell("nothing is shown yet", "warning")
        else:
            ask_and_export(self.bench, lambda: figure, f"{self.run_shown.run_id}.html")

    def _add(self, more: MoreCells) -> Job:
        """Go on with a sweep that has more cells now.

        Raises:
            EngineError: it goes on already, is another engine's, or these are no cells.
        """
        session = self.bench.session
        assert self._store is not None
        run = self._store.run(more.add)
        check_idle(run, session.engine)
        cells_of(extended(sweep_plan(run), more))
        return session.resume(SWEEP, run.run_id, more)

    @property
    def _plans(self) -> CapacityPlans:
        return self.query_one(CapacityPlans)

    def _follow(self, job: Job) -> None:
        """Show the run of a job once it is there."""
        self._known.append(job)
        self._awaited = job
        self._open("")

    def _open(self, kind: str) -> None:
        """Show a form in place of the runs, or the runs."""
        for beside in (self._figure, self.query_one(RunTable)):
            beside.display = not kind
        self._plans.open(kind)
        if not kind:
            self.query_one(RunTable).focus()
        self.refresh_bindings()
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
            words = in_words(run, self.bench.session.job_of(run.run_id))
            line = " · ".join(part for part in (words, self._figure.place, run.error) if part)
        self.query_one("#looked", Static).update(one_line(line, 200), layout=False)
