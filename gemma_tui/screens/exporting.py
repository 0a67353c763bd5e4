"""Writing what a screen shows to a file."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
            # The digest of a large model takes seconds; no worker, because leaving would wait for one.
            threading.Thread(target=write, args=(Path(name).expanduser(),), daemon=True).start()

    def write(path: Path) -> None:
        try:
            export(figure(), path)
            said = f"written: {path}", "information"
        except EngineError as error:
            said = str(error), "warning"
        with suppress(RuntimeError):  # the app has ended
            bench.call_from_thread(bench.tell, *said)

    bench.push_screen(Field(option, offered), named)
