"""What is imported when, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

# `mlx` itself is a namespace without code, which looking for `mlx.core` makes.
HEAVY = ("torch", "mlx.core", "numpy", "plotext", "transformers", "huggingface_hub", "tokenizers", "jinja2", "gguf")

FIRST_FRAME = """
import asyncio
from gemma_tui.app import GemmaTui
from textual.screen import Screen

found = []
update = Screen._compositor_refresh

def first(self):
    update(self)
    if not found and self.is_attached and self.size.width:
        found.append([m for m in HEAVY if m in sys.modules])

Screen._compositor_refresh = first

async def main():
    app = GemmaTui()
    async with app.run_test(size=(80, 24)) as pilot:
        while not found:
            await asyncio.sleep(0)
        app.session.stop()
asyncio.run(main())
leaked = found[0]
"""

STATEMENTS = {
    "import gemma_tui.app": "import gemma_tui.app",
    "building the app": "from gemma_tui.app import GemmaTui; GemmaTui()",
    "up to the first frame": FIRST_FRAME,
    "import engines.thread": "import engines.thread; engines.thread.EngineThread('torch')",
    "import gemma_tui.session": "import gemma_tui.session; gemma_tui.session.Session()",
    "the command line's parser": "from gemma_tui.cli import _parser; _parser([])",
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_nothing_heavy_is_imported(statement: str) -> None:
    script = f"import sys\nHEAVY = {HEAVY!r}\nleaked = None\n{statement}\n" + (
        "leaked = [m for m in HEAVY if m in sys.modules] if leaked is None else leaked\nprint('leaked', *leaked)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["leaked"]


def test_the_command_line_needs_no_textual() -> None:
    script = "import sys, gemma_tui.cli, gemma_tui.commands.runs; print('textual' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
