"""The learning rate of a plan over its steps, as a chart or, where there is one line only, as a row of blocks."""

from __future__ import annotations

from rich.text import Text
from textual.widget import Widget

from gemma_tui.plots import Series, draw, number_text
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.text import one_line

BLOCKS = "▁▂▃▄▅▆▇█"
LOOKED_AT = 1000
"""Steps whose rate is asked for; a chart draws the lowest and the highest of each column."""


class RatePlot(Widget):
    """The schedule that a run will follow, or why there is none."""

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self.plan: TrainingPlan | None = None
        self.problem = ""

    def show(self, plan: TrainingPlan | None, problem: str = "") -> None:
        """Draw another plan, or say what keeps it from beginning."""
        self.plan, self.problem = plan, problem
        self.refresh()

    def render(self) -> Text:
        """The plan's rates in characters."""
        width, height = self.size
        plan = self.plan
        if plan is None or width < 12:
            return Text(one_line(self.problem, max(1, width)), "bold")
        steps, rates = plan.rates(LOOKED_AT)
        facts = f"peak {max(rates):.3g}, {plan.shape}, {number_text(plan.steps)} steps"
        if height < 4:
            return Text(f"rate {_row(plan, width - len(facts) - 7)}  {facts}", no_wrap=True, overflow="ellipsis")
        line = Series("learning rate", list(map(float, steps)), rates)
        drawn = draw([line], width, height, f"learning rate: {facts}", colour=not self.app.no_color, named=False)
        return Text.from_ansi(drawn, no_wrap=True)


def _row(plan: TrainingPlan, columns: int) -> str:
    """A block for each of at most ``columns`` steps."""
    _, rates = plan.rates(max(1, min(columns - 1, plan.steps)))
    highest = max(rates) or 1.0
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * rate / highest)] for rate in rates)
