"""From the list of models: the tree, the weights and the needs of the model under the cursor."""

from __future__ import annotations

from engines import available_engines
from gemma_tui.hub.models import resolve
from gemma_tui.screens.model_figures import ModelFigure
from gemma_tui.studies.fitting import devices, needs
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


async def test_what_a_model_needs_is_shown_for_each_engine(opened: Open, tiny: str, size: Size) -> None:
    async with opened(size) as it:
        await choose(it, tiny)
        await it.press("f")
        await it.until(lambda: it.sees("what tiny needs here", "inference", "rank1", "fits"), "the needs")
        screen = it.app.screen
        assert isinstance(screen, ModelFigure)
        assert screen.command() == f"gemma-tui models fit {tiny}"
        figure = screen.query_one(FigureView).figure
        expected = {
            engine: [need for need in needs(resolve(tiny).config(), devices()) if need.engine == engine]
            for engine in available_engines()
        }
        assert {table.kind: [tuple(row[:3]) for row in table.rows] for table in figure.tables} == {
            engine: [(need.engine, need.dtype, need.use) for need in found] for engine, found in expected.items()
        }
        await it.press("tab")
        await it.until(lambda: it.sees(f"table {figure.tables[-1].kind}"), "the other engine")
