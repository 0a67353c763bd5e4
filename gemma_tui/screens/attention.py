"""Attention: what a model does inside a text, one key for each view."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.binding import Binding
from textual.events import Resize
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Static

from gemma_tui.errors import UsageError
from gemma_tui.pair_grid import PairGrid, zoomed
from gemma_tui.screens.exporting import ask_and_export
from gemma_tui.screens.head_study import FollowedStudy, StudyDialog, is_study, small_plan
from gemma_tui.screens.workbench import Workbench
from gemma_tui.session import NO_MODEL
from gemma_tui.studies.attention.heads import METRICS, head_name
from gemma_tui.studies.attention.looking import Board, signed
from gemma_tui.studies.attention.pairs import find_token
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.plan import Option, command, honoured
from gemma_tui.text import one_line
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.heatmap import HeatMap
from gemma_tui.widgets.pair_map import PairMap
from gemma_tui.widgets.plan_form import Field, PlanForm

if TYPE_CHECKING:
    from gemma_tui.session import Job

SECONDS = 0.2
JUMP = Option("jump", str, "", "a layer (L5), a head (L5.H1), a position (34) or a token of the text")
HEAD = re.compile(r"[lL]?(\d{1,3})\.[hH]?(\d{1,3})")
LAYER = re.compile(r"[lL](\d{1,3})")
NUMBER = re.compile(r"\d{1,9}")
WHOLE = {"queries": "", "keys": ""}
"""A head's map of the whole text."""

NOWHERE = {"position": "", "key_position": ""}
READ = "table key"
"""The part with what a query reads, before the one with who reads a key."""

GAMMAS = (1.0, 0.5, 0.25)
WITH_POSITION = ("lens", "attribution", "neurons", "circuits", "rollout")
"""Views of a position of the text, beside that of one head."""

