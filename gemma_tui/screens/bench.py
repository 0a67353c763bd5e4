"""How fast models are on this machine: benchmarks as runs, and the plan of a new one as a form."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from textual.binding import Binding
from textual.widget import Widget
from textual.widgets import Static

from engines.errors import EngineError
from gemma_tui.errors import UsageError
from gemma_tui.screens.exporting import ask_and_export
from gemma_tui.screens.followed_run import BENCH, LISTED, check_idle, in_words
from gemma_tui.screens.following import FollowingScreen
from gemma_tui.studies.bench.plan import BenchPlan, command_of
from gemma_tui.studies.plan import honoured
from gemma_tui.text import one_line
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import PlanForm
from gemma_tui.widgets.run_table import RunTable

if TYPE_CHECKING:
    from gemma_tui.session import Job


class BenchScreen(FollowingScreen):
    """The benchmarks, the figure of one of them, and the plan of a new one behind a key.

    Args:
        model: that the form measures, and whose newest benchmark is shown first.
    """

    MODE = "models"
    STUDIES = (BENCH,)
    BINDINGS = [
        Binding("n", "plan", "Plan", id="bench.plan", tooltip="Plan a benchmark: engines, dtypes, rows, repeats"),
        Binding("s", "start", "Start", id="bench.start", tooltip="Measure what the form says"),
        Binding("space", "pause", "Pause", id="bench.pause", show=False, key_display="␣",
                tooltip="Pause after the cell in hand, and go on"),
        Binding("x", "stop", "Stop", id="bench.stop", tooltip="Stop at once; measured cells are kept"),
        Binding("u", "resume", "Resume", id="bench.resume", show=False,
                tooltip="Measure the cells that are left of the benchmark under the cursor"),
        Binding("v", "turn", "Part", id="bench.part", tooltip="The next chart or table"),
        Binding("o", "export", "Export", id="bench.export", show=False, tooltip="Write the figure to a file"),
        Binding("escape", "back", "Back", id="bench.back", tooltip="Leave the form, or go back to the models"),
    ]  # fmt: skip

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model
        self._planning = False

    def body(self) -> Iterable[Widget]:
        """The benchmarks, one line on what is shown, its figure, and the form."""
        yield RunTable("studies")
        yield Static("", id="looked", markup=False)
        yield FigureView(id="figure", grabs=False)
        yield PlanForm(BenchPlan, id="bench-plan")
        yield Static("", id="explained", markup=False)

    def on_mount(self) -> None:
        """The newest benchmark of the model is shown, if there is one."""
        self._form.set("model", self._model)
        self._open(planning=False)
        self.call_after_refresh(self._show_newest)

    def command(self) -> str:
        """The command of the form, or of what is shown."""
        if self.run_shown is not None and not self._planning:
            return self.run_shown.command
        return command_of(honoured(BenchPlan(**self._form.values)))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Starting is for the form, the rest for what is shown."""
        if action == "start":
            return self._planning
        return not (self._planning and action in ("pause", "stop", "turn", "resume", "export"))

    def action_plan(self) -> None:
        """Open the form, or close it."""
        self._open(not self._planning)

    def action_back(self) -> None:
        """Leave the form, or this screen."""
        if self._planning:
            self._open(planning=False)
        else:
            self.dismiss()

    def action_start(self) -> None:
        """Measure what the form says."""
        self.bench.attempt(lambda: self._await(self.bench.session.measure_speed(self._form.build())))

    def action_resume(self) -> None:
        """Measure what is left of a benchmark that was stopped."""

        def go_on() -> None:
            if (run := self._chosen()) is None:
                raise UsageError("choose a benchmark first")
            check_idle(run)
            if run.state == "done":
                raise UsageError(f"{run.run_id} is done")
            self._await(self.bench.session.resume_speed(run.run_id))

        self.bench.attempt(go_on)

    def action_export(self) -> None:
        """Write the figure to a file."""
        figure = self._figure.figure
        if self.run_shown is None or not figure.tables:
            self.bench.tell("nothing is shown yet", "warning")
        else:
            ask_and_export(self.bench, lambda: figure, f"{self.run_shown.run_id}.html")

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    @property
    def _form(self) -> PlanForm[BenchPlan]:
        return self.query_one(PlanForm)

    def _await(self, job: Job) -> None:
        self._awaited = job
        self._open(planning=False)

    def _show_newest(self) -> None:
        with suppress(EngineError):  # it was told when the store was opened
            runs = self._store.runs(LISTED, self.STUDIES) if self._store is not None else []
            newest = next((run for run in runs if run.plan.get("model") == self._model), None)
            if newest is not None:
                self._show(newest.run_id)

    def _open(self, planning: bool) -> None:
        """Show the form in place of the benchmarks, or these."""
        self._planning = planning
        for beside in (self._figure, self.query_one(RunTable)):
            beside.display = not planning
        for widget in (self._form, self.query_one("#explained")):
            widget.display = planning
        target: Widget = self._form if planning else self.query_one(RunTable)
        target.focus()
        self.refresh_bindings()
        self._tell()

    def _tell(self) -> None:
        """One line: what is shown and which part of it is seen, or what is planned."""
        run, job, place = self.run_shown, self._awaited, self._figure.place
        if self._planning:
            line = "new benchmark: s starts it"
        elif job is not None:
            line = "did not start" if job.future.done() else f"starting {job.label}…"
        elif run is not None:
            line = " · ".join(part for part in (in_words(run), place, run.error) if part)
        else:
            line = f"no benchmark of {self._model} yet: n plans one, which takes a minute or more"
        self.query_one("#looked", Static).update(one_line(line, 200), layout=False)
