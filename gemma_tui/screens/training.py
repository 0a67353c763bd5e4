"""Training: the plan as a form, the run with its charts, and all runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import DataTable, RichLog, Static

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.output import age
from gemma_tui.plots import Series
from gemma_tui.runs.comparison import Comparison
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.runs.view import RunView
from gemma_tui.screens.comparison import ComparisonScreen
from gemma_tui.screens.workbench import Workbench
from gemma_tui.studies.plan import build, command
from gemma_tui.studies.training import TrainingPlan, settings
from gemma_tui.text import one_line
from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.plan_form import PlanForm
from gemma_tui.widgets.status import bar, duration

if TYPE_CHECKING:
    from gemma_tui.session import Job

WATCH_SECONDS = 0.4
LIST_SECONDS = 2.0
PLAN, WATCH, RUNS = "plan", "watch", "runs"
MARK = "● "
SMALL = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}


class RunTable(DataTable[Text]):
    """The runs; enter opens one, m marks those that o compares."""

    BINDINGS = [
        Binding("enter", "select_cursor", "Open", id="runs.open"),
        Binding("m", "screen.mark", "Mark", id="runs.mark", tooltip="Mark the run for a comparison, or take it out"),
        Binding("space", "screen.mark", "Mark", id="runs.pin", show=False, tooltip="Mark the run, as m does"),
        Binding("o", "screen.overlay", "Over", id="runs.overlay", tooltip="Compare the runs that are marked"),
    ]


class TrainingScreen(Workbench):
    """Plan, watch and look back; narrow terminals show one of the three, wide ones the charts beside the others."""

    MODE = "training"

    BINDINGS = [
        Binding("s", "start", "Start", id="training.start"),
        Binding("space", "pause", "Pause", id="training.pause", tooltip="Pause, and go on"),
        Binding("x", "stop", "Stop", id="training.stop", tooltip="End after the step in hand, and save"),
        Binding("v", "next_pane", "View", id="training.view", tooltip="Plan, charts, runs in turn"),
        Binding("p", "pane('plan')", "Plan", id="training.plan", show=False),
        Binding("w", "pane('watch')", "Watch", id="training.watch", show=False),
        Binding("l", "pane('runs')", "Runs", id="training.runs", show=False),
        Binding("y", "log_axis", "Log", id="training.log", show=False, tooltip="Logarithmic or linear loss"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._pane = PLAN
        self._left = PLAN
        self._view: RunView | None = None
        self._started: Job | None = None
        self._adopted = "nano"
        self._store: RunStore | None = None
        self._listed: list[tuple[str, ...]] = []
        self._marked = Comparison()

    def body(self) -> Iterable[Widget]:
        """The three panes."""
        form = PlanForm(TrainingPlan)
        self._adopted = form.values["model"] = self.bench.session.place.model or "nano"
        form.values["data"] = _sample_data()
        runs = RunTable(id=RUNS, cursor_type="row", classes="pane")
        charts = [Chart(title, id=measure) for measure, title in SMALL.items()]
        watch = Vertical(
            Static("no run yet: press s to start one", id="headline", markup=False),
            Chart("loss, nats per token", id="loss"),
            Horizontal(*charts, id="small"),
            RichLog(id="log", max_lines=500, wrap=True),
            id=WATCH,
            classes="pane",
        )
        plan = Vertical(form, Static("", id="explained", markup=False), id=PLAN, classes="pane")
        yield Horizontal(plan, runs, watch, classes="pane")

    def on_mount(self) -> None:
        """Open the store, and look at it from now on."""
        self.query_one(f"#{RUNS}", DataTable).add_columns("run", "state", "engine", "step", "method", "age")
        self._arrange()
        self.query_one(PlanForm).focus()
        try:
            self._store = RunStore()
        except GemmaTuiError as error:
            self.bench.tell(str(error), "error")
            return
        self.set_interval(WATCH_SECONDS, self._watch)
        self.set_interval(LIST_SECONDS, self._list)
        self._list()

    def on_screen_resume(self) -> None:
        """The model that was loaded meanwhile becomes the form's, unless one was typed.

        A run's adapter does not: another one cannot be trained on it, so its base stays.
        """
        form = self.query_one(PlanForm)
        loaded = self.bench.session.place.model
        if loaded and form.is_mounted and form.values["model"] == self._adopted and not _is_adapter(loaded):
            self._adopted = loaded
            form.set("model", loaded)

    def on_resize(self, event: Resize) -> None:
        """Wide and narrow show different panes."""
        self.call_after_refresh(self._arrange)

    def command(self) -> str:
        """The command that runs the plan, or that made the run which is looked at."""
        if self._pane == WATCH and self._view is not None:
            return self._view.run.command
        if self._pane == RUNS and (run := self._chosen_run()) is not None:
            return run.command
        form = self.query_one(PlanForm)
        plan = TrainingPlan(**form.values)
        return command(("train", "--engine", self.bench.session.engine), plan)

    def watch_run(self, run_id: str) -> None:
        """Show a run from its beginning."""
        store = self._store
        if store is None:
            return

        def show() -> None:
            self._view, self._started = RunView(store.run(run_id)), None
            self.query_one(RichLog).clear()
            self.action_pane(WATCH)
            self._watch()

        self.bench.attempt(show)

    def action_start(self) -> None:
        """Train as the form says."""
        form = self.query_one(PlanForm)

        def start() -> None:
            plan = build(TrainingPlan, {k: v for k, v in form.values.items() if v is not None}, "form")
            settings(plan)
            self._started = self.bench.session.train(plan)
            self._view = None
            self.query_one("#headline", Static).update("starting…", layout=False)
            self.action_pane(WATCH)

        self.bench.attempt(start)

    def action_pause(self) -> None:
        """Pause the run that is shown, or let it go on."""
        job = self._shown_job()
        if job is None or job.future.done():
            self.bench.tell("no run of this app is shown", "warning")
        elif job.control.pause.is_set():
            job.control.pause.clear()
        else:
            job.control.pause.set()

    def action_stop(self) -> None:
        """End the run that is shown, or what is starting, after its step; it saves."""
        view, store, job = self._view, self._store, self._shown_job()
        if job is not None and not job.future.done():
            job.control.stop.set()
            self.bench.tell(f"{job.label} ends after this step and saves")
        elif view is not None and view.run.active and store is not None:
            if self.bench.attempt(lambda: store.request(view.run.run_id, "stop")):
                self.bench.tell(f"{view.run.run_id} was asked to stop")
        else:
            self.bench.tell("no run that goes on is shown", "warning")

    def action_mark(self) -> None:
        """Mark the run under the cursor for a comparison, or take it out."""

        def mark() -> None:
            run = self._chosen_run()
            if run is None:
                return
            if run.run_id in self._marked:
                self._marked.remove(run.run_id)
            else:
                self._marked.add(run)
            self._list()

        self.bench.attempt(mark)

    def action_overlay(self) -> None:
        """Compare the runs that are marked."""
        if len(self._marked.runs) < 2:
            self.bench.tell("mark two runs or more with m", "warning")
        elif self._store is not None:
            self.app.push_screen(ComparisonScreen(self._marked, self._store))

    def _chosen_run(self) -> Run | None:
        table = self.query_one(RunTable)
        if self._store is None or not table.row_count:
            return None
        return self._store.run(str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value))

    def _shown_job(self) -> Job | None:
        """The job of the run that is shown, or what is starting."""
        return self.bench.session.job_of(self._view.run.run_id) if self._view else self._started

    def action_pane(self, pane: str) -> None:
        """Show one of the panes."""
        self._pane = pane
        if pane != WATCH:
            self._left = pane
        self._arrange()
        self.query_one({PLAN: "PlanForm", RUNS: "RunTable", WATCH: "RichLog"}[pane]).focus()

    def action_next_pane(self) -> None:
        """Show the pane that follows."""
        self.action_pane({PLAN: WATCH, WATCH: RUNS, RUNS: PLAN}[self._pane])

    def action_log_axis(self) -> None:
        """Switch the loss between a linear and a logarithmic axis."""
        self.query_one("#loss", Chart).toggle_log()

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Open the run under the cursor."""
        if event.data_table.id == RUNS and event.row_key.value is not None:
            event.stop()
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
        try:
            self._follow(self._store)
        except GemmaTuiError as error:
            self._store = None
            self.bench.tell(str(error), "error")
        stale = [chart for chart in self.query(Chart) if chart.stale and chart.is_on_screen]
        if stale:
            min(stale, key=lambda chart: chart.drawn).redraw()

    def _follow(self, store: RunStore) -> None:
        if self._view is None:
            job = self._started or next((job for job in self.bench.session.jobs if job.run), None)
            if job is None or not job.run:
                self._show_start(job)
                return
            self._view = RunView(store.run(job.run))
            self.query_one(RichLog).clear()
        view = self._view
        new = view.read(store)
        self.query_one("#headline", Static).update(_headline(view), layout=False)
        for event in view.take():
            if line := _event_line(event):
                self.query_one(RichLog).write(Text(line))
        if new:
            self._draw(view)

    def _show_start(self, job: Job | None) -> None:
        if job is not None:
            begins = "did not start" if job.future.done() else f"starting… {job.detail}"
            self.query_one("#headline", Static).update(one_line(begins), layout=False)

    def _draw(self, view: RunView) -> None:
        loss = [Series(label, *view.lines[m]) for m, label in _LOSSES.items() if m in view.lines]
        self.query_one("#loss", Chart).show(loss)
        for measure, title in SMALL.items():
            if measure in view.lines:
                self.query_one(f"#{measure}", Chart).show([Series(title, *view.lines[measure])])

    def _list(self) -> None:
        if self._store is None or not self.is_current:
            return
        try:
            runs = self._store.runs(200)
        except GemmaTuiError as error:
            self.bench.tell(str(error), "error")
            return
        rows: list[tuple[str, ...]] = [
            (
                r.run_id,
                MARK * (r.run_id in self._marked) + r.run_id,
                r.state,
                r.engine,
                f"{r.step}/{r.steps}",
                str(r.plan.get("method", "")),
                age(r.created),
            )
            for r in runs
        ]
        if rows == self._listed:
            return
        self._listed = rows
        table = self.query_one(f"#{RUNS}", DataTable)
        cursor = table.cursor_row
        table.clear()
        for key, *cells in rows:
            table.add_row(*(Text(one_line(cell, 30)) for cell in cells), key=key)
        table.move_cursor(row=min(cursor, table.row_count - 1))


