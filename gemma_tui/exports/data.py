"""The numbers of a figure: as JSON for what people read, as npz for the arrays, as CSV for the tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from gemma_tui.errors import GemmaTuiError
from gemma_tui.figure import Figure
from gemma_tui.figure_text import is_number
from gemma_tui.text import clean

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the beginning of a formula."""


def figure_json(figure: Figure) -> dict[str, Any]:
    """Title, notes, facts and tables as plain Python; what is not finite is None."""
    tables = [
        {"kind": t.kind, "columns": list(t.columns), "rows": [list(row) for row in t.rows]} for t in figure.tables
    ]
    described = {"title": figure.title, "notes": list(figure.notes), "facts": figure.facts, "tables": tables}
    return {name: plain(value) for name, value in described.items()}


def plain(value: Any) -> Any:
    """As JSON can hold it; numpy's numbers and arrays too."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def write_json(figure: Figure, file: BinaryIO) -> None:
    """One object; everything but ASCII is escaped, so that a terminal shows it as it is."""
    file.write((json.dumps(figure_json(figure), indent=1, allow_nan=False) + "\n").encode())


def write_npz(figure: Figure, file: BinaryIO) -> None:
    """The arrays by their names, and ``facts``, which is JSON in a string. Reading it takes no pickle."""
    facts = json.dumps({"title": figure.title, **plain(figure.facts)}, allow_nan=False)
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in figure.arrays.items()}
    np.savez_compressed(file, **arrays, facts=np.array(facts))


def write_csv(figure: Figure, file: BinaryIO) -> None:
    """Every table under a head of its own, its kind first in each row, an empty line between (RFC 4180).

    Numbers are in full, what is not finite is empty, and no text is a formula to a spreadsheet.

    Raises:
        GemmaTuiError: there is no table.
    """
    if not figure.tables:
        raise GemmaTuiError("the figure has no table for a .csv: take .npz or .json")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for number, table in enumerate(figure.tables):
        if number:
            writer.writerow(())
        writer.writerow(["table", *map(_cell, table.columns)])
        writer.writerows([_cell(table.kind), *map(_cell, row)] for row in table.rows)
    file.write(text.getvalue().encode("utf-8"))


def _cell(value: Any) -> Any:
    """Numbers and None as they are; text cleaned, and quoted where it would be a formula."""
    value = plain(value)
    if value is None or is_number(value):
        return value
    text = clean(str(value))
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
