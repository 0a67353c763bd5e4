"""The plan of a training run: its form, and what is known of it before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual import work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from engines.errors import EngineError
from gemma_tui import paths
from gemma_tui.errors import UsageError
from gemma_tui.session import Session
from gemma_tui.studies.plan import command, honoured
from gemma_tui.studies.queueing import check
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.text import one_line
from gemma_tui.widgets.plan_form import PlanForm
from gemma_tui.widgets.rate_plot import RatePlot

if TYPE_CHECKING:
    from engines.base import DeviceInfo

LOOK_SECONDS = 0.3


class PlanPane(Vertical):
    """The form of a training plan, and under it what its run will be like.

    Args:
        session: says which engine the plan is for, and which model is loaded there.
    """

    def __init__(self, session: Session, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.session = session
        self.form: PlanForm[TrainingPlan] = PlanForm(TrainingPlan)
        self._adopted = self.form.values["model"] = session.place.model or "nano"
        self.form.values["data"] = _sample_data()
        self._plan: TrainingPlan | None = None
        self._asked: tuple[TrainingPlan, str, DeviceInfo | None] | None = None

    def compose(self) -> ComposeResult:
        """The form, what the option under the cursor does, and the plan's schedule and memory."""
        yield self.form
        yield Static("", id="explained", markup=False)
        yield RatePlot("rates")
        yield Static("", id="need", markup=False)

    def on_mount(self) -> None:
        """Show what the form has, and look from now on what is known of it."""
        self._show()
        self.set_interval(LOOK_SECONDS, self._look)

    def plan(self) -> TrainingPlan:
        """The form's plan.

        Raises:
            UsageError: it could not begin.
        """
        plan = self.form.build()
        check(plan)
        return plan

    def command(self) -> str:
        """The command that runs the plan, whether or not it could begin."""
        return command(("train", "--engine", self.session.engine), honoured(TrainingPlan(**self.form.values)))

    def adopt_model(self) -> None:
        """The model that was loaded meanwhile becomes the form's, unless one was typed.

        A run's adapter does not: another one cannot be trained on it, so its base stays.
        """
        loaded = self.session.place.model
        if loaded and self.form.is_mounted and self.form.values["model"] == self._adopted and not _is_adapter(loaded):
            self._adopted = loaded
            self.form.set("model", loaded)

    def look_again(self) -> None:
        """What is known of the plan's memory may have changed."""
        self._asked = None

    def on_plan_form_changed(self, event: PlanForm.Changed) -> None:
        """Show what became of the plan."""
        event.stop()
        self._show()

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    def _show(self) -> None:
        """Draw the plan; its memory is asked for at the next look, and an answer for another plan is none."""
        self._plan, self._asked, problem = None, None, ""
        try:
            self._plan = self.plan()
        except UsageError as error:
            problem = str(error)
        self.query_one(RatePlot).show(self._plan, problem)
        self.query_one("#need", Static).update("memory: …" if self._plan else "", layout=False)

    def _look(self) -> None:
        """Ask for the memory of another plan, or of this one once the engine's device is known."""
        if self._plan is None or not self.screen.is_current:
            self._asked = None
            return
        wanted = (self._plan, self.session.engine, self.session.place.device)
        if wanted != self._asked:
            self._asked = wanted
            self._ask(*wanted)

    @work(thread=True, exclusive=True, group="need")
    def _ask(self, plan: TrainingPlan, engine: str, device: DeviceInfo | None) -> None:
        from gemma_tui.studies.forecast import forecast

        try:
            text = forecast(plan, engine, device)
        except EngineError as error:
            text = str(error)
        self.app.call_from_thread(self._told, (plan, engine, device), text)

    def _told(self, asked: tuple[TrainingPlan, str, DeviceInfo | None], text: str) -> None:
        if asked == self._asked:
            for need in self.query("#need").results(Static):  # none is left while the app ends
                need.update(f"memory: {one_line(text, 300)}", layout=False)


def _sample_data() -> str:
    corpus = paths.assets() / "corpus"
    return str(corpus) if corpus.is_dir() else ""


def _is_adapter(name: str) -> bool:
    return (paths.runs() / name / "adapter").is_dir()
