"""A model quantised for MLX or in another dtype, from the list of models: its plan, how far it is, what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from textual.binding import Binding
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.screens.workbench import Workbench
from gemma_tui.studies.conversion import ConversionPlan, check, command_of
from gemma_tui.text import one_line
from gemma_tui.widgets.plan_form import PlanForm

if TYPE_CHECKING:
    from gemma_tui.session import Job

WATCH_SECONDS = 0.25


class ConversionScreen(Workbench):
    """The plan of a conversion as a form; s starts it, x stops it."""

    MODE = "models"
    BINDINGS = [
        Binding("s", "start", "Start", id="conversion.start", tooltip="Make the new model"),
        Binding("x", "stop", "Stop", id="conversion.stop", tooltip="Stop; nothing is left of the new model"),
        Binding("escape", "close", "Back", id="conversion.back", tooltip="Go back to the models; what runs goes on"),
    ]

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model
        self._job: Job | None = None

    def body(self) -> Iterable[Widget]:
        """One line on how far it is, and the form."""
        yield Static("", id="looked", markup=False)
        yield PlanForm(ConversionPlan, id="conversion-plan")
        yield Static("", id="explained", markup=False)

    def on_mount(self) -> None:
        """What runs already is shown."""
        self._form.set("model", self._model)
        self._form.focus()
        self._job = next((job for job in self.bench.session.jobs if job.kind == "convert"), None)
        self.set_interval(WATCH_SECONDS, self._tell)
        self._tell()

    def command(self) -> str:
        """The command that makes the same."""
        return command_of(ConversionPlan(**self._form.values), self.bench.session.engine)

    def action_start(self) -> None:
        """Make the model."""

        def start() -> None:
            plan = self._form.build()
            check(plan)
            self._job = self.bench.session.convert(plan)

        self.bench.attempt(start)
        self._tell()

    def action_stop(self) -> None:
        """End what is made."""
        if self._job is None or self._job.future.done():
            self.bench.tell("nothing is converted", "warning")
        else:
            self._job.control.stop.set()

    def action_close(self) -> None:
        """Go back to the list."""
        self.dismiss(None)

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    @property
    def _form(self) -> PlanForm[ConversionPlan]:
        return self.query_one(PlanForm)

    def _tell(self) -> None:
        """One line: how far it is, or what was made."""
        job = self._job
        if job is None:
            line = "a new model of this one: set bits or dtype, s starts"
        elif not job.future.done():
            line = f"{job.label}: {job.share:.0%} {job.detail} · x stops"
        elif job.future.exception() is None:
            line = job.detail
        else:
            line = "no model was made"
        self.query_one("#looked", Static).update(one_line(line, 300), layout=False)
