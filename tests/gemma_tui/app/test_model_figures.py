"""From the list of models: the tree, the weights and the benchmark of the model under the cursor."""

from __future__ import annotations

from gemma_tui.runs.store import RunStore
from gemma_tui.screens.model_figures import BenchScreen, ModelFigure
from gemma_tui.studies.bench.plan import BenchPlan
from gemma_tui.widgets.figure_view import FigureView

from .conftest import Open, Size
from .test_models import choose


async def test_the_tree_and_the_weights_of_a_model(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size) as it:
        await choose(it, tiny)
        await it.press("t")
        await it.until(lambda: it.sees("embed_tokens", "layers.0"), "the tree")
        assert isinstance(it.app.screen, ModelFigure)
        assert it.app.screen.command() == f"gemma-tui models tree {tiny}"
        await it.press("escape")
        await it.press("w")
        await it.until(lambda: it.sees(f"weights of {tiny}", "down_proj"), "the weights")
        await it.press("tab")
        await it.until(lambda: it.sees("map 2/4"), "the next map")
        await it.press("escape")
        await it.until(lambda: not isinstance(it.app.screen, ModelFigure), "the list")


async def test_a_benchmark_is_started_followed_and_stopped(opened: Open, tiny: str, store: RunStore) -> None:
    async with opened() as it:
        await choose(it, tiny)
        await it.press("b")
        await it.until(lambda: it.sees("no benchmark"), "that there is none")
        screen = it.app.screen
        assert isinstance(screen, BenchScreen)
        screen._plan = BenchPlan(
            model=tiny, engines="torch", dtypes="float32", batches="1,2", prompt=8, new_tokens=2, steps=1000,
            sequence_length=64,
        )  # fmt: skip
        await it.press("b")
        await it.until(lambda: bool(screen.query_one(FigureView).figure.tables), "the first cell")
        await it.press("x")
        await it.until(lambda: it.sees("stopped"), "that it stopped")
        run = store.runs(5, ("bench",))[0]
        assert (run.state, run.plan["model"]) == ("stopped", tiny)
        assert 0 < run.step < run.steps
