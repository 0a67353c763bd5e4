"""A study of heads over many texts, as the attention screen follows it while it grows."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gemma_tui import paths
from gemma_tui.runs.store import Row, RunStore
from gemma_tui.studies.attention.looking import Board
from gemma_tui.studies.attention.plan import AttentionPlan
from gemma_tui.studies.attention.survey import STUDY, HeadStudy, HeadStudyPlan, study_figure, study_of
from gemma_tui.studies.plan import Option

if TYPE_CHECKING:
    from gemma_tui.session import Job

SECONDS = 2.0
"""Between two readings of the store."""

ROWS, LENGTH = 64, 256
VIEW = "study"
TEXTS = Option("study", str, "", "texts to study the heads over: .jsonl or .txt, a folder, or hf:REPO")


def bundled_texts() -> str:
    """The file that is offered."""
    return str(paths.assets() / "corpus" / "valid.jsonl")


def small_plan(model: str, texts: str) -> HeadStudyPlan:
    """The study that a key starts."""
    return HeadStudyPlan(model, texts, ROWS, LENGTH)


@dataclass
class FollowedStudy:
    """A study's job, and what it has found so far.

    Attributes:
        texts: where the texts come from.
        command: the command that does the same; empty until the run is there.
    """

    job: Job
    texts: str
    command: str = ""
    found: HeadStudy | None = None
    _rows: list[Row] = field(default_factory=list)
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
            self.command = run.command
            # Only what is new: a text of a model with many heads is a long line.
            new = store.events(run.run_id, self._rows[-1].cursor if self._rows else 0)
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
