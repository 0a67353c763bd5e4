from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from textual.widgets import Input, Static

import gemma_tui.studies.generation
from gemma_tui.widgets.plan_form import Field, PlanForm

from .conftest import Open, Opened, Size

TOKENS = 100_000


def written(it: Opened) -> str:
    content = it.app.screen.query_one("#text", Static).content
    return content.plain if isinstance(content, Text) else str(content)


async def ready(it: Opened, model: str, **values: Any) -> PlanForm[Any]:
    """The generation screen with a model and a prompt."""
    await it.loaded(model)
    await it.mode("5", "generation")
    form = it.app.screen.query_one(PlanForm)
    await it.until(lambda: form.row_count, "the form")
    for name, value in {"prompt": "The fox", "max_tokens": 20, **values}.items():
        form.set(name, value)
    await it.pilot.pause()
    return form


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model never ends its text by itself."""
    monkeypatch.setattr(gemma_tui.studies.generation, "STOP_IDS", ())


async def test_the_prompt_is_edited_in_a_field(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size, model=tiny) as it:
        form = await ready(it, tiny)
        await it.press("p")
        await it.until(lambda: isinstance(it.app.screen, Field), "the field")
        assert it.app.screen.query_one(Input).value == "The fox"
        await it.press(*" sat", "enter")
        await it.until(lambda: not isinstance(it.app.screen, Field), "the end of the field")
        assert form.values["prompt"] == "The fox sat"
        assert it.sees("The fox sat")


@pytest.mark.usefixtures("endless")
async def test_the_text_streams_with_its_speed_and_x_ends_it(
    opened: Open, tiny: str, size_and_engine: tuple[Size, str]
) -> None:
    size, engine_name = size_and_engine
    async with opened(size, model=tiny, engine=engine_name) as it:
        await ready(it, tiny, max_tokens=TOKENS)
        await it.press("g")
        await it.until(lambda: len(written(it)) > len("The fox▌"), "text")
        assert written(it).startswith("The fox")
        assert written(it).endswith("▌")
        assert "x stops" in it.static("#speed")
        assert " tokens/s" in it.static("#speed")
        await it.until(lambda: "writing" in it.rows()[1] and "tokens" in it.rows()[1], "the status")
        before = len(written(it))
        await it.until(lambda: len(written(it)) > before, "more text")
        await it.press("x")
        await it.until(lambda: it.static("#speed").endswith("ended") and not it.app.session.jobs, "the end")
        assert not written(it).endswith("▌")
        assert it.app.session.place.model == tiny


@pytest.mark.usefixtures("endless")
async def test_all_tokens_that_were_asked_for_come_and_the_seed_repeats_them(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny, max_tokens=12, seed=3)
        texts = []
        for _ in range(2):
            await it.press("g")
            await it.until(lambda: not it.app.session.jobs and "ended" in it.static("#speed"), "the end")
            assert it.static("#speed").startswith("12 tokens, ")
            texts.append(written(it))
            it.app.screen.query_one("#speed", Static).update("")
        assert texts[0] == texts[1]


async def test_the_end_that_the_model_sets_is_told(opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma_tui.studies.generation, "STOP_IDS", tuple(range(1000)))
    async with opened(model=tiny) as it:
        await ready(it, tiny)
        await it.press("g")
        await it.until(lambda: "the model ended the text" in it.static("#speed"), "the end")


async def test_without_a_model_the_way_to_one_is_told(opened: Open) -> None:
    async with opened() as it:
        await it.mode("5", "generation")
        await it.press("x")
        await it.press("g")
        await it.until(lambda: "no model is loaded: press 1" in it.told(), "the message")
        assert not it.app.session.jobs


async def test_an_empty_prompt_and_a_busy_engine_are_told(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened(model=tiny) as it:
        form = await ready(it, tiny, prompt="")
        assert it.sees("needed")
        await it.press("g")
        await it.until(lambda: "--prompt is needed" in it.told(), "what is missing")
        form.set("prompt", "x")
        run = await it.started(tiny, corpus, steps=TOKENS)
        await it.mode("5", "generation")
        await it.press("g")
        await it.until(lambda: "no model is loaded" in it.told() or f"busy with {run}" in it.told(), "the refusal")
        assert [job.run for job in it.app.session.jobs] == [run]


async def test_the_text_goes_on_while_another_screen_is_shown(opened: Open, tiny: str) -> None:
    async with opened(model=tiny) as it:
        await ready(it, tiny, max_tokens=30)
        await it.press("g")
        await it.mode("1", "models")
        await it.until(lambda: not it.app.session.jobs, "the end of the job")
        await it.mode("5", "generation")
        await it.until(lambda: "ended" in it.static("#speed"), "the end on the screen")
        assert not written(it).endswith("▌")
