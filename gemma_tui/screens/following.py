"""What the screens share that list runs of some studies and follow one of them: its figure, while it grows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from textual.events import Resize
from textual.message import Message
from textual.widgets import DataTable

from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.figure import Figure
from gemma_tui.runs.store import Run, RunStore
from gemma_tui.screens import steering
from gemma_tui.screens.followed_run import LISTED, FollowedRun
from gemma_tui.screens.workbench import Workbench
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.run_table import RunTable

if TYPE_CHECKING:
    from gemma_tui.session import Job

SECONDS = 1.0
"""Between two looks at the store."""


class FollowingScreen(Workbench):
    """A table ``#studies`` of runs and a ``FigureView`` of the one that is shown, kept up to date.

    Attributes:
        STUDIES: of the runs that are listed.
        run_shown: as the store has it; None before it is read.
    """

    STUDIES: tuple[str, ...] = ()

    class Grown(Message):
        """A run was read."""

        def __init__(self, followed: FollowedRun, error: str) -> None:
            super().__init__()
            self.followed, self.error = followed, error

    def __init__(self) -> None:
        super().__init__()
        self.run_shown: Run | None = None
        self._followed: FollowedRun | None = None
        self._awaited: Job | None = None
        """What was started, until its run is shown, or another one."""
        self._store: RunStore | None = None

    def on_mount(self) -> None:
        """Open the store, and look at it from now on."""
        try:
            self._store = RunStore()
        except GemmaTuiError as error:
            self.bench.tell(str(error), "error")
            return
        self.set_interval(SECONDS, self._look)
        self._look()

    def on_unmount(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()

    def job_ended(self) -> None:
        """The last of a run is there."""
        self._look()

    def on_resize(self, event: Resize) -> None:
        """Wide and narrow show different parts."""
        self.call_after_refresh(self._figure.relayout)

    def action_pause(self) -> None:
        """Pause the run that is shown, of whatever process, or let it go on."""
        steering.pause(self.bench, self._job_shown(), self.run_shown, self._store)

    def action_stop(self) -> None:
        """End what is shown."""
        steering.stop(self.bench, self._job_shown(), self.run_shown, self._store)

    def action_turn(self) -> None:
        """Show the next part of the figure."""
        self._figure.turn()
        self._tell()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show the run under the cursor."""
        if event.data_table.id == "studies" and event.row_key.value is not None:
            self._show(event.row_key.value)

    def on_following_screen_grown(self, message: Grown) -> None:
        """Draw what was read, if it is still what is shown."""
        if message.error:
            self.bench.tell(message.error, "warning")
        if message.followed is self._followed:
            self._draw(message.followed.figure or Figure(""), message.followed.name)

    @property
    def _figure(self) -> FigureView:
        return self.query_one(FigureView)

    def _chosen(self) -> Run | None:
        """The run under the cursor of the list, or else the one that is shown."""
        name = self.query_one(RunTable).chosen
        with suppress(EngineError):
            return self._store.run(name) if name and self._store else self.run_shown
        return self.run_shown

    def _job_shown(self) -> Job | None:
        """What is starting, or the job of the run that is shown."""
        return self._awaited or (self.bench.session.job_of(self.run_shown.run_id) if self.run_shown else None)

    def _show(self, name: str) -> None:
        """Show a run; one that is shown already goes on."""
        self._awaited = None
        if self._followed is None or self._followed.name != name:
            self._followed, self.run_shown = FollowedRun(name), None
            self._draw(Figure(""), name)
        self._look()
        self.query_one(RunTable).go_to(name)

    def _draw(self, figure: Figure, title: str) -> None:
        """Under one title all along, so that the part that is seen stays."""
        self._figure.show(replace(figure, title=title))
        self._tell()

    def _look(self) -> None:
        """Bring the list up to date, and let a thread read the run that is shown if it has grown."""
        store = self._store
        if store is None or not self.is_current:
            return
        if self._awaited is not None and self._awaited.run:
            self._show(self._awaited.run)
            return
        if not self.bench.attempt(lambda: self._read(store)):
            self._store = None
        self._tell()

    def _read(self, store: RunStore) -> None:
        runs, followed = store.runs(LISTED, self.STUDIES), self._followed
        self.query_one(RunTable).show((), runs)
        if followed is None:
            return
        self.run_shown = next((run for run in runs if run.run_id == followed.name), None)
        if self.run_shown is not None:
            followed.follow(self.run_shown, lambda error: self.post_message(self.Grown(followed, error)))

    def _tell(self) -> None:
        """Say in one line what is shown."""
