"""The plans of what the capacity screen starts, as forms of which one is seen at a time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from textual.containers import Vertical
from textual.widgets import Static

from engines.errors import EngineError
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.studies.capacity.plan import PRESETS, CapacityPlan, MoreCells, cells_of, with_preset
from gemma_tui.studies.capacity.sweep import words_of
from gemma_tui.studies.memorization.meter import STUDY as MEASUREMENT
from gemma_tui.studies.memorization.meter import words_of as memorization_words
from gemma_tui.studies.memorization.plan import MemorizationPlan
from gemma_tui.studies.memorization.planting import CanaryPlan
from gemma_tui.studies.memorization.planting import words_of as canary_words
from gemma_tui.studies.memorization.where import STUDY as WHERE
from gemma_tui.studies.memorization.where import WherePlan
from gemma_tui.studies.memorization.where import words_of as where_words
from gemma_tui.studies.plan import command, honoured
from gemma_tui.widgets.plan_form import PlanForm

SWEEP, MEASURE, MORE, CANARIES = "sweep", "measure", "more", "canaries"
FORMS: dict[str, type[Any]] = {
    SWEEP: CapacityPlan, MEASURE: MemorizationPlan, WHERE: WherePlan, MORE: MoreCells, CANARIES: CanaryPlan,
}  # fmt: skip
LINES = {
    SWEEP: "new sweep: s starts it", MEASURE: "new measurement: s starts it", WHERE: "which parts hold it: s starts it",
    MORE: "more cells of a sweep: s starts them", CANARIES: "canaries among the rows of data: s plants them",
}  # fmt: skip
"""What is planned by each form, for a person."""

Plan = CapacityPlan | MemorizationPlan | WherePlan | MoreCells | CanaryPlan


class CapacityPlans(Vertical):
    """All forms, and what the option under the cursor does; none is seen at first."""

    DEFAULT_CSS = "CapacityPlans { height: 1fr; } CapacityPlans PlanForm { height: 1fr; }"

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""
        """Of the form that is open, one of ``FORMS``, or nothing."""
        self._preset = ""
        self.display = False

    def compose(self) -> Iterable[PlanForm[Any] | Static]:
        """The forms and the line below."""
        for kind, plan in FORMS.items():
            yield PlanForm(plan, id=f"{kind}-plan")
        yield Static("", id="explained", markup=False)

    def on_mount(self) -> None:
        """Layers are the parts that are sought first."""
        self.form(WHERE).set("where", "layers")

    def open(self, kind: str) -> None:
        """Show a form; nothing closes the one that is open."""
        self.kind, self.display = kind, bool(kind)
        for each in FORMS:
            self.form(each).display = each == kind
        if kind:
            self.form(kind).focus()

    def form(self, kind: str) -> PlanForm[Any]:
        """One of the forms."""
        return self.query_one(f"#{kind}-plan", PlanForm)

    def measure_of(self, model: str, store: RunStore) -> None:
        """Fill in a model, and what it was trained on if it is a run's."""
        form = self.form(MEASURE)
        if not model or model == form.values["model"]:
            return
        form.set("model", model)
        with suppress(EngineError):
            if (run := store.run(model)).run_id == model and run.study == "training":
                form.set("data", str(run.plan.get("data", "")))

    def parts_of(self, run: Run | None) -> None:
        """Fill in a measurement."""
        if run is not None and run.study == MEASUREMENT:
            self.form(WHERE).set("model", run.run_id)

    def more_of(self, run: Run) -> None:
        """Fill in a sweep that gets more cells, and how many seeds it has."""
        form = self.form(MORE)
        for name, value in (("add", run.run_id), ("sizes", ""), ("seeds", run.plan.get("seeds"))):
            form.set(name, value)
        form.move_cursor(row=list(form.options).index("sizes"))

    def turn_preset(self) -> None:
        """Fill the sweep's form with the next preset, or with its defaults."""
        names, form = ["", *PRESETS], self.form(SWEEP)
        self._preset = names[(names.index(self._preset) + 1) % len(names)]
        values = with_preset(self._preset, {})
        for name, option in form.options.items():
            form.set(name, values.get(name, option.default))

    def plan(self) -> Plan:
        """What the form that is open says.

        Raises:
            EngineError: a value is missing, a list is none, or a network cannot be built.
        """
        plan: Plan = self.form(self.kind).build()
        if isinstance(plan, CapacityPlan):
            cells_of(plan)
        return plan

    def command(self, engine: str) -> str:
        """The command that does what the form says; that of a sweep if none is open."""
        form = self.form(self.kind or SWEEP)
        plan: Plan = honoured(form.plan(**form.values))
        match plan:
            case CapacityPlan():
                return words_of(engine, plan)
            case MemorizationPlan():
                return memorization_words(engine, plan)
            case WherePlan():
                return where_words(engine, plan)
            case MoreCells():
                return command(("capacity", "sweep"), plan)
            case CanaryPlan():
                return canary_words(plan)

    @property
    def line(self) -> str:
        """What is planned, for a person."""
        preset = f"; preset {self._preset}" if self.kind == SWEEP and self._preset else ""
        return LINES[self.kind] + preset

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        event.stop()
        self.query_one("#explained", Static).update(event.text, layout=False)
