"""Writing what a screen shows to a file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import EngineError
from gemma_tui.exports import FORMATS, export
from gemma_tui.figure import Figure
from gemma_tui.studies.plan import Option
from gemma_tui.widgets.plan_form import Field

if TYPE_CHECKING:
    from gemma_tui.app import GemmaTui

*ENDINGS, LAST = sorted(FORMATS)


def ask_and_export(bench: GemmaTui, figure: Callable[[], Figure], offered: str) -> None:
    """Ask for a file and write a figure to it, in a thread; what became of it is told.

    Args:
        figure: makes it; called in the thread, where it may take its time.
        offered: the name of the file that stands in the field.
    """
    option = Option("export", str, offered, f"file to write: {', '.join(ENDINGS)} or {LAST}")

    def named(name: str | None) -> None:
        if name:
            write_aside(bench, lambda: write(Path(name).expanduser()))

    def write(path: Path) -> list[str]:
        export(figure(), path)  # the digest of a large model takes seconds
        return [f"written: {path}"]

    bench.push_screen(Field(option, offered), named)


def write_aside(bench: GemmaTui, write: Callable[[], Sequence[str]]) -> None:
    """Write files in a thread; the sentences it returns, or why it could not be done, are told."""

    def written() -> None:
        try:
            said = [(sentence, "information") for sentence in write()]
        except EngineError as error:
            said = [(str(error), "warning")]
        for one in said:
            with suppress(RuntimeError):  # the app has ended
                bench.call_from_thread(bench.tell, *one)

    threading.Thread(target=written, daemon=True).start()  # no worker, because leaving would wait for one