_LOSSES = {"loss": "training", "valid_loss": "validation"}


def _sample_data() -> str:
    corpus = paths.assets() / "corpus"
    return str(corpus) if corpus.is_dir() else ""


def _is_adapter(name: str) -> bool:
    return (paths.runs() / name / "adapter").is_dir()


def _headline(view: RunView) -> str:
    run, last = view.run, view.last
    parts = [run.run_id, run.state, f"{bar(run.step / max(1, run.steps), 8)} {run.step:,}/{run.steps:,}"]
    if last.get("loss") is not None:
        parts.append(f"loss {last['loss']:.3f}")
    if last.get("valid_loss") is not None:
        parts.append(f"valid {last['valid_loss']:.3f}")
    if run.state == "running" and run.step and last.get("seconds"):
        parts.append(f"{duration((run.steps - run.step) * last['seconds'] / run.step)} left")
    if run.error:
        parts.append(run.error)
    return "  ".join(one_line(part, 300) for part in parts)


def _event_line(event: Row) -> str:
    v = event.values
    text = {
        "load": lambda: f"loading {v['model']}",
        "start": lambda: (
            f"{v['model']} on {v['engine']} {v['device']} {v['dtype']}: {v['trainable']:,} of {v['parameters']:,} "
            f"trained, {v['train_tokens']:,} tokens"
        ),
        "checkpoint": lambda: f"saved {v['path']}",
        "warning": lambda: f"warning: {v['text']}",
        "pause": lambda: "paused",
        "resume": lambda: "goes on",
    }.get(event.kind)
    try:
        return f"{event.step:>6}  {one_line(text(), 200)}" if text else ""
    except (KeyError, TypeError, ValueError):  # another version wrote it
        return f"{event.step:>6}  {one_line(event.kind)}"
