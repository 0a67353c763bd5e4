"""From the list of models: the tree, the weights and the needs of the model under the cursor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engines import available_engines
from engines.adapters import LowRank, target_modules, write_adapter
from engines.training import LoRASettings
from gemma_tui import paths
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


async def test_the_weights_of_an_adapter_are_told_against_its_base(
    opened: Open, tiny: str, command: Callable[..., tuple[int, list[dict[str, Any]], str]]
) -> None:
    config, settings = resolve(tiny).config(), LoRASettings(2, 3.0, targets=("q_proj",))
    factors = {
        name: LowRank(np.ones((2, inner), np.float32), np.ones((out, 2), np.float32))
        for name, (out, inner) in target_modules(config, settings.targets, None).items()
    }
    (paths.adapters() / "tuned").mkdir(parents=True)
    write_adapter(paths.adapters() / "tuned", factors, settings, config, tiny)
    async with opened((120, 40)) as it:
        await choose(it, "tuned")
        await it.press("w")
        await it.until(lambda: it.sees(f"tuned against {tiny}"), "the differences")
        screen = it.app.screen
        assert isinstance(screen, ModelFigure)
        shown, words = screen.query_one(FigureView).figure, screen.command()
    rows = command(*words.split()[1:])[1]
    assert rows[0]["facts"] == shown.facts
    assert [row["difference"] for row in rows[1:-1]] == [
        row[shown.tables[0].columns.index("difference")] for row in shown.tables[0].rows
    ]


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
