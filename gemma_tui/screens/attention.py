"""Attention: what a model does inside a text, one key for each view."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from textual.binding import Binding
from textual.events import Resize
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from gemma_tui.errors import UsageError
from gemma_tui.exports import export
from gemma_tui.pair_grid import PairGrid
from gemma_tui.screens.head_study import TEXTS, VIEW, FollowedStudy, bundled_texts, small_plan
from gemma_tui.screens.workbench import Workbench
from gemma_tui.studies.attention.heads import METRICS, head_name
from gemma_tui.studies.attention.looking import Board
from gemma_tui.studies.attention.plan import SAMPLE, AttentionPlan
from gemma_tui.studies.plan import Option, command
from gemma_tui.text import one_line
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.heatmap import HeatMap
from gemma_tui.widgets.pair_map import PairMap
from gemma_tui.widgets.plan_form import Field, PlanForm

SECONDS = 0.2
JUMP = Option("jump", str, "", "a layer (L5), a head (L5.H1), a position (34) or a token of the text")
EXPORT = Option("export", str, "attention.html", "file to write: .html, .svg, .npz or .json")
GRIDS = ("heads", "types", "sinks", "attribution", "scan", "differences", "check", VIEW)
"""Views whose map is layers × heads."""


KEYS = (
    ("g", "view('heads')", "Heads", True, "All heads, coloured by a metric"),
    ("h", "head", "Head", True, "The head under the cursor, query by key"),
    ("l", "view('local-global')", "Local", True, "Local against global layers"),
    ("k", "view('sinks')", "Sinks", True, "Sinks and massive activations"),
    ("n", "view('lens')", "Lens", True, "Logit lens, layer by position"),
    ("a", "view('attribution')", "Attribution", False, "What each part of the model adds to a logit"),
    ("t", "view('types')", "Types", False, "Types of heads, on repeated random tokens"),
    ("s", "view('scan')", "Scan", False, "Each head ablated in turn"),
    ("b", "ablate", "Ablate", False, "Take away the head under the cursor"),
    ("w", "view('patching')", "Patch", False, "Put values of a second text into this one"),
    ("d", "view('differences')", "Differences", False, "How heads differ: another text, model, engine, dtype"),
    ("y", "study", "Study", False, "Mean metrics of all heads over many texts, as a run"),
    ("u", "view('check')", "Check", False, "Hold the weights against transformers' eager attention"),
    ("m", "metric(1)", "Metric", False, "Colour the heads by the next metric"),
    ("f", "edit('where')", "Filter", False, "Keep the heads for which an expression holds"),
    ("v", "turn", "Part", True, "The next map, chart or table of the view"),
    ("slash", "jump", "Jump", True, "Go to a layer, head, position or token"),
    ("left_square_bracket", "step(-1)", "Head before", False, "The head before this one"),
    ("right_square_bracket", "step(1)", "Next head", False, "The head after this one"),
    ("left_curly_bracket", "layer(-1)", "Layer before", False, "The same head, a layer lower"),
    ("right_curly_bracket", "layer(1)", "Next layer", False, "The same head, a layer higher"),
    ("i", "edit('text')", "Text", True, "Type another text"),
    ("p", "plan", "Plan", False, "All options; once more looks again"),
    ("o", "export", "Export", False, "Write the view to a file"),
    ("x", "stop", "Stop", False, "Break off what is computed"),
    ("enter", "head", "Open", False, "The head under the cursor"),
)
"""Key, action, name, whether the footer has room for it, and what it does."""

DISPLAYED = {
    "slash": "/", "left_square_bracket": "[", "right_square_bracket": "]", "left_curly_bracket": "{",
    "right_curly_bracket": "}",
}  # fmt: skip


class AttentionScreen(Workbench):
    """A text, a view of it, and the plan of both as a form behind a key."""

    MODE = "attention"
    BINDINGS = [
        Binding(key, action, name, id=f"attention.{name.lower().replace(' ', '_')}", show=shown, tooltip=meaning,
                key_display=DISPLAYED.get(key))
        for key, action, name, shown, meaning in KEYS
    ]  # fmt: skip

    class Looked(Message):
        """A view is on the board."""

    def __init__(self) -> None:
        super().__init__()
        self.board = Board()
        self._waiting = False
        self._study: FollowedStudy | None = None

    def body(self) -> Iterable[Widget]:
        """What is looked at, the figure, and the form, which is hidden at first."""
        yield Static("", id="looked", markup=False)
        yield FigureView(id="figure")
        form = PlanForm(AttentionPlan, id="attention-plan")
        form.values["text"] = SAMPLE
        form.display = False
        yield form
        yield Static("", id="explained", markup=False)

    def on_mount(self) -> None:
        """Follow what is computed."""
        self.query_one("#explained").display = False
        self._tell()
        self.set_interval(SECONDS, self._tell)
        self.set_interval(SECONDS, self._follow)

    def on_screen_resume(self) -> None:
        """Look at once, where there is a model and nothing was looked at yet."""
        if self.board.figure is None and self.bench.session.place.model and not self.bench.session.place.job:
            self._look()

    def on_resize(self, event: Resize) -> None:
        """Wide and narrow show different parts."""
        self.call_after_refresh(self._figure.relayout)

    def command(self) -> str:
        """The command that shows the same."""
        if self._study is not None and self._study.command:
            return self._study.command
        name = self.bench.session.place.model or "nano"
        return command(("attention", name, "--engine", self.bench.session.engine), AttentionPlan(**self._form.values))

    def action_view(self, view: str) -> None:
        """Show another view of the text."""
        self._set(view=view)

    def action_head(self) -> None:
        """Show the head that the cursor is on."""
        layer, head = self._under_cursor()
        self._set(view="head", layer=layer, head=head, position="")

    def action_ablate(self) -> None:
        """Take away the head that the cursor is on, and see what that does."""
        self._set(view="ablation", ablate=head_name(*self._under_cursor()))

    def action_metric(self, by: int) -> None:
        """Colour the heads by another metric."""
        names = list(METRICS)
        now = self._form.values["metric"]
        metric = names[(names.index(now) + by) % len(names)] if now in names else names[0]
        if self._study is None:
            self._set(view="heads", metric=metric)
        else:
            self._form.set("metric", metric)
            self._show_study(self._study)

    def action_study(self) -> None:
        """Study the heads over many texts; if that goes on already, show it."""
        session = self.bench.session
        going_on = [job for job in session.jobs if job.kind == "study"]
        if going_on:
            self._study = self._study or FollowedStudy(going_on[0], going_on[0].run)
            return

        def named(texts: str | None) -> None:
            if texts:
                self.bench.attempt(lambda: begin(texts.strip()))

        def begin(texts: str) -> None:
            self._study = FollowedStudy(session.study(small_plan(session.place.model, texts)), texts)
            self._tell()

        self.app.push_screen(Field(TEXTS, bundled_texts()), named)

    def action_step(self, by: int) -> None:
        """The next head, or the one before, going on to other layers."""
        layers, heads = max(1, len(self.board.local)), max(1, self.board.heads)
        layer, head = self._under_cursor()
        layer, head = divmod((layer * heads + head + by) % (layers * heads), heads)
        self._set(view="head", layer=layer, head=head)

    def action_layer(self, by: int) -> None:
        """The same head of the next layer, or of the one before."""
        layer, head = self._under_cursor()
        self._set(view="head", layer=(layer + by) % max(1, len(self.board.local)), head=head)

    def action_turn(self) -> None:
        """Show the next part of the view."""
        self._figure.turn()
        self._tell()

    def action_edit(self, name: str) -> None:
        """Type a value of the plan, and look again."""
        option = self._form.options[name]

        def changed(text: str | None) -> None:
            if text is not None:
                self._set(**{name: text, **({"text_file": ""} if name == "text" else {})})

        self.app.push_screen(Field(option, self._form.values[name]), changed)

    def action_jump(self) -> None:
        """Go to what is typed."""

        def typed(text: str | None) -> None:
            if text:
                self.bench.attempt(lambda: self._jump(text.strip()))

        self.app.push_screen(Field(JUMP, ""), typed)

    def action_plan(self) -> None:
        """All options as a form; the key that opened it closes it and looks again."""
        form = self._form
        shown = not form.display
        form.display, self._figure.display = shown, not shown
        self.query_one("#explained").display = shown
        if shown:
            form.focus()
        else:
            self._look()

    def action_export(self) -> None:
        """Write the figure to a file."""
        figure = self.board.figure
        if figure is None:
            self.bench.tell("nothing is shown yet", "warning")
            return

        def named(name: str | None) -> None:
            if name:
                path = Path(name).expanduser()
                if self.bench.attempt(lambda: export(figure, path)):
                    self.bench.tell(f"written: {path}")

        self.app.push_screen(Field(EXPORT, EXPORT.default), named)

    def action_stop(self) -> None:
        """Break off what is computed."""
        job = self.bench.session.place.job
        if job is not None and job.kind in ("look", "study"):
            job.control.stop.set()
        else:
            self.bench.tell("nothing is computed here", "warning")

    def job_ended(self) -> None:
        """A model that was loaded meanwhile is looked at, if that is awaited."""
        if self._waiting and self.bench.session.place.model and self.bench.session.place.job is None:
            self._look()

    def on_attention_screen_looked(self) -> None:
        """Show what is on the board."""
        figure, self._study = self.board.figure, None
        if figure is None:
            return
        pairs = _pairs(self.board) if self.board.plan.view == "head" else None
        self._figure.show(figure, pairs)
        self._tell()

    def on_plan_form_explained(self, event: PlanForm.Explained) -> None:
        """What the option under the cursor does."""
        self.query_one("#explained", Static).update(event.text, layout=False)

    @property
    def _form(self) -> PlanForm[AttentionPlan]:
        return self.query_one(PlanForm)

    @property
    def _figure(self) -> FigureView:
        return self.query_one(FigureView)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            self._form.set(name, value)
        self._look()

    def _look(self) -> None:
        def begin() -> None:
            plan: AttentionPlan = self._form.build()
            self.bench.session.look(plan, self.board, lambda: self.post_message(self.Looked()))
            self._waiting = False

        session = self.bench.session
        loading = session.place.job is not None and session.place.job.kind == "load"
        self._waiting = loading
        if not loading:
            self.bench.attempt(begin)
        self._tell()

    def _follow(self) -> None:
        """Show what a study has found since."""
        study = self._study
        if study is None or not self.is_current:
            return

        def read() -> None:
            if study.read():
                self._show_study(study)

        if not self.bench.attempt(read) or study.fruitless:
            self._study = None

    def _show_study(self, study: FollowedStudy) -> None:
        if (figure := study.put(self.board, self._form.values["metric"])) is not None:
            self._figure.show(figure)
        self._tell()

    def _under_cursor(self) -> tuple[int, int]:
        """Layer and head of the map's cursor, or those of the plan."""
        values = self._form.values
        if self.board.plan.view in GRIDS and self.board.figure is not None and self.board.figure.heats:
            heat = self.query_one(HeatMap)
            if heat.display and heat.row < len(self.board.local):
                return heat.row, heat.column
        return int(values["layer"]), int(values["head"])

    def _jump(self, text: str) -> None:
        if found := re.fullmatch(r"[lL]?(\d{1,3})\.[hH]?(\d{1,3})", text):
            self._set(view="head", layer=int(found[1]), head=int(found[2]))
        elif found := re.fullmatch(r"[lL](\d{1,3})", text):
            self._set(view="head", layer=int(found[1]))
        elif self.board.plan.view == "head":
            self._go(self._position(text))
        else:
            self._set(position=text)

    def _position(self, text: str) -> int:
        """The position of a token after the cursor, or one that is given as a number."""
        labels = self.board.labels
        if text.isdecimal() and int(text) < len(labels):
            return int(text)
        pairs = self.query_one(PairMap)
        after = int(pairs.grid.row_edges[pairs.row])
        wanted = text.replace(" ", "▁").casefold()
        order = [*range(after + 1, len(labels)), *range(after + 1)]
        for position in order:
            if wanted in labels[position].casefold():
                return position
        raise UsageError(f"{one_line(text, 40)!r} is not in the text: type a token or a position to {len(labels) - 1}")

    def _go(self, position: int) -> None:
        pairs = self.query_one(PairMap)
        row = int(pairs.grid.row_edges.searchsorted(position, side="right")) - 1
        pairs.go(row, pairs.column)
        pairs.focus()

    def _tell(self) -> None:
        """One line: the text, and what is seen of it."""
        values = self._form.values
        text = values["text_file"] or values["text"]
        tokens = f"{len(self.board.labels):,} tokens" if self.board.labels else "not read yet"
        where = self._figure.place
        title = self.board.figure.title if self.board.figure is not None else "press g to look at all heads"
        if (study := self._study) is not None:
            title = title if study.found is not None else f"studying heads: {study.job.detail or 'begins'}"
            tokens, text = study.job.run or "begins", study.texts
        line = one_line(f"{title}" + (f" · {where}" if where else "") + f" · {tokens} · {text}", 200)
        self.query_one("#looked", Static).update(line, layout=False)


def _pairs(board: Board) -> PairGrid | None:
    """The map of a head, as its widget shows it."""
    figure, plan = board.figure, board.plan
    if figure is None or "weights" not in figure.arrays:
        return None
    weights, labels = figure.arrays["weights"], board.labels
    window = board.window if board.local[plan.layer] else None
    changed = plan.per_row or plan.gamma != 1
    shades = figure.arrays["values"] if changed else None
    shading = ", ".join(
        part for part in ("rows normalised" if plan.per_row else "", f"γ {plan.gamma:g}" if plan.gamma != 1 else "")
        if part
    )  # fmt: skip
    return PairGrid(
        weights, figure.arrays["query_edges"], figure.arrays["key_edges"], labels, labels, window, plan.pooling,
        shades, shading,
    )  # fmt: skip
