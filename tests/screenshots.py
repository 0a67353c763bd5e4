"""Make the pictures of the README from the app itself: ``python -m tests.screenshots [FOLDER]``.

The folder is of a run that was trained for blocks on records, as the README tells; without it the tuned model writes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from textual.pilot import Pilot

from gemma_tui import paths
from gemma_tui.app import GemmaTui
from gemma_tui.studies.tasks import TEST, TaskPlan, make
from gemma_tui.widgets.plan_form import PlanForm

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "screenshots"
SIZE = (120, 34)
STEPS = 60
PASS = 9
"""After which both texts are shown."""


async def until(pilot: Pilot[None], done: Callable[[], bool], seconds: float = 120) -> None:
    """Let the app go on until something holds."""
    for _ in range(int(seconds * 10)):
        if done():
            return
        await pilot.pause(0.1)
    raise TimeoutError("the app did not get there")


async def main(trained: Path | None = None) -> None:
    """A LoRA run on nano, followed to its end, a text written both ways, and a head of the 270M.

    Args:
        trained: folder of the run whose model writes the text; None for that of the LoRA run.
    """
    app = GemmaTui()
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: bool(app.session.place.model))
        await pilot.pause(1)
        app.save_screenshot("models.svg", str(FOLDER))
        await pilot.press("2")
        await pilot.pause(0.5)
        form = app.screen.query_one(PlanForm)
        for name, value in (("data", "assets/corpus"), ("steps", STEPS), ("evaluate_every", 10)):
            form.set(name, value)
        form.set("learning_rate", 1e-3)
        await pilot.press("s")
        await until(pilot, lambda: any(job.share >= 0.75 for job in app.session.jobs))
        await pilot.pause(2)
        app.save_screenshot("training.svg", str(FOLDER))
        await until(pilot, lambda: not app.session.jobs)
        await writing(app, pilot, trained)
        app.load("gemma-3-270m")
        await until(pilot, lambda: not app.session.jobs)
        await pilot.press("4")
        await until(pilot, lambda: not app.session.jobs)
        await pilot.press("slash", *"L5.H1", "enter")
        await until(pilot, lambda: not app.session.jobs)
        await pilot.pause(1)
        app.save_screenshot("attention.svg", str(FOLDER))


async def writing(app: GemmaTui, pilot: Pilot[None], trained: Path | None) -> None:
    """What answers a row that was held out, as it is both ways after some passes."""
    await pilot.press("5")
    await pilot.pause(0.5)
    if trained is not None:
        shutil.copytree(trained / "model", paths.models() / trained.name)
        app.load(trained.name)
        await until(pilot, lambda: app.session.place.model == trained.name)
        app.screen.query_one(PlanForm).set("prompt", make(TaskPlan())[TEST][0].prompt)
    await pilot.press("g")
    await until(pilot, lambda: not app.session.jobs)
    await pilot.pause(1)
    await pilot.press("left_curly_bracket", *["right_square_bracket"] * PASS)
    await pilot.pause(1)
    app.save_screenshot("generation.svg", str(FOLDER))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ["GEMMA_TUI_HOME"] = home
        asyncio.run(main(*map(Path, sys.argv[1:2])))
