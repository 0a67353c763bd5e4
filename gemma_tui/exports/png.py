"""A figure as PNG: its SVG, drawn by resvg with the fonts of the machine."""

from __future__ import annotations

import subprocess
import sys
from typing import BinaryIO

from gemma_tui.errors import GemmaTuiError
from gemma_tui.exports.svg import document, drawings, heading, label, stacked
from gemma_tui.figure import Figure
from gemma_tui.text import one_line

SCALE = 2
"""Pixels of the picture to one of the SVG."""

LARGEST = 200_000_000
"""Pixels; each takes four bytes of memory."""

DRAW = f"""
import sys, resvg_py
svg = sys.stdin.buffer.read().decode("utf-8")
style = "rect{{shape-rendering:crispEdges}}"
sys.stdout.buffer.write(resvg_py.svg_to_bytes(svg_string=svg, zoom={SCALE}, background="#ffffff", style_sheet=style))
"""


def write_png(figure: Figure, file: BinaryIO) -> None:
    """The same as the SVG, twice as large, on white.

    Raises:
        GemmaTuiError: the picture is too large, or cannot be drawn.
    """
    pieces, width, height = stacked([heading(figure), *drawings(figure)])
    across, down = round(width * SCALE), round(height * SCALE)
    if across * down > LARGEST:
        raise GemmaTuiError(f"the picture would have {across:,} × {down:,} pixels: take .svg")
    file.write(drawn(document(pieces, width, height)))


def check_fonts() -> None:
    """Refuse pictures where their words would be missing.

    Raises:
        GemmaTuiError: there is no font to write with, or nothing can be drawn.
    """
    if not letters_drawn():
        raise GemmaTuiError(
            "no font is found to write a .png's words with: install one (DejaVu Sans Mono), or take .svg"
        )


def letters_drawn() -> bool:
    """Whether two letters give pictures that are neither empty nor the same box."""
    return len({drawn(document([label(4, 12, text)], 16, 16)) for text in ("", "a", "x")}) == 3


def drawn(svg: str) -> bytes:
    """An SVG as PNG.

    Raises:
        GemmaTuiError: resvg cannot draw it.
    """
    # In a process of its own: resvg lets no other thread go on, and ends its process where memory does not suffice.
    done = subprocess.run([sys.executable, "-P", "-c", DRAW], input=svg.encode("utf-8"), capture_output=True)
    if done.returncode:
        *_, why = f"exit code {done.returncode}", *done.stderr.decode("utf-8", "replace").splitlines()
        raise GemmaTuiError(f"the picture cannot be drawn ({one_line(why)}): take .svg")
    return done.stdout