KEYS = (
    ("g", "view('heads')", "Heads", True, "All heads, coloured by a metric"),
    ("h", "head", "Head", True, "The head under the cursor, query by key"),
    ("l", "view('local-global')", "Local", True, "Local against global layers"),
    ("k", "view('sinks')", "Sinks", True, "Sinks and massive activations"),
    ("n", "view('lens')", "Lens", False, "Logit lens, layer by position"),
    ("a", "view('attribution')", "Attribution", False, "What each part of the model adds to a logit"),
    ("E", "view('neurons')", "Neurons", False, "A score by rotary pair, and which wavelengths heads read by"),
    ("C", "view('circuits')", "Circuits", False, "What each head of a layer does with a token alone"),
    ("r", "view('rollout')", "Rollout", False, "Where the weights lead back to, through all layers"),
    ("t", "view('types')", "Types", False, "Types of heads, on repeated random tokens"),
    ("s", "view('scan')", "Scan", False, "Each head ablated in turn"),
    ("b", "ablate", "Ablate", False, "Take away the head under the cursor"),
    ("w", "second('patching')", "Patch", False, "Put values of a second text into this one"),
    ("d", "second('differences')", "Differences", False, "How heads differ: another text, model, engine, dtype"),
    ("y", "study", "Study", False, "Mean metrics of all heads over many texts, as a run"),
    ("u", "view('check')", "Check", False, "Hold the weights against transformers' eager attention"),
    ("m", "metric(1)", "Metric", False, "Colour the heads by the next metric"),
    ("f", "filter", "Filter", False, "Keep the heads for which an expression holds"),
    ("z", "zoom(1)", "Zoom in", False, "A head: half the queries and keys, around the cursor"),
    ("Z", "zoom(-1)", "Zoom out", False, "A head: twice the queries and keys"),
    ("R", "shade('per_row')", "Rows", False, "A head: weights over the largest of their row, or as they are"),
    ("0", "shade('without_sink')", "Sink out", False, "A head: take position 0 out of the map, or put it back"),
    ("G", "gamma", "Gamma", False, "A head: weights to the power 1, 0.5 or 0.25, which lifts the small ones"),
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
        """A view is there."""

        def __init__(self, board: Board) -> None:
            super().__init__()
            self.board = board

    def __init__(self) -> None:
        super().__init__()
        self.board = Board()
        self._seen: object = None
        """The loaded model that was looked at last, or that this was tried with."""
        self._position: int | None = None
        """Where the cursor goes once the head is shown."""
        self._study: FollowedStudy | None = None
        self._job: Job | None = None
        """Of the study that was followed last."""

    def body(self) -> Iterable[Widget]:
        """What is looked at, the figure, and the form, which is hidden at first."""
        yield Static("", id="looked", markup=False)
        yield FigureView(id="figure")
        form = PlanForm(AttentionPlan, id="attention-plan")
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
        """Look at once at a model that is new; show a study that began elsewhere, even if it has ended."""
        session = self.bench.session
        for job in (*session.jobs, session.newest):
            if job is not None and job.kind == "study" and job is not self._job:
                self._begin_to_follow(job)
        self._look_at_new()

    def on_resize(self, event: Resize) -> None:
        """Wide and narrow show different parts."""
        self.call_after_refresh(self._figure.relayout)

    def command(self) -> str:
        """The command that shows the same."""
        if self._study is not None and self._study.command:
            return self._study.command
        session = self.bench.session
        plan = honoured(AttentionPlan(**self._form.values))
        verb = ("attention", session.place.model or "nano", "--engine", session.engine, "--view", plan.view)
        return command(verb, replace(plan, view=AttentionPlan.view))

    def action_view(self, view: str) -> None:
        """Show another view of the text."""
        self._set(view=view)

    def action_head(self) -> None:
        """Show the head that the cursor is on."""
        layer, head = self._under_cursor()
        self._set(view="head", layer=layer, head=head, **NOWHERE, **WHOLE)

    def action_ablate(self) -> None:
        """Take away the head that the cursor is on, and see what that does."""
        self._set(view="ablation", ablate=head_name(*self._under_cursor()))

    def action_metric(self, by: int) -> None:
        """Colour the heads by another metric."""
        names, now = list(METRICS), self._form.values["metric"]
        following = names[(names.index(now) + by) % len(names)] if now in names else names[0]
        if self._study is not None:
            self._form.set("metric", following)
            self._show_study(self._study)
        else:
            self._set(view="heads", metric=following if self.board.plan.view == "heads" else names[0])

    def action_zoom(self, by: int) -> None:
        """Show half as many queries and keys around the cursor (1), or twice as many (-1)."""
        if (grid := self._pairs()) is None:
            return
        if by > 0 and not grid.pooled:
            self.bench.tell("each cell is one query and one key already")
            return
        length, pair = len(self.board.labels), self.query_one(PairMap).pair
        spans = [(int(edges[0]), int(edges[-1])) for edges in (grid.row_edges, grid.column_edges)]
        if by < 0 and all(span == (0, length) for span in spans):
            self.bench.tell("this is the whole text already")
            return
        found = [zoomed(span, at, 0.5**by, length) for span, at in zip(spans, pair, strict=True)]
        queries, keys = ("" if (a, b) == (0, length) else f"{a}:{b}" for a, b in found)
        self._set(view="head", queries=queries, keys=keys)

    def action_shade(self, name: str) -> None:
        """Turn on or off what changes the values of a head's map."""
        if self._pairs() is not None:
            self._set(view="head", **{name: not self._form.values[name]})

    def action_gamma(self) -> None:
        """Show the weights of a head to the next power."""
        if self._pairs() is not None:
            now = self._form.values["gamma"]
            place = GAMMAS.index(now) + 1 if now in GAMMAS else 0
            self._set(view="head", gamma=GAMMAS[place % len(GAMMAS)])

    def _pairs(self) -> PairGrid | None:
        """The map of the head that is shown; where none is, that is told."""
        grid = self.board.pairs()
        if grid is None:
            self.bench.tell("this key is for one head: press h first", "warning")
        return grid

    def action_study(self) -> None:
        """Study the heads over many texts, or go on with that; if it goes on already, show it."""
        session = self.bench.session
        for job in session.jobs:
            if job.kind == "study":
                if self._study is None:
                    self._begin_to_follow(job)
                return

        def named(answer: tuple[str, str] | None) -> None:
            if answer is not None and answer[0]:
                self.bench.attempt(lambda: begin(*answer))

        def begin(texts: str, over: str) -> None:
            if not is_study(texts):
                self._begin_to_follow(session.begin("heads", small_plan(session.place.model, texts, over)))
            elif over:
                raise UsageError(f"over: {texts} goes on as it was begun: leave the run out")
            else:
                self._begin_to_follow(session.resume("heads", texts))

        self.app.push_screen(StudyDialog(), named)

    def _begin_to_follow(self, job: Job) -> None:
        self._study, self._job = FollowedStudy(job), job
        self._tell()

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

    def action_edit(self, name: str, **also: Any) -> None:
        """Type a value of the plan, and look again."""

        def changed(text: str | None) -> None:
            if text is not None:
                # Positions are those of the text before.
                anew = {"text_file": "", **NOWHERE, **WHOLE} if name == "text" else {}
                self._set(**{**anew, name: text, **also})

        self.app.push_screen(Field(self._form.options[name], self._form.values[name]), changed)

    def action_filter(self) -> None:
        """Type which heads are kept."""
        self.action_edit("where", view="heads")

    def action_second(self, view: str) -> None:
        """Show a view that takes a second text, and ask for it where there is neither that nor another side."""
        values = self._form.values
        others = ("other_text", "other_model", "other_engine", "other_dtype")
        if any(values[name] for name in (others if view == "differences" else others[:1])):
            self._set(view=view)
            return
        self._form.set("view", view)
        if view == "differences":
            self.bench.tell("with a second text; p takes another model, engine or dtype in place of it")
        self.action_edit("other_text")

    def action_jump(self) -> None:
        """Go to what is typed."""

        def typed(text: str | None) -> None:
            if text and text.strip():
                self.bench.attempt(lambda: self._jump(text.strip()))

        self.app.push_screen(Field(JUMP, ""), typed)

    def action_plan(self) -> None:
        """All options as a form; the key that opened it closes it and looks again."""
        if self._form.display:
            self._look()
        else:
            self._open_plan(True)
            self._form.focus()

    def action_export(self) -> None:
        """Write the figure to a file."""
        figure = self.board.figure
        if figure is None:
            self.bench.tell("nothing is shown yet", "warning")
        else:
            ask_and_export(self.bench, lambda: signed(figure), "attention.html")

    def action_stop(self) -> None:
        """Break off what is computed."""
        job = self.bench.session.place.job
        if job is not None and job.kind in ("look", "study"):
            job.control.stop.set()
        else:
            self.bench.tell("nothing is computed here", "warning")

    def job_ended(self) -> None:
        """A model that was loaded meanwhile is looked at."""
        self._look_at_new()

    def on_attention_screen_looked(self, message: Looked) -> None:
        """Show what was found."""
        before, plan = self.board.plan, message.board.plan
        self.board, figure, self._study = message.board, message.board.figure, None
        if figure is None:
            return
        pairs = self.board.pairs()
        self._figure.show(figure, pairs)
        if pairs is not None and self._position is not None:
            self._go(self._position)
        elif before.view == plan.view and plan.key_position and _read(plan) != _read(before):
            self._figure.turn_to(READ)
        self._position = None
        self._tell()

    def on_pair_map_chosen(self, message: PairMap.Chosen) -> None:
        """Show what a query reads, and who reads a key."""
        pair = str(message.query), str(message.key)
        if _read(self.board.plan) == pair:
            self._figure.turn_to(READ)
            self._tell()
        else:
            self._set(view="head", position=pair[0], key_position=pair[1])

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Open the head of a row."""
        row = event.data_table.get_row(event.row_key)
        if found := HEAD.fullmatch(str(row[0])):
            self._set(view="head", layer=int(found[1]), head=int(found[2]), **NOWHERE, **WHOLE)

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
        place = self.bench.session.place

        def begin() -> None:
            self.bench.session.look(self._form.build(), lambda board: self.post_message(self.Looked(board)))

        self._open_plan(False)
        if place.job is not None and place.job.kind == "load":
            self._seen = None  # looked at once it is there
        else:
            self._seen = place.info
            self.bench.attempt(begin)
        self._tell()

    def _look_at_new(self) -> None:
        """Look again where another model is loaded, or another engine chosen, and nothing else runs there."""
        place = self.bench.session.place
        if self._study is not None:
            self._seen = place.info  # a study loads its model anew, and stays on the screen
        if place.info is not None and place.info is not self._seen and place.job is None and not self._form.display:
            self._look()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys of what is not seen while the plan is open are off, which makes room for the plan's own."""
        return not (action in ("turn", "jump") and self.is_mounted and self._form.display)

    def _open_plan(self, shown: bool) -> None:
        if self._form.display != shown:
            self._form.display, self._figure.display = shown, not shown
            self.query_one("#explained").display = shown
            self.refresh_bindings()  # lays out the footer anew
        if not shown:
            self._figure.focus_part()

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
        if study.found is not None:
            place = self.bench.session.place
            self.board = study.board(place.model, study.job.engine, self._form.values["metric"])
            assert self.board.figure is not None
            # Under one title all along, so that the part that is seen stays.
            self._figure.show(replace(self.board.figure, title=f"heads over {study.texts}"))
        self._tell()

    def _under_cursor(self) -> tuple[int, int]:
        """Layer and head of the map's cursor, or those of the plan."""
        values, map_ = self._form.values, self.query_one(HeatMap)
        if map_.display and map_.heat.values.size:
            place = f"{map_.heat.rows[map_.row]}.{map_.heat.columns[map_.column].split()[0]}"
            if found := re.fullmatch(r"L(\d+)\.H(\d+)", place):
                return int(found[1]), int(found[2])
        return int(values["layer"]), int(values["head"])

    def _jump(self, text: str) -> None:
        if not self.board.labels:
            raise UsageError("nothing is shown yet: press g to look at all heads")
        layer, head = self._under_cursor()
        if found := HEAD.fullmatch(text):
            self._set(view="head", **NOWHERE, **self._there(int(found[1]), int(found[2])))
        elif found := LAYER.fullmatch(text):
            self._set(view="head", **NOWHERE, **self._there(int(found[1]), head))
        elif self.board.plan.view == "head":
            self._go(self._place(text))
        elif self.board.plan.view in WITH_POSITION:
            self._set(position=str(self._place(text)))
        else:
            self._position = self._place(text)
            self._set(view="head", **NOWHERE, **WHOLE, **self._there(layer, head))

    def _there(self, layer: int, head: int) -> dict[str, int]:
        """A head of the model that is shown."""
        layers, heads = len(self.board.local), self.board.heads
        if layer >= layers or head >= heads:
            last = head_name(layers - 1, heads - 1)
            raise UsageError(f"{head_name(layer, head)} is not there: the heads are L0.H0 to {last}")
        return {"layer": layer, "head": head}

    def _place(self, text: str) -> int:
        """The position of a token after the cursor, or one that is given as a number."""
        labels = self.board.labels
        if NUMBER.fullmatch(text) and int(text) < len(labels):
            return int(text)
        pairs = self.query_one(PairMap)
        try:
            return find_token(labels, text, pairs.pair[0])
        except UsageError:
            return find_token(labels, text)  # round the end

    def _go(self, position: int) -> None:
        """Put the cursor on a query; if the part that is shown has it not, on the whole text."""
        pairs = self.query_one(PairMap)
        first, *_, end = pairs.grid.row_edges
        if not first <= position < end:
            self._position = position
            self._set(view="head", **WHOLE)
            return
        row, _ = pairs.grid.cell_of(position, 0)
        pairs.go(row, pairs.column)
        pairs.focus()

    def _tell(self) -> None:
        """One line: the text, and what is seen of it."""
        board, place, study = self.board, self.bench.session.place, self._study
        if study is not None:
            begins = f"studying heads: {study.job.detail or 'begins'}"
            parts = [board.figure.title if board.figure and study.found else begins, self._figure.place, study.job.run]
            line = " · ".join(part for part in (*parts, study.texts) if part)
        elif board.figure is None:
            line = "press g to look at all heads" if place.model else NO_MODEL
        else:
            text = board.plan.text_file or board.plan.text
            other = (board.model, board.engine) != (place.model, self.bench.session.engine)
            parts = [f"OF {board.model} ON {board.engine}"] if other else []
            parts += [board.figure.title, self._figure.place, f"{len(board.labels):,} tokens", text]
            line = " · ".join(part for part in parts if part)
        self.query_one("#looked", Static).update(one_line(line, 200), layout=False)


def _read(plan: AttentionPlan) -> tuple[str, str]:
    """The query and the key whose tables are shown."""
    return plan.position, plan.key_position
