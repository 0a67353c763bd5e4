"""A study of heads over many texts, as the attention screen follows it while it grows."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs.store import Row, RunStore
from gemma_tui.runs.tail import Tail
from gemma_tui.studies.attention.looking import Board
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.attention.survey import STUDY, HeadStudy, HeadStudyPlan, study_figure, study_of
from gemma_tui.widgets.plan_form import Line

if TYPE_CHECKING:
    from gemma_tui.session import Job

SECONDS = 2.0
"""Between two readings of the store."""

ROWS, LENGTH = 64, 256
VIEW = "study"


def bundled_texts() -> str:
    """The file that is offered."""
    return str(paths.assets() / "corpus" / "valid.jsonl")


def small_plan(model: str, texts: str, over: str = "") -> HeadStudyPlan:
    """The study that a key starts: of a model, or over the checkpoints of a run."""
    return HeadStudyPlan(model or HeadStudyPlan.model, texts, ROWS, LENGTH, over=over)


def is_study(name: str) -> bool:
    """Whether a run is a study of heads, so that its name is no texts'."""
    try:
        with closing(RunStore()) as store:
            run = store.run(name)
    except GemmaTuiError:
        return False
    return run.study == STUDY and run.run_id == name


class StudyDialog(ModalScreen[tuple[str, str] | None]):
    """What heads are studied over: texts, or a study to go on with; and a run whose checkpoints are gone over."""

    BINDINGS = [
        Binding("escape", "cancel", "Back", id="study.cancel"),
        Binding("down", "app.focus_next", "Next line", id="study.next"),
        Binding("up", "app.focus_previous", "Line before", id="study.previous"),
    ]
    DEFAULT_CSS = """
    StudyDialog { align: center middle; }
    StudyDialog > Vertical {
        width: 72; max-width: 96%; height: auto;
        border: round $accent; padding: 0 1; background: $surface;
    }
    StudyDialog Label { width: 1fr; }
    """

    def compose(self) -> ComposeResult:
        """Two lines, each with what it is for."""
        with Vertical():
            yield Label(
                "study: texts to study the heads over (.jsonl or .txt, a folder, or hf:REPO); or a study of heads that "
                "was stopped, such as heads-1, to go on with it",
                markup=False,
            )
            yield Line(bundled_texts(), compact=True, select_on_focus=False, id="study-texts")
            yield Label("over: a training run, at each checkpoint kept of it; empty for the model", markup=False)
            yield Line("", compact=True, select_on_focus=False, id="study-over")
            yield Label("enter begins, ↓ and ↑ change the line, escape goes back", markup=False)

    def on_input_submitted(self) -> None:
        """Close with both lines."""
        texts, over = (self.query_one(f"#study-{name}", Line).value.strip() for name in ("texts", "over"))
        self.dismiss((texts, over))

    def action_cancel(self) -> None:
        """Close without them."""
        self.dismiss(None)


@dataclass
class FollowedStudy:
    """A study's job, and what it has found so far.

    Attributes:
        texts: where the texts come from; empty until the run is there.
        command: the command that does the same, likewise.
    """

    job: Job
    texts: str = ""
    command: str = ""
    found: HeadStudy | None = None
    _rows: list[Row] = field(default_factory=list)
    _tail: Tail | None = None
    _looked: float = -math.inf
    _over: bool = False

    @property
    def fruitless(self) -> bool:
        """Whether it has ended and found nothing."""
        return self._over and self.found is None

    def read(self) -> bool:
        """Read the store, if it is time and there are new texts; returns whether there were.

        Raises:
            GemmaTuiError: the store cannot be read.
        """
        ended = self.job.future.done()
        if self._over or (time.monotonic() - self._looked < SECONDS and not ended):
            return False
        self._over = ended
        if not self.job.run:
            return False
        self._looked = time.monotonic()
        with closing(RunStore()) as store:
            run = store.run(self.job.run)
            self.command, self.texts = run.command, str(run.plan.get("study", ""))
            # Only what is new: a text of a model with many heads is a long line.
            self._tail = self._tail or Tail(run.run_id)
            new = self._tail.read(store)
        self._rows += new
        if all(row.kind != STUDY for row in new):
            return False
        self.found = study_of(run.run_id, self._rows)
        return True

    def board(self, model: str, engine: str, metric: str) -> Board:
        """The means of a metric as a view.

        Raises:
            AssertionError: nothing was found yet.
        """
        assert self.found is not None
        config = self.found.config
        figure = study_figure(self.found, metric)
        local = [config.is_local(layer) for layer in range(config.num_hidden_layers)]
        plan = AttentionPlan(view=VIEW, metric=metric)
        return Board(figure, plan, model, engine, [], local, config.num_attention_heads, config.sliding_window)
