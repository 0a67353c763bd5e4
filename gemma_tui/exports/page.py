"""A figure as one HTML page: no script, no reference to anything outside, and a policy that forbids both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from gemma_tui.exports.data import plain
from gemma_tui.exports.svg import document, drawings, escaped
from gemma_tui.figure import Figure, Table
from gemma_tui.figure_text import cell_text, is_number

POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.3rem} .wide,.scroll{overflow:auto;margin:1rem 0} .scroll{max-height:36rem}
table{border-collapse:collapse;font:12px ui-monospace,monospace}
th{position:sticky;top:0;background:#fff;text-align:left}
th,td{padding:.15rem .6rem;border-bottom:1px solid #ddd;white-space:pre} td.n{text-align:right}
pre{white-space:pre-wrap;overflow-wrap:anywhere} svg rect:has(title):hover{stroke:#d55e00;stroke-width:1.5}
"""


def write_html(figure: Figure, file: BinaryIO) -> None:
    """Title, notes, maps, charts, tables and facts; a value on a map is read by resting on it."""
    file.write("\n".join(_parts(figure)).encode("utf-8"))


def _parts(figure: Figure) -> Iterator[str]:
    title = escaped(figure.title)
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
    yield from (f"<p>{escaped(note)}</p>" for note in figure.notes)
    for drawn in drawings(figure):
        yield f'<div class="wide">{document(*drawn, namespace=False)}</div>'
    yield from (_table(table) for table in figure.tables)
    facts = json.dumps(plain(figure.facts), ensure_ascii=False, indent=1)
    yield f"<details><summary>where the numbers come from</summary><pre>{escaped(facts)}</pre></details>"
    yield "</body></html>\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escaped(name)}</th>" for name in table.columns)
    rows = "\n".join(_row(row) for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _row(row: Sequence[Any]) -> str:
    kinds = (' class="n"' if is_number(cell) else "" for cell in row)
    cells = (f"<td{kind}>{escaped(cell_text(cell))}</td>" for kind, cell in zip(kinds, row, strict=True))
    return f"<tr>{''.join(cells)}</tr>"
