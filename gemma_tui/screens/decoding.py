"""What block decoding saves and costs: speed-quality curves as runs, and the roofline of the loaded model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.binding import Binding
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.errors import UsageError
from gemma_tui.figure import Figure
from gemma_tui.runs.store import RunStore
from gemma_tui.screens.exporting import ask_and_export
from gemma_tui.screens.followed_run import CURVE, check_idle, in_words
from gemma_tui.screens.following import FollowingScreen
from gemma_tui.studies.curve.plan import CurvePlan, command_of, ways_of
from gemma_tui.studies.pass_times import PassTimes, RooflinePlan, roofline_figure
from gemma_tui.studies.plan import command, honoured
from gemma_tui.text import one_line
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import PlanForm
from gemma_tui.widgets.run_table import RunTable

if TYPE_CHECKING:
    from gemma_tui.session import Job

ROOFLINE = "roofline"
FORMS: dict[str, type[Any]] = {CURVE: CurvePlan, ROOFLINE: RooflinePlan}
NOTHING = "no curve yet: n plans one, r times the passes of the loaded model"


class DecodingScreen(FollowingScreen):
    """The curves, the figure of one of them or the roofline, and the plans of both as forms behind keys.

    Args:
        opens: the form that is seen first: ``CURVE``, ``ROOFLINE`` or nothing.
    """

    MODE = "generation"
    STUDIES = (CURVE,)
    BINDINGS = [
        Binding("n", "plan('curve')", "Curve", id="decoding.curve", tooltip="Plan a speed-quality curve"),
        Binding("r", "plan('roofline')", "Roofline", id="decoding.roofline",
                tooltip="Plan a timing of passes, beside what the roofline says"),
        Binding("s", "start", "Start", id="decoding.start", tooltip="Start what the form says"),
        Binding("space", "pause", "Pause", id="decoding.pause", show=False, key_display="␣",
                tooltip="Pause, and go on"),
        Binding("x", "stop", "Stop", id="decoding.stop", tooltip="Stop; finished rows are kept"),
        Binding("u", "resume", "Resume", id="decoding.resume", show=False,
                tooltip="Go on with the curve under the cursor"),
        Binding("v", "turn", "Part", id="decoding.part", tooltip="The next chart or table"),
        Binding("o", "export", "Export", id="decoding.export", show=False, tooltip="Write the figure to a file"),
        Binding("escape", "back", "Back", id="decoding.back", tooltip="Leave the form, or go back to the texts"),
    ]  # fmt: skip

    def __init__(self, opens: str = "") -> None:
        super().__init__()
        self.kind = opens
        """Of the form that is open, if one is."""
        self._times: list[PassTimes] = []
        self._timing: Job | None = None

    def body(self) -> Iterable[Widget]:
        """The curves, one line on what is shown, its figure, and the forms."""
        yield RunTable("studies")
        yield Static(NOTHING, id="looked", markup=False)
        yield FigureView(id="figure", grabs=False)
        for kind, plan in FORMS.items():
            yield PlanForm(plan, id=f"{kind}-plan")
        yield Static("", id="explained", markup=False)

    def on_mount(self) -> None:
        """The form that was asked for is open, or else the newest curve is shown."""
        self._form(CURVE).set("model", self.bench.session.place.model or "nano")
        self._open(self.kind)
        self.call_after_refresh(self._show_newest)

    def command(self) -> str:
        """The command of the form that is open, or of what is shown."""
        session, roofline = self.bench.session, self.kind == ROOFLINE or (not self.kind and self._times)
        if roofline:
            plan = RooflinePlan(**self._form(ROOFLINE).values)
            return command((ROOFLINE, session.place.model or "nano", "--engine", session.engine), plan)
        if self.run_shown is not None and not self.kind:
            return self.run_shown.command
        return command_of(honoured(CurvePlan(**self._form(CURVE).values)), session.engine)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Starting is for an open form, the rest for what is shown."""
        if action == "start":
            return bool(self.kind)
        return not (self.kind and action in ("pause", "stop", "turn", "resume", "export"))

    def action_plan(self, kind: str) -> None:
        """Open a form, or close it."""
        self._open("" if kind == self.kind else kind)

    def action_back(self) -> None:
        """Leave the form, or this screen."""
        if self.kind:
            self._open("")
        else:
            self.dismiss()

    def action_start(self) -> None:
        """Do what the form says."""
        self.bench.attempt(self._start_roofline if self.kind == ROOFLINE else self._start_curve)

    def action_resume(self) -> None:
        """Go on with a curve that has ended before its last row."""

        def go_on() -> None:
            if (run := self._chosen()) is None:
                raise UsageError("choose a curve first")
            check_idle(run, self.bench.session.engine)
            if run.state == "done":
                raise UsageError(f"{run.run_id} is done")
            self._await(self.bench.session.resume(run.study, run.run_id))

        self.bench.attempt(go_on)

    def action_export(self) -> None:
        """Write the figure to a file."""
        figure, name = self._figure.figure, self.run_shown.run_id if self.run_shown else ROOFLINE
        if not (figure.charts or figure.tables):
            self.bench.tell("nothing is shown yet", "warning")
        else:
            ask_and_export(self.bench, lambda: figure, f"{name}.html")

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    def _form(self, kind: str) -> PlanForm[Any]:
        return self.query_one(f"#{kind}-plan", PlanForm)

    def _start_curve(self) -> None:
        plan = self._form(CURVE).build()
        ways_of(plan)
        self._await(self.bench.session.begin(CURVE, plan))

    def _start_roofline(self) -> None:
        found: list[PassTimes] = []
        self._timing = self.bench.session.roofline(self._form(ROOFLINE).build(), found)
        self._times, self._followed, self.run_shown, self._awaited = found, None, None, None
        self._draw(Figure(""), ROOFLINE)
        self._open("")

    def _await(self, job: Job) -> None:
        self._awaited = job
        self._open("")

    def _job_shown(self) -> Job | None:
        timing = (job for job in self.bench.session.jobs if job.kind == ROOFLINE)
        return super()._job_shown() or next(timing, None)

    def _show_newest(self) -> None:
        if (newest := self.query_one(RunTable).chosen) and not self.kind:
            self._show(newest)

    def _open(self, kind: str) -> None:
        """Show a form in place of the curves, or the curves."""
        self.kind = kind
        for beside in (self._figure, self.query_one(RunTable)):
            beside.display = not kind
        for each in FORMS:
            self._form(each).display = each == kind
        self.query_one("#explained").display = bool(kind)
        target: Widget = self._form(kind) if kind else self.query_one(RunTable)
        target.focus()
        self.refresh_bindings()
        self._tell()

    def _show(self, name: str) -> None:
        self._times = []
        super()._show(name)

    def _read(self, store: RunStore) -> None:
        super()._read(store)
        if self._timing is None:
            return
        if self._times and 1 in self._times[0].fastest:
            times = self._times[0]
            self._draw(roofline_figure(replace(times, fastest=dict(times.fastest))), ROOFLINE)
        self._timing = None if self._timing.future.done() else self._timing

    def _tell(self) -> None:
        """One line: what is shown and which part of it is seen, or what is planned."""
        run, job, place = self.run_shown, self._awaited, self._figure.place
        if self.kind:
            line = f"new {'curve' if self.kind == CURVE else 'timing of passes'}: s starts it"
        elif job is not None:
            line = "did not start" if job.future.done() else f"starting {job.label}…"
        elif run is not None:
            words = in_words(run, self.bench.session.job_of(run.run_id))
            line = " · ".join(part for part in (words, place, run.error) if part)
        elif self._times or self._timing is not None:
            line = " · ".join(part for part in ("roofline of the loaded model", place) if part)
        else:
            line = NOTHING
        self.query_one("#looked", Static).update(one_line(line, 200), layout=False)
