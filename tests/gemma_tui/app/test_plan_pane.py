"""What the plan pane tells of a run before it starts: its learning rate and its memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from gemma_tui import paths
from gemma_tui.runs.store import RunStore
from gemma_tui.studies import forecast
from gemma_tui.studies.schedules import SCHEDULES
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.widgets.plan_pane import PlanPane
from gemma_tui.widgets.rate_plot import BLOCKS, RatePlot

from .conftest import Open, Opened, Size
from .test_hostile import nothing_foreign
from .test_screens import _footer_faults, _layout_faults

LOW, HIGH = (80, 24), (120, 40)


def drawn(it: Opened) -> list[str]:
    """The lines of the plot of the learning rate."""
    plot = it.app.screen.query_one(RatePlot)
    region = plot.content_region
    return [row[region.x : region.right].rstrip() for row in it.rows()[region.y : region.bottom]]


def blocks(it: Opened) -> list[int]:
    """The heights of the row of blocks, 0 to 7."""
    return [BLOCKS.index(sign) for sign in drawn(it)[0] if sign in BLOCKS]


def need(it: Opened) -> str:
    return it.static("#need")


async def estimated(it: Opened, **values: Any) -> str:
    """The memory of the form's plan, once the plan has these values."""
    pane = it.app.screen.query_one(PlanPane)

    def answered() -> bool:
        asked = pane._asked is not None and all(getattr(pane._asked[0], k) == v for k, v in values.items())
        return asked and "memory: fits: about" in need(it)

    await it.until(answered, f"the estimate of {values}")
    return need(it)


async def test_every_schedule_is_drawn_before_the_run_and_again_when_a_value_changes(opened: Open, size: Size) -> None:
    async with opened(size) as it:
        form = await it.plan("nano", "x", steps=40, warmup=4, method="relora", reset_every=20)
        form.set("restart_warmup", 2)
        for schedule in SCHEDULES:
            form.set("schedule", schedule)
            await it.until(lambda s=schedule: it.sees(f"peak 0.01, {s}, 40 steps"), schedule)
        form.set("learning_rate", 0.5)
        form.set("steps", 20_000)
        await it.until(lambda: it.sees("peak 0.5, constant, 20k steps"), "other numbers")
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), f"a whole footer, not {_footer_faults(it)}")


async def test_a_low_terminal_has_a_row_of_blocks_with_the_rates_of_the_run(opened: Open) -> None:
    async with opened(LOW) as it:
        form = await it.plan("nano", "x", steps=10, warmup=3, schedule="linear", final_ratio=0.0)
        plan = TrainingPlan(**form.values)
        expected = [round(7 * plan.rate(step) / 1e-2) for step in range(1, 11)]
        await it.until(lambda: blocks(it) == expected, "the rates")
        form.set("schedule", "constant")
        await it.until(lambda: blocks(it) == [2, 5, *[7] * 8], "a rate that stays")
        for name, value in (("method", "relora"), ("schedule", None), ("reset_every", 5), ("restart_warmup", 1)):
            form.set(name, value)
        form.set("steps", 40)
        await it.until(lambda: [i for i, h in enumerate(blocks(it), 1) if h == 0] >= [5, 10, 15], "the restarts")


async def test_a_high_terminal_has_a_chart_several_rows_high(opened: Open) -> None:
    async with opened(HIGH) as it:
        form = await it.plan("nano", "x", steps=10, schedule="constant")
        await it.until(lambda: "┤" in "".join(drawn(it)), "the axis")
        flat = [row for row in drawn(it) if any("\u2801" <= sign <= "\u28ff" for sign in row)]
        assert len(flat) == 1
        form.set("schedule", "linear")
        await it.until(
            lambda: sum(any("\u2801" <= sign <= "\u28ff" for sign in row) for row in drawn(it)) > 2, "a slope"
        )
        assert len(drawn(it)) == 8


async def test_a_plan_that_cannot_begin_says_why_in_place_of_the_chart(opened: Open, size: Size) -> None:
    async with opened(size) as it:
        form = await it.plan("nano", "x", schedule="jagged")
        await it.until(lambda: it.sees("schedule: jagged belongs to --method relora"), "the reason")
        assert need(it) == ""
        form.set("schedule", None)
        await it.until(lambda: it.sees("peak 0.01, cosine"), "the chart")
        form.set("targets", "\x1b[31mq_proj\n\x9b")
        await it.until(lambda: "targets: " in drawn(it)[0], "the reason")
        nothing_foreign(it)


async def test_the_memory_of_a_plan_is_what_its_run_tells_and_earlier_runs_refine_it(
    opened: Open, tiny: str, corpus: Path, size: Size
) -> None:
    async with opened(size, model=tiny) as it:
        await it.loaded(tiny)
        form = await it.plan(tiny, corpus, steps=2)
        before = await estimated(it, model=tiny, steps=2)
        form.set("batch_size", 7)
        assert await estimated(it, batch_size=7) != before
        form.set("batch_size", 2)
        assert await estimated(it, batch_size=2) == before
        await it.press("s")
        await it.until(lambda: "lora-1 has ended" in it.told(), "the end")
        told = next(event for event in RunStore().events("lora-1") if event.kind == "start")
        assert before == f"memory: {told.values['estimated']}"
        await it.until(lambda: "as earlier runs measured" in need(it), "what the run measured")
        assert it.app.session.place.model == "lora-1"


async def test_what_is_known_without_a_device_is_told_and_the_rest_when_it_is_there(opened: Open, tiny: str) -> None:
    async with opened() as it:
        await it.plan(tiny, "x")
        await it.until(lambda: "parameters; what they need here is told once torch has begun" in need(it), "the size")
        it.app.load(tiny)
        await it.until(lambda: "memory: fits" in need(it), "the estimate")


async def test_a_look_at_a_plan_imports_no_model_and_an_unknown_one_is_named(opened: Open) -> None:
    async with opened() as it:
        form = await it.plan("gemma-3-270m", "x")
        await it.until(lambda: "imported" in need(it) or "extra" in need(it), "what is missing")
        assert not (paths.models() / "gemma-3-270m").exists()
        form.set("model", "nowhere")
        await it.until(lambda: "no model 'nowhere'" in need(it), "that it is not here")


async def test_the_keys_go_on_while_the_memory_is_asked_for(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(*arguments: object) -> str:
        asked.set()
        assert threading.current_thread() is not threading.main_thread()
        go_on.wait(20)
        return "at last"

    monkeypatch.setattr(forecast, "forecast", slow)
    try:
        async with opened() as it:
            form = await it.plan("nano", "x")
            await it.until(asked.is_set, "the question")
            await it.press("down", "down")
            assert form.cursor_row == 2
            assert need(it) == "memory: …"
            go_on.set()
            await it.until(lambda: need(it) == "memory: at last", "the answer")
    finally:
        go_on.set()
