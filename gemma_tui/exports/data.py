"""The numbers of a figure: as JSON for what people read, as npz for the arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from gemma_tui.figure import Figure


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
