from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Input, Label

from engines import ENGINES, available_engines
from gemma_tui import paths
from gemma_tui.runs.processes import Detached, start
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.schedules import SCHEDULES
from gemma_tui.studies.training_plan import ADAPTERS, METHODS, WHOLE, TrainingPlan
from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.event_log import EventLog
from gemma_tui.widgets.plan_form import Field, PlanForm

from .conftest import Open, Opened, Size

LORA_ROWS = {"rank", "alpha", "dropout", "targets"}
LONG = 100_000
WRONG = (
    ("steps", "many", "a whole number", "2_000", 2000),
    ("steps", "0", "1 to 10,000,000", "1", 1),
    ("steps", "1.5", "a whole number", "3", 3),
    ("learning_rate", "-1", "0 to 10", "3e-4", 3e-4),
    ("learning_rate", "nan", "a number", "", None),
    ("dropout", "1", "0 to 0.99", "0.5", 0.5),
)
"""An option, a wrong value and what is said of it, a right value and what it becomes."""


def headline(it: Opened) -> str:
    return it.static("#headline")


def log(it: Opened) -> str:
    return "\n".join(it.app.screen.query_one(EventLog).lines)


def points(it: Opened, chart: str) -> int:
    return sum(len(s.x) for s in it.app.screen.query_one(f"#{chart}", Chart).series)


async def on_row(it: Opened, form: PlanForm[Any], name: str) -> None:
    form.focus()
    form.move_cursor(row=form.get_row_index(name))
    await it.pilot.pause()


async def listed(it: Opened, *names: str) -> DataTable[Any]:
    """The pane with the runs, once they are in it."""
    await it.press("l")
    table = it.app.screen.query_one("#runs", DataTable)
    await it.until(lambda: {str(k.value) for k in table.rows} >= set(names), f"{names} in the list")
    return table


