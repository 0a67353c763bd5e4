"""Training: the plan as a form, the run with its charts, and all runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import DataTable, Static

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.plots import Series
from gemma_tui.runs.matrices import Matrices
from gemma_tui.runs.processes import Detached, start
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.runs.view import RunView
from gemma_tui.screens import steering
from gemma_tui.screens.matrices import MatricesScreen
from gemma_tui.screens.run_list import RunList, first_row, what_else
from gemma_tui.screens.workbench import Workbench
from gemma_tui.studies.queueing import detached, merge_variations, method_variations
from gemma_tui.text import one_line
from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.event_log import EventLog, event_line, headline
from gemma_tui.widgets.plan_form import PlanForm
from gemma_tui.widgets.plan_pane import PlanPane
from gemma_tui.widgets.run_table import QUEUED
from gemma_tui.widgets.small_charts import SmallCharts

if TYPE_CHECKING:
    from gemma_tui.session import Job

WATCH_SECONDS = 0.4
PLAN, WATCH, RUNS = "plan", "watch", "runs"
CHARTS = 4
"""Seen at a time."""


class TrainingScreen(Workbench):
    """Plan, watch and look back; narrow terminals show one of the three, wide ones the charts beside the others."""

    MODE = "training"

    BINDINGS = [
        Binding("s", "start", "Start", id="training.start"),
        Binding("d", "detach", "Detach", id="training.detach", show=False,
                tooltip="Start as a process that outlives the app"),
        Binding("a", "enqueue", "Queue", id="training.queue", show=False, tooltip="Add to the queue, one by one"),
        Binding("f", "methods", "Four", id="training.methods", show=False,
                tooltip="Queue full, LoRA, ReLoRA and rank 1 on this data, with one rate if one is given"),
        Binding("g", "intervals", "Gaps", id="training.intervals", show=False,
                tooltip="Queue this plan merging every 1, 2, 4… steps, up to half of them"),
        Binding("space", "pause", "Pause", id="training.pause", key_display="␣", tooltip="Pause, and go on"),
        Binding("x", "stop", "Stop", id="training.stop", tooltip="End after the step in hand, and save"),
        Binding("u", "resume", "Resume", id="training.resume", show=False, tooltip="Go on with a run that has ended"),
        Binding("i", "inside", "Inside", id="training.inside", show=False, tooltip="What each matrix does"),
        Binding("v", "next_pane", "View", id="training.view", tooltip="Plan, charts, runs in turn"),
        Binding("p", "pane('plan')", "Plan", id="training.plan", show=False),
        Binding("w", "pane('watch')", "Watch", id="training.watch", show=False),
        Binding("l", "pane('runs')", "Runs", id="training.runs", show=False),
        Binding("y", "log_axis", "Log", id="training.log", show=False, tooltip="Logarithmic or linear loss"),
        Binding("t", "turn_charts", "Turn", id="training.turn", show=False,
                tooltip="What the small charts show: the run's pace, its diagnoses, what it memorised"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._pane = PLAN
        self._left = PLAN
        self._view: RunView | None = None
        self._started: Job | None = None
        self._store: RunStore | None = None
        self._detached: Detached | None = None

    def body(self) -> Iterable[Widget]:
        """The three panes."""
        watch = Vertical(
            Static("no run yet: press s to start one", id="headline", markup=False),
            Chart("loss, nats per token", id="loss"),
            SmallCharts(id="small"),
            EventLog(id="log"),
            id=WATCH,
            classes="pane",
        )
        yield Horizontal(PlanPane(self.bench.session, PLAN), RunList(RUNS), watch, classes="pane")

    def on_mount(self) -> None:
        """Open the store, and look at it from now on."""
        self._arrange()
        self.query_one(PlanForm).focus()
        try:
            self._store, queue = RunStore(), Queue()
        except GemmaTuiError as error:
            self.bench.tell(str(error), "error")
            return
        self.set_interval(WATCH_SECONDS, self._watch)
        self.query_one(RunList).open(self._store, queue)

    def on_screen_resume(self) -> None:
        """A model may have been loaded meanwhile."""
        self.query_one(PlanPane).adopt_model()

    def job_ended(self) -> None:
        """A run has measured what it needed, or a model was imported."""
        self.query_one(PlanPane).look_again()

    def on_resize(self, event: Resize) -> None:
        """Wide and narrow show different panes."""
        self.call_after_refresh(self._arrange)

    def command(self) -> str:
        """The command that runs the plan, or that made the run which is looked at."""
        if self._pane == WATCH and self._view is not None:
            return self._view.run.command
        chosen = self.query_one(RunList).command() if self._pane == RUNS else ""
        return chosen or self.query_one(PlanPane).command()

    def watch_run(self, run_id: str) -> None:
        """Show a run from its beginning."""
        store = self._store
        if store is None:
            return

        def show() -> None:
            run = store.run(run_id)
            if run.study != "training":
                self.bench.tell(what_else(run), "warning")
                return
            self._look_at(run)
            self.action_pane(WATCH)
            self._watch()

        self.bench.attempt(show)

    def _look_at(self, run: Run) -> None:
        self._view, self._started = RunView(run), None
        self.query_one(EventLog).clear()
        for chart in self.query(Chart):
            chart.show([])
            chart.redraw()
        self.query_one(SmallCharts).begin()

    def action_start(self) -> None:
        """Train as the form says."""

        def start_here() -> None:
            self._started = self.bench.session.begin("training", self.query_one(PlanPane).plan())
            self._await_run()

        self.bench.attempt(start_here)

    def action_resume(self) -> None:
        """Go on with the run that is looked at, where its newest checkpoint is."""
        name, store = self._looked_at(), self._store
        if not name or store is None:
            return

        def go_on() -> None:
            if (run := store.run(name)).study != "training":
                steering.go_on_elsewhere(self.bench, run)
                return
            self._started = self.bench.session.resume(run.study, name)
            self._await_run()

        self.bench.attempt(go_on)

    def action_detach(self) -> None:
        """Train as the form says, in a process that goes on when the app ends."""
        if self._detached is not None:
            self.bench.tell("one is starting already", "warning")
            return

        def start_elsewhere() -> None:
            self._detached = start(detached(self.bench.session.engine, self.query_one(PlanPane).plan()), "run")
            self._started = None
            self._await_run()

        self.bench.attempt(start_elsewhere)

    def action_enqueue(self) -> None:
        """Put the form's plan into the queue, and see to it that something works through that."""
        self.query_one(RunList).enqueue(lambda: [self.query_one(PlanPane).plan()])

    def action_methods(self) -> None:
        """Queue the form's plan with each of the methods that are compared, as one group."""
        pane = self.query_one(PlanPane)
        self.query_one(RunList).enqueue(lambda: method_variations(pane.plan()), "methods")

    def action_intervals(self) -> None:
        """Queue the form's plan with more and fewer steps between merges, as one group."""
        pane = self.query_one(PlanPane)
        self.query_one(RunList).enqueue(lambda: merge_variations(pane.plan()), "merges")

    def action_pause(self) -> None:
        """Pause the run that is shown, of whatever process, or let it go on."""
        steering.pause(self.bench, self._shown_job(), self._view.run if self._view else None, self._store)

    def action_stop(self) -> None:
        """End the run that is shown, or what is starting, after its step; it saves."""
        steering.stop(self.bench, self._shown_job(), self._view.run if self._view else None, self._store)

    def _await_run(self) -> None:
        """Show what is starting until its run is there."""
        self._view = None
        self.query_one("#headline", Static).update("starting…", layout=False)
        self.action_pane(WATCH)

    def action_inside(self) -> None:
        """Show what the diagnoses of the run that is looked at tell of its matrices."""
        name, store = self._looked_at(), self._store
        if not name or store is None:
            return

        def look_inside() -> None:
            if (run := store.run(name)).study != "training":
                self.bench.tell(what_else(run), "warning")
                return
            self.app.push_screen(MatricesScreen(Matrices(run), store))

        self.bench.attempt(look_inside)

    def _looked_at(self) -> str:
        """The run under the cursor, or the one that is shown; where there is none, that is told."""
        chosen = self.query_one(RunList).chosen if self._pane == RUNS else ""
        name = chosen or (self._view.run.run_id if self._view else "")
        if not name or name.startswith(QUEUED):
            self.bench.tell("choose a run first", "warning")
            return ""
        return name

    def _shown_job(self) -> Job | None:
        """The job of the run that is shown, or what is starting."""
        return self.bench.session.job_of(self._view.run.run_id) if self._view else self._started

    def action_pane(self, pane: str) -> None:
        """Show one of the panes."""
        self._pane = pane
        if pane != WATCH:
            self._left = pane
        self._arrange()
        self.query_one({PLAN: "PlanForm", RUNS: "RunList", WATCH: "EventLog"}[pane]).focus()

    def action_next_pane(self) -> None:
        """Show the pane that follows."""
        self.action_pane({PLAN: WATCH, WATCH: RUNS, RUNS: PLAN}[self._pane])

    def action_log_axis(self) -> None:
        """Switch the loss between a linear and a logarithmic axis."""
        self.query_one("#loss", Chart).toggle_log()

    def action_turn_charts(self) -> None:
        """Show other measures in the small charts."""
        if not self.query_one(SmallCharts).turn():
            text = "there are no diagnoses here: start a run with diagnose_every, or with memorization_every"
            self.bench.tell(text, "warning")

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Open the run under the cursor."""
        if event.data_table.id == RUNS and event.row_key.value is not None:
            event.stop()
            if event.row_key.value.startswith(QUEUED):
                self.bench.tell("this plan waits for its turn; delete takes it out of the queue")
            else:
                self.watch_run(event.row_key.value)

    def _arrange(self) -> None:
        wide = self.app.size.width >= 110
        for pane in (PLAN, RUNS, WATCH):
            shown = (pane in (self._left, WATCH)) if wide else pane == self._pane
            self.query_one(f"#{pane}").display = shown
        self.query_one("#small").display = self.app.size.height >= 22

    def _watch(self) -> None:
        """Read the run that is shown and draw one chart that changed; the others wait for the next time."""
        if self._store is None or not self.is_current:
            return
        self._processes(self._store)
        try:
            self._follow(self._store)
        except GemmaTuiError as error:
            self._store = None
            self.bench.tell(str(error), "error")
        stale = [chart for chart in self.query(Chart) if chart.stale and chart.is_on_screen]
        if stale:
            # In turn, but after a long step the loss first.
            recent = time.monotonic() - WATCH_SECONDS * CHARTS
            min(stale, key=lambda chart: max(recent, chart.drawn)).redraw()

    def _processes(self, store: RunStore) -> None:
        """Tell of what was started as a process of its own that it has begun, or why it has not."""
        if self._detached is None or (row := first_row(self._detached, self.bench)) is None:
            return
        process, self._detached = self._detached, None
        looks = self._view is None and self._started is None
        if row:
            run = str(row["run"])
            process.move_log(paths.runs() / run)
            self.bench.tell(f"{run} goes on by itself, also when the app ends")
            if looks:
                self.bench.attempt(lambda: self._look_at(store.run(run)))
        elif looks:
            self.query_one("#headline", Static).update("did not start", layout=False)

    def _follow(self, store: RunStore) -> None:
        if self._view is None and self._started is None and self._detached is not None:
            return  # what is starting is shown, not what else runs
        if self._view is None:
            job = self._started or self._run_of_this_app()
            if job is None or not job.run:
                self._show_start(job)
                return
            self._look_at(store.run(job.run))
        if (view := self._view) is None:
            return
        new = view.read(store)
        job = self._shown_job()
        self.query_one("#headline", Static).update(headline(view, job.passing if job else ""), layout=False)
        if lines := [line for event in view.take() if (line := event_line(event))]:
            self.query_one(EventLog).add(lines)
        if new:
            self._draw(view)

    def _run_of_this_app(self) -> Job | None:
        return next((job for job in self.bench.session.jobs if job.kind == "train" and job.run), None)

    def _show_start(self, job: Job | None) -> None:
        if job is not None:
            begins = "did not start" if job.future.done() else f"starting… {job.detail}"
            self.query_one("#headline", Static).update(one_line(begins), layout=False)

    def _draw(self, view: RunView) -> None:
        loss = [Series(label, *view.lines[m]) for m, label in _LOSSES.items() if m in view.lines]
        self.query_one("#loss", Chart).show(loss)
        self.query_one(SmallCharts).show(view)


_LOSSES = {"loss": "training", "valid_loss": "validation"}
