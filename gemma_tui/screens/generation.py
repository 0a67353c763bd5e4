"""Generation: a prompt, how to sample, and the text as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.screens.workbench import Workbench
from gemma_tui.studies.generation import Generation, GenerationPlan
from gemma_tui.studies.plan import command
from gemma_tui.text import clean
from gemma_tui.widgets.plan_form import PlanForm

if TYPE_CHECKING:
    from gemma_tui.session import Job

SECONDS = 0.1
FIRST_PROMPT = "It is a truth universally acknowledged, that"


class GenerationScreen(Workbench):
    """Enter a prompt, set how to sample, let the model write."""

    MODE = "generation"

    BINDINGS = [
        Binding("g", "generate", "Generate", id="generation.generate"),
        Binding("x", "stop", "Stop", id="generation.stop"),
        Binding("p", "prompt", "Prompt", id="generation.prompt"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._generation = Generation()
        self._job: Job | None = None
        self._prompt = ""

    def body(self) -> Iterable[Widget]:
        """The text, its speed, and the options."""
        form = PlanForm(GenerationPlan, id="options")
        form.values["prompt"] = FIRST_PROMPT
        yield VerticalScroll(Static("", id="text", markup=False), id="written")
        yield Static("press g to let the model write, p for another prompt", id="speed", markup=False)
        yield form
        yield Static("", id="explained", markup=False)

    def on_mount(self) -> None:
        """Follow what is written."""
        self.set_interval(SECONDS, self._watch)
        self.query_one(PlanForm).focus()

    def command(self) -> str:
        """The command that writes the same."""
        name = self.bench.session.place.model or "nano"
        plan = GenerationPlan(**self.query_one(PlanForm).values)
        return command(("generate", name, "--engine", self.bench.session.engine), plan)

    def action_generate(self) -> None:
        """Write with the loaded model."""

        def start() -> None:
            plan = self.query_one(PlanForm).build()
            generation = Generation()
            self._job = self.bench.session.generate(plan, generation)
            self._generation, self._prompt = generation, plan.prompt

        self.bench.attempt(start)

    def action_stop(self) -> None:
        """End the text here."""
        if self._job is not None:
            self._job.control.stop.set()

    def action_prompt(self) -> None:
        """Change the prompt."""
        self.query_one(PlanForm).edit("prompt")

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    def _watch(self) -> None:
        if self._job is None or not self.is_current:
            return
        generation, running = self._generation, not self._job.future.done()
        self._say(generation, running)
        if not running:
            self._job = None

    def _say(self, generation: Generation, running: bool) -> None:
        prompt = clean(self._prompt)
        cursor = "▌" if running else ""
        self.query_one("#text", Static).update(Text.assemble((prompt, "bold"), clean(generation.text), cursor))
        self.query_one("#written", VerticalScroll).scroll_end(animate=False)
        end = "x stops" if running else "the model ended the text" if generation.stopped else "ended"
        speed = f"{len(generation.tokens)} tokens, {generation.tokens_per_second:.1f} tokens/s, {end}"
        self.query_one("#speed", Static).update(speed, layout=False)
