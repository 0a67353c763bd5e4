"""The study of heads over many texts: a key starts it, its means grow on the screen, and other screens know it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS
from textual.widgets import DataTable, Input

from engines import open_engine
from gemma_tui.runs.store import RunStore
from gemma_tui.screens import head_study
from gemma_tui.screens.attention import AttentionScreen
from gemma_tui.screens.comparison import ComparisonScreen
from gemma_tui.screens.head_study import StudyDialog, bundled_texts
from gemma_tui.studies.attention import survey
from gemma_tui.studies.attention.heads import METRICS
from gemma_tui.studies.attention.survey import read_study, study_figure, study_of
from gemma_tui.studies.events import Control
from gemma_tui.studies.recording import record_training
from gemma_tui.studies.training_plan import TrainingPlan
from gemma_tui.widgets.figure_view import FigureView
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, Opened, Size, needs_both
from .test_screens import _layout_faults
from .watching import listed

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
Plan = Callable[..., TrainingPlan]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:5]))
    return path


class Gate:
    """Lets a study look at one text after the other, as a test wants it."""

    def __init__(self) -> None:
        self.open = threading.Semaphore(0)

    def let(self, number: int) -> None:
        self.open.release(number)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, looked = Gate(), survey._looked

    def held(*arguments: Any) -> dict[str, Any]:
        assert gate.open.acquire(timeout=30)
        return looked(*arguments)

    monkeypatch.setattr(survey, "_looked", held)
    monkeypatch.setattr(head_study, "SECONDS", 0.05)
    yield gate
    gate.let(100)


async def begun(it: Opened, model: str, texts: Path) -> str:
    """Load a model and start a study with the key; returns its run."""
    it.app.load(model)
    await it.loaded(model)
    await it.mode("4", "attention")
    await it.until(lambda: screen(it).board.figure is not None and not it.app.session.jobs, "the first view")
    assert (await asked(it, str(texts)))[0] == bundled_texts()
    return await followed(it)


async def asked(it: Opened, texts: str, over: str = "") -> list[str]:
    """Press the key, and fill in the dialog; returns what stood there."""
    before = screen(it)._job
    await it.press("y")
    await it.until(lambda: isinstance(it.app.screen, StudyDialog), "the question for texts")
    lines = list(it.app.screen.query(Input))
    offered = [line.value for line in lines]
    lines[0].value = texts
    if over:
        await it.press("down", *over)
    await it.press("enter")
    await it.until(lambda: screen(it)._job is not before or it.told(), "the job")
    return offered


async def followed(it: Opened) -> str:
    """The run of the study that is shown, once it is there."""
    await it.until(lambda: (job := screen(it)._job) is not None and job.run, "the run")
    job = screen(it)._job
    assert job is not None
    return job.run


def screen(it: Opened) -> AttentionScreen:
    found = it.app.get_screen_stack("attention")[0]
    assert isinstance(found, AttentionScreen)
    return found


def shown(it: Opened) -> str:
    """The title of what is on the board."""
    figure = screen(it).board.figure
    return figure.title if figure is not None else ""


async def test_its_means_grow_on_the_screen_and_m_changes_the_metric(
    opened: Open, tiny: str, texts: Path, store: RunStore, gate: Gate, size_and_engine: tuple[Size, str]
) -> None:
    size, engine = size_and_engine
    async with opened(size, engine=engine) as it:
        run = await begun(it, tiny, texts)
        job = it.app.session.jobs[0]
        assert (job.kind, job.label) == ("study", run)
        await it.until(lambda: "studying heads" in it.static("#looked"), "the line")
        gate.let(2)
        await it.until(lambda: shown(it) == "entropy over 2 texts", "two texts")
        assert (job.detail, job.share) == ("text 2/5", 0.4)
        assert it.app.session.place.model == tiny, "it stays loaded"
        await it.press("v")
        part = it.app.screen.query_one(FigureView).part
        gate.let(1)
        await it.until(lambda: shown(it) == "entropy over 3 texts", "three texts")
        assert it.app.screen.query_one(FigureView).part == part == 1
        after = list(METRICS)[(list(METRICS).index("entropy") + 1) % len(METRICS)]
        await it.press("m")
        assert shown(it) == f"{after} over 3 texts", "nothing is computed for it"
        assert it.app.screen.query_one(FigureView).figure.tables[0].columns[2] == after
        gate.let(2)
        await it.loaded(tiny)
        await it.until(lambda: shown(it) == f"{after} over 5 texts", "all texts")
        figure, expected = screen(it).board.figure, study_figure(read_study(store, store.run(run)), after)
        assert figure is not None
        np.testing.assert_array_equal(figure.heats[0].values, expected.heats[0].values)
        assert store.run(run).state == "done"
        plan = store.run(run).plan
        assert (plan["rows"], plan["length"], plan["study"]) == (64, 256, str(texts))
        await it.press("h")
        await it.until(lambda: screen(it).board.plan.view == "head", "the head under the cursor")
        await it.pilot.pause(0.3)
        assert screen(it).board.plan.view == "head", "an ended study does not come back"
        assert run not in it.static("#looked")
        await it.press("m")
        await it.until(lambda: screen(it).board.plan.view == "heads", "the metric of this text")


async def test_it_is_read_only_when_there_are_new_texts(
    opened: Open, tiny: str, texts: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[str] = []
    monkeypatch.setattr(head_study, "study_of", lambda run, rows: (readings.append(run), study_of(run, rows))[1])
    async with opened() as it:
        await begun(it, tiny, texts)
        gate.let(1)
        await it.until(lambda: shown(it) == "entropy over 1 texts", "a text")
        await it.pilot.pause(0.5)
        assert len(readings) == 1


async def test_x_stops_it_and_the_command_goes_on(
    opened: Open, tiny: str, texts: Path, store: RunStore, gate: Gate, command: Commands
) -> None:
    async with opened() as it:
        run = await begun(it, tiny, texts)
        gate.let(1)
        await it.until(lambda: shown(it) == "entropy over 1 texts", "a text")
        await it.press("g")
        assert "stop it first" in it.told()
        await it.press("x")
        gate.let(1)
        await it.loaded(tiny)
        assert store.run(run).state == "stopped"
        await it.until(lambda: f"runs resume {run}" in it.told(), "how it goes on")
        await it.press("g")
        await it.until(lambda: screen(it).board.plan.view == "heads" and not it.app.session.jobs, "the model's heads")
    gate.let(5)
    code, rows, _ = command("runs", "resume", run)
    assert (code, rows[-1]["texts"]) == (0, 5)
    assert store.run(run).state == "done"


async def test_one_that_was_stopped_goes_on_from_the_app(
    opened: Open, tiny: str, texts: Path, store: RunStore, gate: Gate, size_and_engine: tuple[Size, str]
) -> None:
    size, engine = size_and_engine
    from_the_list = engine == "torch"
    async with opened(size, engine=engine) as it:
        run = await begun(it, tiny, texts)
        gate.let(1)
        await it.until(lambda: shown(it) == "entropy over 1 texts", "a text")
        await it.press("x")
        gate.let(1)
        await it.until(lambda: f"y with its name, or `gemma-tui runs resume {run}`" in it.told(), "how it goes on")
        assert store.run(run).state == "stopped"
    async with opened(size, engine=engine) as it:
        if from_the_list:
            await it.mode("2", "training")
            await listed(it, run)
            await it.press("u")
            await it.until(lambda: it.app.current_mode == "attention", "the screen that shows it")
        else:
            await it.mode("4", "attention")
            await asked(it, run)
        assert await followed(it) == run
        await it.until(lambda: shown(it) == "entropy over 2 texts", "what was found before")
        assert str(texts).startswith(it.static("#looked").split(" · ")[-1][:20])
        gate.let(3)
        await it.until(lambda: shown(it) == "entropy over 5 texts", "all texts")
        await it.loaded(tiny)
        assert store.run(run).state == "done"
        await it.press("k")
        await it.until(lambda: screen(it).board.plan.view == "sinks", "the model is there for other views")
        await it.mode("2", "training")
        await it.mode("4", "attention")
        assert screen(it)._study is None, "an ended study does not come back"


async def test_one_that_went_on_elsewhere_is_shown_even_if_it_has_ended(
    opened: Open, tiny: str, texts: Path, store: RunStore, gate: Gate
) -> None:
    async with opened() as it:
        run = await begun(it, tiny, texts)
        gate.let(1)
        await it.until(lambda: shown(it) == "entropy over 1 texts", "a text")
        await it.press("x")
        gate.let(100)
        await it.until(lambda: store.run(run).state == "stopped" and not it.app.session.jobs, "that it stopped")
    async with opened() as it:
        it.app.session.resume("heads", run)
        await it.until(lambda: not it.app.session.jobs, "its end")
        await it.mode("4", "attention")
        await it.until(lambda: shown(it) == "entropy over 5 texts", f"all texts; {it.static('#looked')}")
        await it.press("k")
        await it.until(lambda: screen(it).board.plan.view == "sinks", "another view")
        await it.mode("2", "training")
        await it.mode("4", "attention")
        assert screen(it)._study is None, "an ended study does not come back"


async def test_it_goes_over_the_checkpoints_of_a_run(
    opened: Open, tiny: str, texts: Path, plan: Plan, store: RunStore, size_and_engine: tuple[Size, str]
) -> None:
    size, name = size_and_engine
    engine = open_engine(name)
    recorded = record_training(
        engine, plan(steps=4, save_every=2, keep=5, evaluate_every=0, learning_rate=0.1), Control(), store
    )
    assert list(recorded.events)
    over = recorded.run.run_id
    async with opened(size, model=tiny, engine=name) as it:
        await it.loaded(tiny)
        await it.mode("4", "attention")
        await it.until(lambda: screen(it).board.figure is not None and not it.app.session.jobs, "the first view")
        before = screen(it).board.figure
        assert before is not None
        await asked(it, str(texts), over)
        run = await followed(it)
        await it.until(lambda: shown(it) == "entropy over 10 texts", "each text at each checkpoint")
        assert not _layout_faults(it)
        await it.loaded(tiny)
        study = read_study(store, store.run(run))
        assert study.steps == [2] * 5 + [4] * 5
        assert not np.allclose(study.values["entropy"][:5], study.values["entropy"][5:], atol=1e-5)
        assert f"--over {over}" in screen(it).command() == store.run(run).command
        figure = screen(it).board.figure
        assert figure is not None
        assert [table.kind for table in figure.tables] == ["moved", "head"]
        await it.press("g")
        await it.until(lambda: screen(it).board.plan.view == "heads" and not it.app.session.jobs, "the model's heads")
        again = screen(it).board.figure
        assert again is not None
        assert again is not before
        np.testing.assert_array_equal(again.arrays["entropy"], before.arrays["entropy"])


async def test_what_the_dialog_cannot_use_is_told_in_a_line(
    opened: Open, tiny: str, texts: Path, store: RunStore, corpus: Path
) -> None:
    async with opened((80, 24)) as it:
        run = await begun(it, tiny, texts)
        await it.loaded(tiny)
        await it.until(lambda: shown(it) == "entropy over 5 texts", "all texts")
        for study, over, words in (
            (run, "lora-1", f"over: {run} goes on as it was begun: leave the run out"),
            (str(texts), run, f"{run} is no training run"),
            (str(texts), "lora-9", "no run 'lora-9'"),
        ):
            it.app.clear_notifications()
            await asked(it, study, over)
            await it.until(lambda words=words: words in it.told(), words)
            assert all("\n" not in notice.message for notice in it.app._notifications)
            await it.loaded(tiny)
        await it.press("y")
        await it.until(lambda: isinstance(it.app.screen, StudyDialog), "the dialog")
        assert not _layout_faults(it)
        await it.press("escape")
        assert not it.app.session.jobs
        assert len(store.runs(10)) == 1, "nothing else was begun"


@needs_both
async def test_one_of_another_engine_is_refused_and_stays_as_it_is(
    opened: Open, tiny: str, texts: Path, store: RunStore
) -> None:
    async with opened() as it:
        run = await begun(it, tiny, texts)
        await it.until(lambda: shown(it) == "entropy over 5 texts", "all texts")
    async with opened(engine="mlx") as it:
        await it.mode("4", "attention")
        await asked(it, run)
        await it.until(lambda: f"{run} was computed with torch: go on with it there" in it.told(), "why not")
    assert store.run(run).state == "done"


async def test_quitting_asks_and_keeps_what_was_found(
    opened: Open, tiny: str, texts: Path, store: RunStore, gate: Gate
) -> None:
    async with opened() as it:
        run = await begun(it, tiny, texts)
        gate.let(1)
        await it.until(lambda: shown(it) == "entropy over 1 texts", "a text")
        await it.press("q")
        await it.until(lambda: it.sees(f"{run} is running."), "the question")
        await it.press("s")
        gate.let(1)
        await it.until(lambda: it.app._exit, "the end")
    assert store.run(run).state == "stopped"
    assert len(read_study(store, store.run(run)).texts) == 2


async def test_a_file_that_is_not_there_is_told_and_the_model_stays(opened: Open, tiny: str, tmp_path: Path) -> None:
    async with opened() as it:
        it.app.load(tiny)
        await it.loaded(tiny)
        await it.mode("4", "attention")
        await it.until(lambda: screen(it).board.figure is not None and not it.app.session.jobs, "the first view")
        await it.press("y")
        await it.until(lambda: isinstance(it.app.screen, StudyDialog), "the question for a file")
        it.app.screen.query_one(Input).value = str(tmp_path / "nowhere.jsonl")
        await it.press("enter")
        await it.until(lambda: "nowhere.jsonl" in it.told(), "what is wrong")
        await it.loaded(tiny)
        await it.until(lambda: screen(it)._study is None, "the study is given up")
        await it.press("k")
        await it.until(lambda: screen(it).board.plan.view == "sinks", "another view")


async def test_other_screens_and_commands_know_what_it_is(
    opened: Open, tiny: str, texts: Path, store: RunStore, command: Commands
) -> None:
    async with opened((120, 40)) as it:
        run = await begun(it, tiny, texts)
        await it.loaded(tiny)
        await it.until(lambda: shown(it) == "entropy over 5 texts", "all texts")
        words = screen(it).command()
        await it.mode("2", "training")
        await it.pilot.pause(0.5)
        assert run not in it.static("#headline")
        table = await listed(it, run)
        assert isinstance(table, DataTable)
        for key in ("enter", "i", "m"):
            it.app.clear_notifications()
            await it.press(key)
            assert f"{run} is a study of heads over texts" in it.told(), key
            assert run not in it.static("#headline")
        await it.press("o")
        assert not isinstance(it.app.screen, ComparisonScreen)
        assert it.app.screen.query(PlanForm)
    for arguments in (("runs", "list"), ("runs", "show", run), ("runs", "compare", run)):
        code, rows, errors = command(*arguments)
        assert (code, errors, rows[-1]["kind"]) == (0, "", "end")
    assert words == store.run(run).command
    code, rows, errors = command(*words.split()[1:])
    assert (code, errors, rows[-1]["texts"]) == (0, "", 5)
    again = read_study(store, store.run(rows[-1]["run"]))
    np.testing.assert_array_equal(again.values["entropy"], read_study(store, store.run(run)).values["entropy"])
