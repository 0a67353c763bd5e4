"""Downloads as rows: state, bar, bytes, rate, time left; space pauses, x cancels, delete takes ended ones away."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from rich.text import Text
from textual.binding import Binding
from textual.widgets import DataTable

from engines.errors import EngineError
from gemma_tui.output import bytes_text, duration
from gemma_tui.text import one_line

if TYPE_CHECKING:
    from gemma_tui.hub.downloads import Download, Downloads

BAR = 10


class DownloadList(DataTable[Text]):
    """The queue of downloads; hidden while it is empty."""

    BINDINGS = [
        Binding("space", "pause", "Pause", id="downloads.pause",
                tooltip="Pause a download, go on with it, or begin an ended one again"),
        Binding("x", "cancel", "Cancel", id="downloads.cancel", tooltip="Cancel a download; finished files are kept"),
        Binding("delete,backspace", "forget", "Clear", id="downloads.forget", tooltip="Take ended ones off the list"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__(cursor_type="row", show_header=False, cell_padding=1, id="downloads")
        self.downloads: Downloads | None = None

    def on_mount(self) -> None:
        """Lay out the columns."""
        self.add_columns("model", "state", "bar", "bytes", "rate", "detail")

    def fill(self) -> None:
        """Show what the queue is now; rows stay where they are."""
        items = self.downloads.items if self.downloads is not None else []
        self.display = bool(items)
        cells = [_cells(item) for item in items]
        if len(cells) != self.row_count:
            self.clear()
            for row in cells:
                self.add_row(*(Text(cell) for cell in row))
            return
        for at, row in enumerate(cells):
            for column, cell in enumerate(row):
                if self.get_cell_at((at, column)).plain != cell:  # type: ignore[arg-type]
                    self.update_cell_at((at, column), Text(cell), update_width=True)  # type: ignore[arg-type]

    def action_pause(self) -> None:
        """Pause the download under the cursor, go on with it, or begin it again."""
        if self.downloads is None or (item := self.chosen()) is None:
            return
        item.resume() if item.state == "paused" else item.pause()
        with suppress(EngineError):  # it is in the queue already, which is what was wanted
            self.downloads.again(item)
        self.fill()

    def action_cancel(self) -> None:
        """Cancel the download under the cursor."""
        if (item := self.chosen()) is not None:
            item.cancel()
            self.fill()

    def action_forget(self) -> None:
        """Take ended downloads off the list."""
        if self.downloads is not None:
            self.downloads.forget()
            self.fill()

    def chosen(self) -> Download | None:
        """The download under the cursor."""
        items = self.downloads.items if self.downloads is not None else []
        return items[self.cursor_row] if 0 <= self.cursor_row < len(items) else None


def told(item: Download) -> str:
    """All of a row in words."""
    _, state, _, size, rate, detail = _cells(item)
    return f"{one_line(item.request.repo, 100)}  {', '.join(filter(None, (state, size, rate)))}\n{detail}"


def _cells(item: Download) -> tuple[str, ...]:
    full = round(BAR * item.share)
    left = f", {duration(item.seconds_left)} left" if item.seconds_left is not None else ""
    return (
        one_line(item.request.repo, 34),
        item.state,
        "█" * full + "░" * (BAR - full),
        f"{bytes_text(item.done)}/{bytes_text(item.total)}" if item.total else "",
        f"{bytes_text(item.rate)}/s{left}" if item.rate else "",
        one_line(item.detail, 300),
    )