class TestForm:
    async def test_choices_go_round_and_what_is_open_can_be_opened_again(self, opened: Open, size: Size) -> None:
        async with opened(size) as it:
            form = await it.plan("nano", "x")
            for name, choices in (("schedule", (None, *SCHEDULES)), ("dtype", (None, "float32", "bfloat16"))):
                await on_row(it, form, name)
                first = choices.index(form.values[name])
                seen = [form.values[name]]
                for _ in choices[1:]:
                    await it.press("enter")
                    seen.append(form.values[name])
                assert seen == [choices[(first + i) % len(choices)] for i in range(len(choices))]
                await it.press("enter")
                assert form.values[name] == seen[0]

    async def test_a_yes_or_no_is_turned_by_enter(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x")
            await on_row(it, form, "fresh")
            for value, word in ((True, "yes"), (False, "no")):
                await it.press("enter")
                assert form.values["fresh"] is value
                assert str(form.get_cell("fresh", "value")) == word

    async def test_a_wrong_value_stays_in_the_field_and_is_explained(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x")
            for name, wrong, problem, right, value in WRONG:
                before = form.values[name]
                await on_row(it, form, name)
                await it.press("enter")
                field = it.app.screen
                assert isinstance(field, Field)
                typed = field.query_one(Input)
                typed.value = wrong
                await it.press("enter")
                assert it.app.screen is field
                assert typed.value == wrong
                assert problem in str(field.query_one("#problem", Label).content)
                assert form.values[name] == before
                typed.value = right
                await it.press("enter")
                await it.until(lambda field=field: it.app.screen is not field, "the end of the field")
                assert form.values[name] == value

    async def test_escape_keeps_the_old_value(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x", steps=12)
            await on_row(it, form, "steps")
            await it.press("enter")
            await it.press("9", "escape")
            await it.until(lambda: not isinstance(it.app.screen, Field), "the end of the field")
            assert form.values["steps"] == 12

    async def test_backspace_puts_the_default_back(self, opened: Open) -> None:
        async with opened() as it:
            form = await it.plan("nano", "x", steps=12, rank=3, dtype="bfloat16")
            for name in ("steps", "rank", "dtype"):
                await on_row(it, form, name)
                await it.press("backspace")
                assert form.values[name] == form.options[name].default

    async def test_the_rows_of_a_method_come_and_go_with_it(self, opened: Open, size: Size) -> None:
        async with opened(size) as it:
            form = await it.plan("nano", "x")
            assert {str(k.value) for k in form.rows} >= LORA_ROWS
            await on_row(it, form, "method")
            for method in (*METHODS[1:], METHODS[0]):
                await it.press("enter")
                shown = {str(k.value) for k in form.rows}
                assert form.values["method"] == method
                assert (shown >= LORA_ROWS) is (method in ADAPTERS)
                assert ("save_dtype" in shown) is (method in WHOLE)
                assert form.get_row_index("method") == form.cursor_row

    async def test_every_option_is_explained_and_what_is_needed_is_said(self, opened: Open, size: Size) -> None:
        async with opened(size) as it:
            form = await it.plan("", "")
            for name in ("model", "data"):
                assert str(form.get_cell(name, "value")) == "needed"
            for name, option in form.options.items():
                if name in {str(k.value) for k in form.rows}:
                    await on_row(it, form, name)
                    await it.until(lambda text=option.help: text in it.static("#explained"), option.help)
            await it.press("s")
            await it.until(lambda: "--model is needed" in it.told(), "what is missing")
            assert not it.app.session.jobs


async def test_a_run_from_start_to_its_text(
    opened: Open, tiny: str, corpus: Path, size_and_engine: tuple[Size, str]
) -> None:
    size, engine_name = size_and_engine
    async with opened(size, model=tiny, engine=engine_name) as it:
        await it.loaded(tiny)
        await it.plan(tiny, corpus, steps=6, name="walk")
        await it.press("s")
        await it.until(lambda: "walk-1 has ended and is saved" in it.told(), "the end")
        await it.until(lambda: "walk-1  done  ████████ 6/6" in headline(it), "the headline")
        assert "valid " in headline(it)
        assert "loading tiny" in log(it)
        assert "trained" in log(it)
        assert f"saved {paths.runs() / 'walk-1' / 'adapter'}" in log(it)
        assert points(it, "loss") == 6 + 3
        for chart in ("learning_rate", "grad_norm", "tokens_per_second"):
            assert points(it, chart) == 6
        await it.until(lambda: it.sees("loss, nats per token", "training", "validation", "learning rate"), "the charts")
        await it.until(lambda: any("x" in row and "┤" in row for row in it.rows()), "points in a chart")
        assert (paths.runs() / "walk-1" / "adapter" / "adapter_model.safetensors").is_file()

        assert it.app.session.place.model == "walk-1"
        await it.mode("5", "generation")
        await it.press("g")
        await it.until(lambda: "tokens/s" in it.static("#speed"), "the text of the tuned model")

        await it.mode("2", "training")
        assert it.app.screen.query_one(PlanForm).values["model"] == tiny, "another adapter starts from the base"


async def test_a_fully_trained_model_is_loaded_afterwards(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        await it.plan(tiny, corpus, steps=2, method="full", fresh=True)
        await it.press("s")
        await it.until(lambda: "full-1 has ended and is saved" in it.told(), "the end")
        assert it.app.session.place.model == "full-1"
        assert (paths.runs() / "full-1" / "model" / "config.json").is_file()


async def test_pausing_holds_the_steps_and_space_goes_on(opened: Open, tiny: str, corpus: Path, size: Size) -> None:
    async with opened(size) as it:
        run = await it.started(tiny, corpus, steps=LONG)
        await it.until(lambda: f"{run}  running" in headline(it), "the headline")
        await it.press("space")
        await it.until(lambda: f"{run}  paused" in headline(it), "the pause")
        await it.until(lambda: " paused " in it.rows()[1], "the pause in the status")
        held = RunStore().run(run).step
        await it.until(lambda: "paused" in log(it), "the event")
        assert RunStore().run(run).step == held
        await it.press("space")
        await it.until(lambda: RunStore().run(run).step > held, "another step")
        await it.until(lambda: "goes on" in log(it), "the event")
        await it.until(lambda: " paused " not in it.rows()[1], "the status without the pause")


async def test_stopping_saves(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=LONG)
        await it.until(lambda: run in headline(it), "the headline")
        await it.press("x")
        await it.until(lambda: f"{run}  stopped" in headline(it), "the end")
        await it.until(lambda: not it.app.session.jobs, "the end of the job")
        assert "ends after this step and saves" in it.told()
        assert (paths.runs() / run / "adapter" / "adapter_model.safetensors").is_file()
        assert 0 < RunStore().run(run).step < LONG


async def test_stopping_a_paused_run_ends_it(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=LONG)
        await it.press("space")
        await it.until(lambda: f"{run}  paused" in headline(it), "the pause")
        await it.press("x")
        await it.until(lambda: f"{run}  stopped" in headline(it), "the end")


async def test_u_goes_on_with_a_run_that_was_stopped(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=400)
        await it.press("x")
        await it.until(lambda: f"{run}  stopped" in headline(it), "the end")
        step = RunStore().run(run).step
        await it.press("u")
        await it.until(lambda: RunStore().run(run).step > step, "more steps")
        assert it.app.session.jobs[0].run == run


async def test_i_shows_the_matrices_of_a_run(opened: Open, tiny: str, corpus: Path, size: Size) -> None:
    async with opened(size) as it:
        run = await it.started(tiny, corpus, steps=4, diagnose_every=2)
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        await it.press("i")
        await it.until(lambda: it.sees("q_proj", "mean of local layers"), "the map")
        await it.press("m", "m")
        await it.until(lambda: it.sees("effective rank"), "another measure")
        await it.press("c")
        await it.until(lambda: it.sees(f"gemma-tui runs matrices {run} --measure effective_rank"), "the command")
        await it.press("escape", "escape")
        await it.until(lambda: headline(it), "the run again")


async def test_a_run_pauses_before_it_is_seen(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        await it.plan(tiny, corpus, steps=LONG)
        await it.press("s", "space")
        assert it.app.session.jobs[0].control.pause.is_set()
        await it.until(lambda: "paused" in headline(it), "the pause")


async def test_another_run_starts_with_empty_charts(opened: Open, tiny: str, corpus: Path) -> None:
    store = RunStore()
    old = store.create("old", "training", "torch", {"method": "lora"}, "gemma-tui train", 2).run_id
    store.set_state(old, "done")
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=4)
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        table = await listed(it, run, old)
        table.move_cursor(row=table.get_row_index(old))
        await it.press("enter")
        await it.until(lambda: f"{old}  done" in headline(it), "the old run")
        assert not any(chart.series for chart in it.app.screen.query(Chart))


async def test_c_shows_the_command_of_the_run_that_is_looked_at(opened: Open) -> None:
    store = RunStore()
    store.set_state(
        store.create("old", "training", "torch", {"method": "lora"}, "gemma-tui train --old", 2).run_id, "done"
    )
    async with opened() as it:
        await it.mode("2", "training")
        await it.press("l")
        await it.until(lambda: it.app.screen.query_one("#runs", DataTable).row_count, "the list")
        await it.press("c")
        await it.until(lambda: it.sees("gemma-tui train --old"), "its command")


async def test_stop_and_pause_without_a_run_say_so(opened: Open) -> None:
    async with opened() as it:
        await it.mode("2", "training")
        for number, key in enumerate(("space", "x"), 1):
            await it.press(key)
            await it.until(lambda n=number: it.told().count("no run that goes on is shown") == n, key)


async def test_x_leaves_a_run_alone_that_is_not_shown(opened: Open, tiny: str, corpus: Path) -> None:
    store = RunStore()
    old = store.create("old", "training", "torch", {"method": "lora"}, "gemma-tui train", 2).run_id
    store.set_state(old, "done")
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=LONG)
        table = await listed(it, run, old)
        table.move_cursor(row=table.get_row_index(old))
        await it.press("enter")
        await it.until(lambda: f"{old}  done" in headline(it), "the old run")
        await it.press("x")
        assert not it.app.session.jobs[0].control.stop.is_set()


async def test_the_list_has_all_runs_and_enter_opens_one(opened: Open, size: Size) -> None:
    store = RunStore()
    for name, state in (("first", "done"), ("second", "failed")):
        run = store.create(name, "training", "torch", {"method": "full"}, "gemma-tui train", 4).run_id
        for step in (1, 2, 3):
            store.record(run, "step", step, {"loss": 5.0 - step, "learning_rate": 1e-3, "grad_norm": 1.0})
        store.record(run, "warning", 3, {"text": f"{name} stumbled"})
        store.set_state(run, state, "the loss was not finite" if state == "failed" else "")
    async with opened(size) as it:
        await it.mode("2", "training")
        table = await listed(it, "first-1", "second-1")
        assert it.sees("run state engine step method age", "first-1 done torch 3/4 full")
        for name, loss in (("first-1", "loss 2.000"), ("second-1", "the loss was not finite")):
            await it.press("l")
            table.move_cursor(row=table.get_row_index(name))
            await it.press("enter")
            await it.until(lambda name=name, loss=loss: name in headline(it) and loss in headline(it), name)
            assert points(it, "loss") == 3
            assert log(it).strip() == f"3  warning: {name[:-2]} stumbled"


OTHER_PROCESS = """
import sys, time
from gemma_tui.runs.store import RunStore
store = RunStore()
run = store.create("elsewhere", "training", "torch", {"method": "lora"}, "gemma-tui train", 1000).run_id
print(run, flush=True)
for step in range(1, 1000):
    store.record(run, "step", step, {"loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0})
    while (asked := store.take_request(run)) == "pause" or (asked == "" and store.run(run).state == "paused"):
        store.set_state(run, "paused")
        time.sleep(0.02)
    store.set_state(run, "stopped" if asked == "stop" else "running")
    if asked == "stop":
        break
    time.sleep(0.05)
"""


async def test_a_run_of_another_process_is_watched_steered_and_known_as_lost(opened: Open) -> None:
    other = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        run = other.stdout.readline().strip()
        async with opened() as it:
            await it.mode("2", "training")
            await listed(it, run)
            await it.press("enter")
            await it.until(lambda: f"{run}  running" in headline(it) and points(it, "loss") > 1, "the run")
            seen = points(it, "loss")
            await it.until(lambda: points(it, "loss") > seen, "more of it")
            await it.press("space")
            await it.until(lambda: f"{run}  paused" in headline(it), "the pause")
            assert f"{run} was asked to pause" in it.told()
            await it.press("space")
            await it.until(lambda: f"{run}  running" in headline(it), "that it goes on")
            assert f"{run} was asked to resume" in it.told()
            await it.press("x")
            await it.until(lambda: f"{run} was asked to stop" in it.told(), "the request")
            await it.until(lambda: f"{run}  stopped" in headline(it), "its end")
            RunStore().set_state(run, "running")
            other.wait(30)
            await it.until(lambda: f"{run}  lost" in headline(it), "the loss of its process")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes that the app started end with the test."""
    begun: list[Detached] = []

    def starts(*arguments: Any) -> Detached:
        begun.append(start(*arguments))
        return begun[-1]

    monkeypatch.setattr("gemma_tui.screens.training.start", starts)
    monkeypatch.setattr("gemma_tui.studies.queueing.start", starts)
    yield
    for process in begun:
        process.process.terminate()
        process.process.wait(30)


@pytest.mark.usefixtures("ended")
async def test_a_run_is_detached_paused_and_goes_on_when_the_app_has_ended(
    opened: Open, tiny: str, corpus: Path
) -> None:
    async with opened(engine=available_engines()[-1]) as it:
        await it.plan(tiny, corpus, steps=LONG, evaluate_every=0)
        await it.press("d", "d")
        await it.until(lambda: "one is starting already" in it.told(), "that once is enough")
        await it.until(lambda: "lora-1 goes on by itself, also when the app ends" in it.told(), "its beginning")
        await it.until(lambda: "lora-1  running" in headline(it) and points(it, "loss") > 1, "its steps")
        assert not it.app.session.jobs
        await it.press("space")
        await it.until(lambda: "lora-1  paused" in headline(it), "the pause")
        await it.press("space")
        await it.until(lambda: "lora-1  running" in headline(it), "that it goes on")
        table = await listed(it, "lora-1")
        assert table.row_count == 1
        await it.press("q")
        await it.until(lambda: it.app._exit, "leaving without a question")
    store = RunStore()
    step = store.run("lora-1").step
    while store.run("lora-1").step == step:
        assert store.run("lora-1").state == "running"
        time.sleep(0.05)
    assert (paths.runs() / "lora-1" / "log.jsonl").is_file()
    store.close()


@pytest.mark.usefixtures("ended")
async def test_a_detached_run_that_does_not_begin_says_why(opened: Open, corpus: Path) -> None:
    async with opened() as it:
        await it.plan("m", corpus)
        it.app.session.engine = "jax"
        await it.press("d")
        await it.until(lambda: "invalid choice: 'jax'" in it.told(), "the reason")
        await it.until(lambda: "did not start" in headline(it), "the headline")


@pytest.mark.usefixtures("ended")
async def test_plans_are_queued_shown_cancelled_and_worked_through(
    opened: Open, tiny: str, corpus: Path, size: Size
) -> None:
    queue = Queue()
    assert queue.lead()
    async with opened(size, engine=available_engines()[-1]) as it:
        for name in ("first", "second"):
            await it.plan(tiny, corpus, steps=2, name=name, group="pair")
            await it.press("a")
            await it.until(lambda name=name: name in {i.plan["name"] for i in queue.queued()}, name)
        assert "was started" not in it.told(), "while something works through the queue, nothing else is started"
        table = await listed(it, "queue:1", "queue:2")
        await it.until(lambda: it.sees("plan 1 first queued", "0/2", "lora", "plan 2 second queued"), "both")
        assert size[0] > 80 or it.sees("age group", "s pair")
        table.move_cursor(row=table.get_row_index("queue:1"))
        assert "--name first" in it.app.screen.command()  # type: ignore[attr-defined]
        await it.press("enter")
        await it.until(lambda: "waits for its turn" in it.told(), "that there is nothing to see")
        await it.press("delete")
        await it.until(lambda: "plan 1 is cancelled" in it.told(), "the end of the first")
        await it.until(lambda: "queue:1" not in {str(k.value) for k in table.rows}, "the table without it")
        queue.leave()
        await it.press("a")
        await it.until(lambda: "a process that works through the queue was started" in it.told(), "the runner")
        await listed(it, "second-1", "second-2")
        await it.until(lambda: it.sees("second-1 done", "second-2 done"), "both runs")
        table.move_cursor(row=0)
        await it.press("backspace")
        await it.until(lambda: "only a queued plan can be cancelled" in it.told(), "that a run stays")
    queue.close()


async def test_a_run_that_fails_tells_it_once_and_the_app_goes_on(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened(model=tiny) as it:
        await it.loaded(tiny)
        await it.plan(tiny, corpus / "nowhere.jsonl")
        await it.press("s")
        await it.until(lambda: "does not exist" in it.told(), "the reason")
        assert it.told().count("nowhere.jsonl") == 1
        await it.until(lambda: "lora-1  failed" in headline(it) and "does not exist" in headline(it), "the headline")
        run = await it.started(tiny, corpus, steps=LONG)
        await it.until(lambda: f"{run}  running" in headline(it), "the next run")


async def test_a_fault_that_no_one_foresaw_is_told_and_the_app_goes_on(
    opened: Open, tiny: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.torch.engine import TorchEngine

    def burst(*arguments: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(TorchEngine, "train_step", burst)
    async with opened() as it:
        await it.plan(tiny, corpus)
        await it.press("s")
        await it.until(lambda: "ZeroDivisionError: by nothing" in it.told(), "the fault")
        await it.until(lambda: "lora-1  failed" in headline(it), "the headline")


async def test_a_name_that_is_none_is_refused_in_one_message(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        await it.plan(tiny, corpus, name="../up")
        await it.press("s")
        await it.until(lambda: "is no run name" in it.told(), "the reason")
        assert not it.app.session.jobs


@pytest.mark.skipif(len(available_engines()) < 2, reason="one engine only")
async def test_switching_the_engine_leaves_the_run_where_it_is(
    opened: Open, tiny: str, corpus: Path, size: Size
) -> None:
    first, other = ENGINES
    async with opened(size, engine=first) as it:
        run = await it.started(tiny, corpus, steps=LONG)
        await it.press("e")
        assert it.app.session.engine == other
        await it.until(lambda: f"engine {other}; {run} goes on with {first}" in it.told(), "what goes on")
        await it.until(lambda: it.rows()[1].strip().startswith(other) and f"{run} on {first}" in it.rows()[1], "status")
        share = it.app.session.jobs[0].share
        await it.until(lambda: it.app.session.jobs[0].share > share, "another step")

        await it.plan(tiny, corpus, steps=LONG, name="second")
        await it.press("s")
        await it.until(lambda: "second-1  running" in headline(it), "the run that was started last")
        assert len(it.app.session.jobs) == 2


async def test_the_loss_gets_a_logarithmic_axis(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        await it.plan(tiny, corpus, steps=3)
        await it.press("s")
        await it.until(lambda: "lora-1  done" in headline(it), "the end")
        await it.press("y")
        await it.until(lambda: it.sees("loss, nats per token (log)"), "the axis")
        await it.press("y")
        await it.until(lambda: not it.sees("(log)"), "the axis")


async def test_the_rest_of_the_time_is_told_from_the_steps(opened: Open) -> None:
    """An evaluation also has its seconds; they are not those of the steps."""
    store = RunStore()
    run = store.create("timed", "training", "torch", {"method": "lora"}, "gemma-tui train", 100).run_id
    store.record(run, "step", 10, {"loss": 3.0, "seconds": 20.0})
    store.record(run, "evaluation", 10, {"valid_loss": 3.0, "seconds": 0.1})
    async with opened() as it:
        await it.mode("2", "training")
        await listed(it, run)
        await it.press("enter")
        await it.until(lambda: "left" in headline(it), "the time")
        assert "3:00 min left" in headline(it)


async def test_the_store_being_gone_is_told_once_and_the_app_lives(opened: Open) -> None:
    async with opened() as it:
        await it.mode("2", "training")
        await it.until(lambda: (paths.runs() / "gemma-tui.db").exists(), "the store")
        store = it.app.screen._store  # type: ignore[attr-defined]
        run = store.create("gone", "training", "torch", {"method": "lora"}, "gemma-tui train", 100).run_id
        await listed(it, run)
        await it.press("enter")
        await it.until(lambda: run in headline(it), "the run")
        store._db.execute("DROP TABLE gt_events")
        await it.until(lambda: "gemma-tui.db" in it.told(), "the reason")
        await it.press("x")
        await it.mode("1", "models")


async def test_no_store_at_all_is_told(opened: Open, home: Path) -> None:
    home.mkdir()
    shutil.rmtree(paths.runs(), ignore_errors=True)
    paths.runs().write_text("a file where a folder should be")
    async with opened() as it:
        await it.mode("2", "training")
        await it.until(lambda: "cannot be made" in it.told(), "the reason")
        for key in ("l", "w", "x", "space", "y", "p"):
            await it.press(key)


async def test_the_form_takes_the_model_that_is_loaded_unless_one_was_chosen(opened: Open, tiny: str) -> None:
    shutil.copytree(paths.models() / tiny, paths.models() / "tinier")
    async with opened() as it:
        await it.mode("2", "training")
        form = it.app.screen.query_one(PlanForm)
        for name in (tiny, "tinier"):
            it.app.load(name)
            await it.loaded(name)
            await it.mode("1", "models")
            await it.mode("2", "training")
            assert form.values["model"] == name
        form.set("model", "chosen")
        it.app.load(tiny)
        await it.loaded(tiny)
        await it.mode("1", "models")
        await it.mode("2", "training")
        assert form.values["model"] == "chosen"


def test_the_form_has_every_option_of_the_plan() -> None:
    form = PlanForm(TrainingPlan)
    assert list(form.values) == list(TrainingPlan.__dataclass_fields__)
