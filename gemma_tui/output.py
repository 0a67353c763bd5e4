"""What a command prints: for a person with Rich, or one JSON object per line. Foreign text is cleaned on the way."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemma_tui.text import clean, one_line

if TYPE_CHECKING:  # numpy comes with it, and `--help` needs none
    from engines.base import Progress


class Output:
    """Where a command's results go; errors go to stderr elsewhere."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._passing = 0
        """Columns of the line that the next one takes the place of."""

    def row(self, kind: str, /, **values: Any) -> None:
        """One JSON object on a line of its own; nothing for a person."""
        if self.as_json:
            print(json.dumps({"kind": kind, **{k: _finite(v) for k, v in values.items()}}), flush=True)

    def say(self, text: str) -> None:
        """A line for a person; nothing in JSON."""
        if not self.as_json:
            self._clear()
            print(clean(text), flush=True)

    def passing(self, text: str) -> None:
        """A line for a person that the next one takes the place of; only on a terminal."""
        if self.as_json or not sys.stdout.isatty():
            return
        self._clear()
        line = one_line(text, shutil.get_terminal_size().columns - 1)
        self._passing = len(line)
        print(line, end="\r", flush=True)

    def _clear(self) -> None:
        if self._passing:
            print(" " * self._passing, end="\r")
            self._passing = 0

    def stream(self, text: str) -> None:
        """A piece of text for a person, without a line end."""
        if not self.as_json:
            print(clean(text), end="", flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], unbroken: bool = False) -> None:
        """A table for a person; nothing in JSON.

        Args:
            unbroken: no cell goes over several lines; on a terminal the last columns that do not fit are left out.
        """
        if self.as_json:
            return
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        cells = [[one_line(str(cell)) for cell in row] for row in rows]
        table = Table(box=None, pad_edge=False, header_style="bold")
        console = Console()
        if unbroken:
            widths = (max(map(cell_len, column)) for column in zip(columns, *cells, strict=True))
            ends = list(itertools.accumulate(width + 2 for width in widths))
            fitting = sum(end - 2 <= console.width for end in ends) if sys.stdout.isatty() else len(columns)
            columns, cells = columns[:fitting], [row[:fitting] for row in cells]
            console.width = max(console.width, ends[-1])
        for column in columns:
            table.add_column(column, overflow="fold", no_wrap=unbroken)
        for row in cells:
            table.add_row(*map(Text, row))
        console.print(table)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A bar on stderr for what takes long: rate-limited, and only on a terminal."""
        if self.as_json or not sys.stderr.isatty():
            yield lambda share, text: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda share, text: bar.update(task, completed=share, description=one_line(f"{title}: {text}", 60))


def error_line(message: str) -> None:
    """One line on stderr."""
    print(f"gemma-tui: {one_line(message, 400)}", file=sys.stderr, flush=True)


def bytes_text(count: float) -> str:
    """A size as a person reads it."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_text(count: int) -> str:
    """A number of parameters as a person reads it."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= 0.9995 * size:  # what rounds to a whole one of the unit
            return f"{count / size:.3g}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """A time span in one or two units."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


def age(created: float) -> str:
    """How long ago, in one unit."""
    seconds = max(0.0, time.time() - created)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
