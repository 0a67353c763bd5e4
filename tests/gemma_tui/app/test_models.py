from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Static

import gemma_tui.hub.models
import gemma_tui.session
from engines import ENGINES
from engines.torch.engine import TorchEngine
from gemma_tui import paths

from .conftest import Open, Opened, Size, needs_both


async def choose(it: Opened, name: str) -> None:
    """Put the cursor on a model."""
    table = await it.table()
    table.move_cursor(row=table.get_row_index(name))
    await it.pilot.pause()


@pytest.fixture
def broken(tiny: str) -> str:
    """A model folder whose config asks for what no Gemma-3 is."""
    folder = paths.models() / "broken"
    shutil.copytree(paths.models() / tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    return "broken"


async def test_the_list_has_every_model_with_its_facts(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size) as it:
        await choose(it, tiny)
        facts = ("model", "params", "nano", "built-in", "gemma-3-270m", tiny, "data folder", "fits")
        await it.until(lambda: it.sees(*facts), "the list")
        await it.until(lambda: it.sees("heads 2 query heads share 1 of 16", "window 8 of 256 tokens"), "the facts")


async def test_enter_loads_with_progress(
    opened: Open, tiny: str, engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, resolve = threading.Event(), gemma_tui.hub.models.resolve

    def slow(name: str, progress: Any = None) -> Any:
        if progress is not None:
            progress(0.4, "reading the weights")
            assert go_on.wait(30)
        return resolve(name, progress)

    monkeypatch.setattr(gemma_tui.hub.models, "resolve", slow)
    async with opened(engine=engine_name) as it:
        await choose(it, tiny)
        await it.press("enter")
        await it.until(lambda: "loading tiny ████░░░░░░ reading the weights" in it.rows()[1], "progress")
        go_on.set()
        await it.loaded(tiny)
        await it.until(lambda: "tiny 29" in it.rows()[1], "the model in the status")
        assert it.app.session.engine == engine_name


async def test_a_broken_model_shows_its_problem_and_loading_it_tells_why(opened: Open, broken: str, size: Size) -> None:
    async with opened(size) as it:
        await choose(it, broken)
        await it.until(lambda: "num_attention_heads" in it.static(".detail"), "the problem")
        assert it.sees("broken")
        await it.press("enter")
        await it.until(lambda: "num_attention_heads" in it.told(), "the reason")
        assert not it.app.session.jobs


async def test_a_model_that_breaks_after_the_list_was_made_is_told_too(opened: Open, tiny: str) -> None:
    async with opened() as it:
        await it.table()
        shutil.rmtree(paths.models() / tiny)
        await choose(it, tiny)
        await it.until(lambda: "config.json" in it.static(".detail"), "the problem")
        await it.press("enter")
        await it.until(lambda: "no model 'tiny'" in it.told(), "the reason")
        assert not it.app.session.place.model


async def test_a_folder_that_cannot_be_read_is_told(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "models")

    monkeypatch.setattr(gemma_tui.hub.models, "local_models", refuse)
    async with opened() as it:
        await it.until(lambda: "Permission denied" in it.told(), "the reason")
        await it.mode("5", "generation")


async def test_looking_again_finds_a_new_model(opened: Open, tiny: str) -> None:
    async with opened() as it:
        table = await it.table()
        shutil.copytree(paths.models() / tiny, paths.models() / "newer")
        before = table.row_count
        await it.press("r")
        await it.until(lambda: table.row_count == before + 1, "the new model")
        assert it.sees("newer")


async def test_loading_while_the_engine_is_busy_is_refused(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=100_000)
        await it.mode("1", "models")
        await choose(it, tiny)
        await it.press("enter")
        await it.until(lambda: f"torch is busy with {run}" in it.told(), "the refusal")
        assert [job.run for job in it.app.session.jobs] == [run]


async def test_another_choice_takes_the_place_of_what_is_loading(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(paths.models() / tiny, paths.models() / "other")
    go_on, resolve = threading.Event(), gemma_tui.hub.models.resolve

    def slow(name: str, progress: Any = None) -> Any:
        if name == tiny and progress is not None:
            assert go_on.wait(30)
            progress(0.4, "reading the weights")
        return resolve(name, progress)

    monkeypatch.setattr(gemma_tui.hub.models, "resolve", slow)
    async with opened() as it:
        await choose(it, tiny)
        await it.press("enter")
        await it.until(lambda: "loading tiny" in it.rows()[1], "the first load")
        await choose(it, "other")
        await it.press("enter")
        await it.until(lambda: "loading other" in it.rows()[1], "the second load")
        go_on.set()
        await it.loaded("other")
        assert not it.told()


async def test_a_failing_load_tells_one_line_and_the_next_works(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened() as it:
        await choose(it, tiny)
        with monkeypatch.context() as patch:
            patch.setattr(TorchEngine, "load", lambda *a: (_ for _ in ()).throw(RuntimeError("HIP out of memory")))
            await it.press("enter")
            await it.until(lambda: "not enough memory" in it.told(), "the reason")
        await it.press("enter")
        await it.loaded(tiny)


@needs_both
@pytest.mark.parametrize("first", ENGINES)
async def test_the_other_engine_takes_the_model_over(opened: Open, tiny: str, size: Size, first: str) -> None:
    async with opened(size, model=tiny, engine=first) as it:
        await it.loaded(tiny)
        await it.press("e")
        other = next(name for name in ENGINES if name != first)
        assert it.app.session.engine == other
        await it.loaded(tiny)
        await it.until(lambda: it.rows()[1].strip().startswith(other) and "tiny 29" in it.rows()[1], "the status")
        assert not it.app.session._at(first).model


async def test_with_one_engine_only_the_switch_says_so(
    opened: Open, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemma_tui.session, "available_engines", lambda: ["torch"])
    async with opened(model=tiny) as it:
        await it.loaded(tiny)
        await it.press("e")
        await it.until(lambda: "torch is the only engine here" in it.told(), "the message")
        assert it.app.session.engine == "torch"
        assert it.app.session.place.model == tiny
        assert isinstance(it.app.screen.query_one(".detail"), Static)
