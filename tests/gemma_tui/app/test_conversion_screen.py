"""Conversions, from the list of models."""

from __future__ import annotations

import shlex
import threading
from pathlib import Path
from typing import Any

import pytest

import gemma_tui.studies.conversion
from gemma_tui import paths
from gemma_tui.cli import _parser
from gemma_tui.commands.plans import plan_from
from gemma_tui.hub.models import resolve
from gemma_tui.screens.conversion import ConversionScreen
from gemma_tui.studies.conversion import ConversionPlan
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, Opened, Size, needs_both
from .test_models import choose
from .test_screens import _footer_faults, _layout_faults


async def entered(it: Opened, model: str, **values: Any) -> PlanForm[Any]:
    await choose(it, model)
    await it.press("n")
    await it.until(lambda: isinstance(it.app.screen, ConversionScreen) and it.app.screen.is_current, "the screen")
    form = it.app.screen.query_one(PlanForm)
    await it.until(lambda: it.sees(f"model {model}"), "the form")
    for name, value in values.items():
        form.set(name, value)
    return form


@needs_both
async def test_a_model_is_quantised_by_keys_and_the_loaded_one_stays(
    opened: Open, tiny: str, size: Size, tmp_path: Path
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 3)
    async with opened(size, model=tiny, engine="mlx") as it:
        await it.loaded(tiny)
        await entered(it, tiny, bits=4, group_size=32, text=str(text))
        assert not _layout_faults(it)
        await it.until(lambda: not _footer_faults(it), "a whole footer")
        await it.press("s")
        await it.until(lambda: "tiny-4bit: " in it.static("#looked"), f"the new model; {it.told()}")
        await it.until(lambda: "perplexity over" in it.told(), "what was made")
        quantization = resolve("tiny-4bit").config().quantization
        assert quantization is not None
        assert (quantization.bits, quantization.group_size) == (4, 32)
        await it.loaded(tiny)
        info = it.app.session.place.info
        assert info is not None
        assert info.config.quantization is None
        await it.press("escape")
        await it.until(lambda: it.sees("tiny-4bit"), "the new model in the list")


async def test_a_stop_leaves_nothing(opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, read = threading.Event(), gemma_tui.studies.conversion.iterate_dense

    def slow(*arguments: Any) -> Any:
        for number, each in enumerate(read(*arguments)):
            assert number < 2 or go_on.wait(30)
            yield each

    monkeypatch.setattr(gemma_tui.studies.conversion, "iterate_dense", slow)
    async with opened() as it:
        await entered(it, tiny, dtype="bfloat16")
        await it.press("s")
        await it.until(lambda: "converting tiny: " in it.static("#looked"), "that it began")
        await it.until(lambda: "writing" in it.rows()[1], "progress in the status")
        await it.press("x")
        go_on.set()
        await it.until(lambda: "no model was made" in it.static("#looked"), "the end")
        await it.until(lambda: "nothing is left" in it.told(), "the message")
        assert [path.name for path in paths.models().iterdir()] == [tiny]


async def test_what_cannot_be_is_told_and_the_command_says_the_same(opened: Open, tiny: str) -> None:
    async with opened() as it:
        form = await entered(it, tiny)
        await it.press("s")
        await it.until(lambda: "name what it becomes" in it.told(), "what is missing")
        assert not it.app.session.jobs
        form.set("bits", 6)
        form.set("name", "six")
        words = shlex.split(it.app.screen.command())[1:]  # type: ignore[attr-defined]
        args = _parser(words).parse_args(words)
        assert plan_from(ConversionPlan, args, {}, "models convert") == form.build()
        assert args.engine == "mlx"
