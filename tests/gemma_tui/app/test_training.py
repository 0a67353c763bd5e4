from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from textual.widgets import DataTable

from engines import ENGINES
from engines.training import Batch
from gemma_tui import paths
from gemma_tui.runs.store import RunStore
from gemma_tui.widgets.chart import Chart
from gemma_tui.widgets.plan_form import PlanForm

from .conftest import Open, Size, needs_both
from .watching import LONG, headline, listed, log, points


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
        await it.until(lambda: "each), " in it.static("#ar .numbers"), "the text of the tuned model")

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


async def test_what_a_run_left_is_on_the_models_screen(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        await it.table()
        run = await it.started(tiny, corpus, steps=2)
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        await it.mode("1", "models")
        await it.until(lambda: it.sees(run, "run"), "its model in the list")


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


async def test_t_turns_the_small_charts_to_the_diagnoses(opened: Open, tiny: str, corpus: Path, size: Size) -> None:
    async with opened(size) as it:
        run = await it.started(tiny, corpus, steps=6, diagnose_every=2)
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        await it.until(lambda: it.sees("learning rate", "gradient norm", "tokens/s"), "the pace")
        await it.press("t")
        await it.until(lambda: it.sees("rank-1 energy, ∇W", "effective rank, ΔW", "drift of ∇W, |cos|"), "ranks")
        assert not it.sees("tokens/s")
        assert [points(it, chart) for chart in ("rank1_energy", "effective_rank", "drift")] == [3, 4, 3]
        await it.press("t")
        await it.until(lambda: it.sees("stable rank, ∇W", "‖ΔW‖ / ‖W‖", "loss decrease"), "sizes")
        assert [points(it, chart) for chart in ("gradient_stable_rank", "relative_update")] == [3, 4]
        decrease = it.app.screen.query_one("#predicted", Chart).series
        assert [(line.label, len(line.x)) for line in decrease] == [("predicted", 3), ("measured", 3)]
        await it.press("t")
        await it.until(lambda: it.sees("learning rate", "gradient norm", "tokens/s"), "the pace again")


async def test_t_turns_the_small_charts_to_what_is_memorised(opened: Open, tiny: str, corpus: Path, size: Size) -> None:
    async with opened(size) as it:
        plan = {"memorization_every": 1, "memorization_rows": 2, "learning_rate": 0.0, "method": "full"}
        run = await it.started(tiny, corpus, steps=3, **plan)
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        await it.press("t")
        await it.until(lambda: it.sees("memorised bits", "held-out loss", "held-out gain, nats"), "bits")
        assert points(it, "generalisation") == 4
        bits = it.app.screen.query_one("#memorized_bits", Chart).series
        assert [(line.label, len(line.x)) for line in bits] == [("trained on", 4), ("held out", 4)]
        marked = it.app.screen.query_one("#held_out_loss", Chart).series
        assert [(line.label, list(line.x)) for line in marked] == [
            ("held out", [0, 1, 2, 3]), ("trained on", [0, 1, 2, 3]), ("lowest at 0", [0, 0]),
        ]  # fmt: skip
        await it.press("t")
        await it.until(lambda: it.sees("learning rate", "gradient norm", "tokens/s"), "the pace again")


async def test_both_lines_of_the_decrease_are_named(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened((120, 40)) as it:
        run = await it.started(tiny, corpus, steps=4, diagnose_every=2)
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        await it.press("t", "t")
        await it.until(lambda: it.sees("predicted") and it.sees("measured"), "the names")


async def test_t_without_diagnoses_says_so(opened: Open, tiny: str, corpus: Path) -> None:
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=2)
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        await it.press("t")
        await it.until(lambda: "no diagnoses here" in it.told(), "the reason")
        assert it.sees("learning rate")


async def test_the_headline_says_how_far_an_evaluation_is(
    opened: Open, tiny: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.torch.engine import TorchEngine

    release, whole = threading.Event(), TorchEngine.loss

    def slow(engine: TorchEngine, batch: Batch) -> float:
        release.wait(30)
        return whole(engine, batch)

    monkeypatch.setattr(TorchEngine, "loss", slow)
    async with opened() as it:
        run = await it.started(tiny, corpus, steps=2)
        try:
            await it.until(
                lambda: f"{run}  running" in headline(it) and "evaluating 0/1" in headline(it), "the headline"
            )
            await it.until(lambda: "evaluating 0/1" in it.rows()[1], "the status")
        finally:
            release.set()
        await it.until(lambda: f"{run}  done" in headline(it), "the end")
        assert "evaluating" not in headline(it)


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


@needs_both
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
