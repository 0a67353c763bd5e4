"""The plan of a training run: its form, and what is known of it before it starts."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from gemma_tui import paths
from gemma_tui.session import Session
from gemma_tui.studies.plan import command
from gemma_tui.studies.queueing import check
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.widgets.plan_form import PlanForm


class PlanPane(Vertical):
    """The form of a training plan.

    Args:
        session: says which engine the plan is for, and which model is loaded there.
    """

    def __init__(self, session: Session, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.session = session
        self.form: PlanForm[TrainingPlan] = PlanForm(TrainingPlan)
        self._adopted = self.form.values["model"] = session.place.model or "nano"
        self.form.values["data"] = _sample_data()

    def compose(self) -> ComposeResult:
        """The form, and under it what the option under the cursor does."""
        yield self.form
        yield Static("", id="explained", markup=False)

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
        return command(("train", "--engine", self.session.engine), TrainingPlan(**self.form.values))

    def adopt_model(self) -> None:
        """The model that was loaded meanwhile becomes the form's, unless one was typed.

        A run's adapter does not: another one cannot be trained on it, so its base stays.
        """
        loaded = self.session.place.model
        if loaded and self.form.is_mounted and self.form.values["model"] == self._adopted and not _is_adapter(loaded):
            self._adopted = loaded
            self.form.set("model", loaded)

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)


def _sample_data() -> str:
    corpus = paths.assets() / "corpus"
    return str(corpus) if corpus.is_dir() else ""


def _is_adapter(name: str) -> bool:
    return (paths.runs() / name / "adapter").is_dir()
