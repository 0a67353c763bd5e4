"""Generation: the same prompt written token by token and in blocks, and every pass of it to look at again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text
from textual.binding import Binding
from textual.containers import Container, Vertical
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.screens.decoding import ROOFLINE, DecodingScreen
from gemma_tui.screens.exporting import ask_and_export
from gemma_tui.screens.workbench import Workbench
from gemma_tui.studies.decoding_figure import MEASURES, NAMES, X_LABELS, decoding_figure, line_of
from gemma_tui.studies.generation import AR, SBD, GenerationPlan
from gemma_tui.studies.plan import command, honoured
from gemma_tui.studies.side_by_side import SideBySide, sides_of
from gemma_tui.studies.writing import agreement
from gemma_tui.text import one_line
from gemma_tui.widgets.dialogs import Reading
from gemma_tui.widgets.pass_chart import PassChart
from gemma_tui.widgets.plan_form import PlanForm
from gemma_tui.widgets.side_pane import SidePane
from gemma_tui.widgets.token_strip import SHADES, TokenStrip, legend

if TYPE_CHECKING:
    from gemma_tui.session import Job

SECONDS = 0.1
CHART_SECONDS = 0.5
"""At least, between two drawings of the chart while a text is written."""

PASS_SECONDS = 0.2
"""That a pass is shown while it plays."""

CHARTED = 2_000
"""Tokens, or passes, that the chart shows at most: the last ones."""

FIRST_PROMPT = "It is a truth universally acknowledged, that"
BOTH = "both"


class GenerationScreen(Workbench):
    """Set how to write, let the model do it, and go through its passes."""

    MODE = "generation"
    BINDINGS = [
        Binding("g", "generate", "Generate", id="generation.generate", tooltip="Let the loaded model write"),
        Binding("x", "stop", "Stop", id="generation.stop", tooltip="End the text here"),
        Binding("p", "prompt", "Prompt", id="generation.prompt", show=False, tooltip="Type another prompt"),
        Binding("f", "form", "Options", id="generation.options", tooltip="How to write, as a form; again closes it"),
        Binding("d", "decoder", "Decoder", id="generation.decoder", show=False,
                tooltip="Write token by token, in blocks, or both side by side"),
        Binding("m", "shade", "Colour", id="generation.colour", tooltip="Colour by pass or by entropy"),
        Binding("space", "play", "Play", id="generation.play", key_display="␣", tooltip="Play the passes, and pause"),
        Binding("right_square_bracket", "step(1)", "Pass", id="generation.next", key_display="[ ]",
                tooltip="One pass on, or with [ one back"),
        Binding("left_square_bracket", "step(-1)", "Pass before", id="generation.before", show=False, key_display="["),
        Binding("left_curly_bracket", "jump(0)", "First pass", id="generation.first", show=False, key_display="{",
                tooltip="Before the first pass"),
        Binding("right_curly_bracket", "jump(1)", "Last pass", id="generation.last", show=False, key_display="}",
                tooltip="After the last pass; what is still written is followed"),
        Binding("k", "curve", "Curves", id="generation.curves", show=False,
                tooltip="Speed-quality curves of block decoding over rows"),
        Binding("l", "roofline", "Roofline", id="generation.roofline", show=False,
                tooltip="What passes cost on this machine, beside the roofline"),
        Binding("v", "turn", "Chart", id="generation.chart", show=False, tooltip="The next chart"),
        Binding("t", "text", "Text", id="generation.text", show=False, tooltip="Read the text as it is"),
        Binding("o", "export", "Export", id="generation.export", show=False, tooltip="Write what is shown to a file"),
        Binding("escape", "back", "Back", id="generation.back", show=False, tooltip="Leave the form"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.texts = SideBySide()
        self.step = 0
        """Passes after which both texts are shown; one that took fewer is shown as it ended."""
        self._beside = True
        self._job: Job | None = None
        self._follows = True
        self._played = 0.0
        """When the last pass was played; 0 while nothing plays."""
        self._drawn = 0.0
        """When the chart was."""
        self._shade, self._measure = SHADES[0], next(iter(MEASURES))

    def body(self) -> Iterable[Widget]:
        """The texts with what is known of them, and the options, which are seen first."""
        form = PlanForm(GenerationPlan, id="options")
        form.values |= {"prompt": FIRST_PROMPT, "decoder": SBD, "temperature": 0.0}
        with Vertical(id="texts"):
            yield Static("", id="prompt", markup=False)
            yield Static("", id="warning", markup=False)
            with Container(id="sides"):
                yield SidePane(AR)
                yield SidePane(SBD)
            yield Static("", id="clock", markup=False)
            yield Static("", id="legend", markup=False)
            yield PassChart()
        with Vertical(id="plan-of-texts"):
            yield Static("", id="planned", markup=False)
            yield form
            yield Static("", id="explained", markup=False)

    def on_mount(self) -> None:
        """Follow what is written."""
        self.query_one("#warning").display = False
        self._open(True)
        self._tell_plan()
        self.set_interval(SECONDS, self._watch)

    def command(self) -> str:
        """The commands that write the same."""
        name = self.bench.session.place.model or "nano"
        plan = honoured(GenerationPlan(**self._form.values))
        verb = ("generate", name, "--engine", self.bench.session.engine)
        return "\n".join(command(verb, side.plan) for side in sides_of(plan, self._beside).sides)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """What is for texts is on while they are seen."""
        opened = self.is_mounted and self._plans
        if action in ("stop", "generate"):
            return self._busy == (action == "stop")
        if action == "back":
            return opened and bool(self.texts.sides)
        return not (opened and action in ("shade", "play", "step", "jump", "turn", "text", "export"))

    def action_generate(self) -> None:
        """Write with the loaded model."""

        def start() -> None:
            texts = sides_of(self._form.build(), self._beside)
            self._job = self.bench.session.generate(texts)
            self._begin(texts)

        self.bench.attempt(start)

    def action_stop(self) -> None:
        """End the text here."""
        if self._job is not None:
            self._job.control.stop.set()

    def action_prompt(self) -> None:
        """Change the prompt."""
        self._form.edit("prompt")

    def action_form(self) -> None:
        """Open the options, or close them if there is something else to see."""
        self._open(not self._plans or not self.texts.sides)

    def action_back(self) -> None:
        """Back to the texts."""
        self._open(False)

    def action_decoder(self) -> None:
        """Write token by token, in blocks, or both."""
        kinds = (AR, SBD, BOTH)
        kind = kinds[(kinds.index(self._kind) + 1) % len(kinds)]
        self._beside = kind == BOTH
        self._tell_plan()
        self._form.set("decoder", AR if kind == AR else SBD)
        self.bench.tell(self._planned)

    def action_shade(self) -> None:
        """Colour the tokens by the other measure."""
        self._shade = SHADES[(SHADES.index(self._shade) + 1) % len(SHADES)]
        for pane in self._panes:
            pane.strip.shade = self._shade
            pane.strip.refresh()
        self._tell_legend()

    def action_play(self) -> None:
        """Play the passes from here, or from the first one at the end; or pause."""
        if self._played:
            self._played = 0.0
        elif self._steps:
            self.step = 0 if self.step >= self._steps else self.step
            self._played, self._follows = time.monotonic(), False
        self._go()

    def action_step(self, by: int) -> None:
        """Some passes on or back."""
        self._played = 0.0
        self.step = max(0, min(self.step + by, self._steps))
        self._follows = self.step == self._steps
        self._go()

    def action_jump(self, share: int) -> None:
        """Before the first pass (0), or after the last (1)."""
        self.action_step(self._steps if share else -self._steps)

    def action_curve(self) -> None:
        """Speed-quality curves."""
        self.app.push_screen(DecodingScreen())

    def action_roofline(self) -> None:
        """What passes cost."""
        self.app.push_screen(DecodingScreen(ROOFLINE))

    def action_turn(self) -> None:
        """Show the next chart."""
        names = list(MEASURES)
        self._measure = names[(names.index(self._measure) + 1) % len(names)]
        self._draw()

    def action_text(self) -> None:
        """Read the text of the side that has the cursor as it is, without marks."""
        panes = self._panes
        if panes:
            pane = next((pane for pane in panes if pane.strip.has_focus), panes[-1])
            assert pane.side is not None
            self.app.push_screen(Reading(NAMES[str(pane.id)], pane.side.generation.text or "nothing is written"))

    def action_export(self) -> None:
        """Write the passes and the tokens to a file."""
        texts = self.texts
        if not self._steps:
            self.bench.tell("nothing is written yet", "warning")
        else:
            ask_and_export(self.bench, lambda: decoding_figure(texts), "generation.html")

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    def on_plan_form_changed(self, event: PlanForm.Changed) -> None:
        """Show what will be written."""
        self._tell_plan()

    def on_token_strip_moved(self, message: TokenStrip.Moved) -> None:
        """Both cursors are on the same place."""
        for pane in self._panes:
            if not pane.strip.has_focus:
                pane.strip.point(message.place)
        self._tell()

    @property
    def _form(self) -> PlanForm[GenerationPlan]:
        return self.query_one(PlanForm)

    @property
    def _plans(self) -> bool:
        """Whether the options are seen."""
        return bool(self.query_one("#plan-of-texts").display)

    @property
    def _kind(self) -> str:
        """Which decoders write: ``AR``, ``SBD`` or ``BOTH``."""
        decoder = str(self._form.values["decoder"])
        return BOTH if decoder == SBD and self._beside else decoder

    @property
    def _planned(self) -> str:
        said = {AR: "token by token", SBD: "in blocks", BOTH: "token by token and in blocks, side by side"}
        return f"g writes {said[self._kind]} (d changes that)"

    @property
    def _panes(self) -> list[SidePane]:
        """Those in which there is a text."""
        return [pane for pane in self.query(SidePane) if pane.display and pane.side is not None]

    @property
    def _steps(self) -> int:
        return max((pane.replay.steps for pane in self._panes), default=0)

    @property
    def _busy(self) -> bool:
        return self._job is not None and not self._job.future.done()

    def _begin(self, texts: SideBySide) -> None:
        """Show other texts, which are being written."""
        self.texts, self.step, self._follows, self._played = texts, 0, True, 0.0
        block = max(side.plan.block for side in texts.sides)
        by_decoder = {side.plan.decoder: side for side in texts.sides}
        for pane in self.query(SidePane):
            side = by_decoder.get(str(pane.id))
            pane.display = side is not None
            if side is not None:
                pane.begin(side, texts, block)
        self._open(False)
        self._tell_legend()
        self._watch()

    def _open(self, form: bool) -> None:
        """Show the options in place of the texts, or the texts."""
        self.query_one("#plan-of-texts").display = form
        self.query_one("#texts").display = not form
        target = self._form if form or not self._panes else self._panes[-1].strip
        target.focus()
        self.refresh_bindings()

    def _watch(self) -> None:
        """Take in what was written, and play."""
        if not self.is_current or not self.texts.sides:
            return
        before, running = (self.step, self._steps), self._busy
        for pane in self._panes:
            pane.read()
        if self._follows:
            self.step = self._steps
        elif self._played and time.monotonic() - self._played >= PASS_SECONDS:
            self.step, self._played = min(self.step + 1, self._steps), time.monotonic()
            if self.step == self._steps:
                self._played = 0.0
        if before == (self.step, self._steps) and self._job is None:
            return
        ended, self._job = self._job is not None and not running, self._job if running else None
        self._go()
        if ended:
            self.refresh_bindings()

    def _go(self) -> None:
        """Show the texts after as many passes as it is now."""
        for pane in self._panes:
            pane.strip.go(min(self.step, pane.replay.steps))
        self._tell()
        if not self._busy or time.monotonic() - self._drawn > CHART_SECONDS:
            self._draw()

    def _tell(self) -> None:
        """The lines on both texts, and on the passes."""
        panes, running = self._panes, self._busy
        for pane in panes:
            pane.tell(running, next((other for other in panes if other is not pane), None))
        played = "▶ " if self._played else ""
        parts = [f"{played}pass {self.step:,}/{self._steps:,}", *self._compared()]
        self.query_one("#clock", Static).update(" · ".join(parts), layout=False)
        self._tell_prompt()
        warnings = [text for side in self.texts.sides for text in side.generation.warnings]
        line = self.query_one("#warning", Static)
        line.display = bool(warnings)
        line.update(one_line("; ".join(warnings), 400), layout=False)

    def _compared(self) -> list[str]:
        """How far the texts agree, with the place of the first difference marked in both."""
        panes = self._panes
        if len(panes) < 2:
            return []
        found = agreement(*(side.generation.tokens for side in self.texts.sides))
        # Where one text has come to its end so far says nothing while it is written, or if it never was.
        open_ended = found.first == found.compared and (self._busy or not found.compared)
        first = None if open_ended else found.first
        for pane in panes:
            if pane.strip.difference != first:
                pane.strip.difference = first
                pane.strip.refresh()
        if not found.compared:
            return []
        where = "" if first is None else f", first difference at token {first} (≠)"
        return [f"agreement {100 * found.share:.1f} % of {found.compared:,} tokens{where}"]

    def _tell_prompt(self) -> None:
        """The prompt of what is seen, on one line."""
        side = self.texts.sides[0]
        tokens = side.generation.prompt_tokens
        said = one_line(side.plan.prompt.replace("\n", "⏎"), 400)
        model = f"{one_line(self.texts.model, 30)}, " if self.texts.model else ""
        facts = f", {'chat, ' * side.plan.chat}{tokens:,} tokens: " if tokens else ": "
        line = Text.assemble((f"{model}prompt{facts}", "dim"), (said, "bold"))
        self.query_one("#prompt", Static).update(line, layout=False)

    def _tell_plan(self) -> None:
        self.query_one("#planned", Static).update(self._planned, layout=False)

    def _tell_legend(self) -> None:
        block = max((side.plan.block for side in self.texts.sides), default=1)
        segments = legend(self._shade, block, not self.app.no_color)
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments), no_wrap=True)
        self.query_one("#legend", Static).update(line, layout=False)

    def _draw(self) -> None:
        """The chart, up to the pass that is shown."""
        lines = [line_of(self._measure, NAMES[str(p.id)], p.replay, self.step, CHARTED) for p in self._panes]
        self.query_one(PassChart).show(MEASURES[self._measure], X_LABELS[self._measure], lines)
        self._drawn = time.monotonic()
