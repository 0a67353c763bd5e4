"""From a key to the drawn map of 512 x 512 weights (120 x 40): a cursor that walks, pages, another grid.

python -m tests.benchmarks.attention_screen [KEYS]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from textual import events
from textual._compositor import CompositorUpdate
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.screen import Screen

from gemma_tui.pair_grid import PairGrid
from gemma_tui.widgets.pair_map import PairMap
from tests.benchmarks.measure import machine
from tests.gemma_tui.app.pair_grids import dense, grid

TOKENS, WINDOW = 512, 256
WALK = ("right", "up", "right", "down")


def fresh(window: int | None) -> PairGrid:
    """A grid of which nothing is computed yet, coloured as on the screen: rows normalised, with a gamma."""
    weights = dense(TOKENS, window)
    shades = np.sqrt(weights / np.nanmax(weights, axis=1, keepdims=True))
    return grid(weights, window=window, shades=shades, shading="row max = 1, gamma 0.5")


class Screenful(App[None]):
    """A map alone; what a terminal would be sent is made though there is none, and the time of it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.map = PairMap(fresh(None))
        self.drawn = 0.0
        self.sent = 0

    def compose(self) -> ComposeResult:
        yield self.map

    def _display(self, screen: Screen[object], renderable: object) -> None:
        if isinstance(renderable, CompositorUpdate):
            self.sent += len(renderable.render_segments(self.console).encode())
            self.drawn = time.perf_counter()
        super()._display(screen, renderable)  # type: ignore[arg-type]


async def timed(app: Screenful, pilot: Pilot[None], act: Callable[[], object]) -> tuple[float, int]:
    """Seconds from an act to the last frame it leads to, and the bytes that were sent."""
    await pilot.pause(0.03)
    app.sent, app.drawn, began = 0, 0.0, time.perf_counter()
    act()
    while not app.drawn and time.perf_counter() - began < 5:
        await asyncio.sleep(0)
    await pilot.pause(0.05)
    return app.drawn - began, app.sent


def presser(app: Screenful, key: str) -> Callable[[], object]:
    """A key as the terminal's driver sends it."""
    return lambda: app._driver.send_message(events.Key(key, None))  # type: ignore[union-attr]


async def main(keys: int) -> None:
    """Each in turn."""
    app = Screenful()
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        app.map.go(300, 40)
        walk = [WALK[i // 25 % len(WALK)] for i in range(keys)]
        moves = [await timed(app, pilot, presser(app, key)) for key in walk]
        pages = [await timed(app, pilot, presser(app, ("pageup", "pagedown")[i % 2])) for i in range(keys)]
        switches = []
        for i in range(keys):
            new = fresh((WINDOW, None)[i % 2])
            switches.append(await timed(app, pilot, partial(app.map.show, new)))
    print(f"map of {TOKENS} x {TOKENS} at 120 x 40, until drawn\n  {machine()}, {keys} each")
    for name, found in (("cursor", moves), ("a page", pages), ("another grid", switches)):
        times = [seconds * 1000 for seconds, _ in found]
        size = statistics.median(size for _, size in found)
        p95 = statistics.quantiles(times, n=20)[-1]
        print(f"  {name}: median {statistics.median(times):.1f} ms, p95 {p95:.1f} ms, {size:,.0f} bytes")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
