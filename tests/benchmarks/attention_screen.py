"""From a key to the drawn map of 512 x 512 weights (120 x 40): a cursor that walks, pages, another grid or head.

First the map alone, then the attention screen with 512 tokens on nano, where another head is computed too.

python -m tests.benchmarks.attention_screen [KEYS]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from textual import events
from textual._compositor import CompositorUpdate
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.screen import Screen
from textual.strip import Strip

import gemma_tui.app
from gemma_tui.app import GemmaTui
from gemma_tui.pair_grid import PairGrid
from gemma_tui.widgets.pair_map import PairMap
from gemma_tui.widgets.plan_form import PlanForm
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


class Whole(GemmaTui):
    """The app, which notes when its map was first drawn otherwise than it was at ``again``."""

    CSS_PATH = Path(gemma_tui.app.__file__).with_name("app.tcss")

    def __init__(self) -> None:
        super().__init__(engine="torch")
        self.drawn = 0.0
        self.sent = 0
        self.painted = False
        self.before: object = None

    def state(self) -> object:
        """What the map shows."""
        pairs = self.screen.query_one(PairMap)
        return pairs.grid, pairs.row, pairs.column

    def again(self) -> None:
        """Wait for the next frame in which the map is another."""
        self.sent, self.drawn, self.painted, self.before = 0, 0.0, False, self.state()

    def _display(self, screen: Screen[object], renderable: object) -> None:
        if isinstance(renderable, CompositorUpdate):
            self.sent += len(renderable.render_segments(self.console).encode())
            if self.painted and not self.drawn:
                self.drawn = time.perf_counter()
        super()._display(screen, renderable)  # type: ignore[arg-type]


class Painting:
    """Tells an app of every line of a map that is painted."""

    def __init__(self, app: Whole) -> None:
        self.app, self.render = app, PairMap.render_line

    def __enter__(self) -> None:
        """Put itself between."""

        def render_line(pairs: PairMap, y: int) -> Strip:
            self.app.painted = self.app.painted or self.app.state() != self.app.before
            return self.render(pairs, y)

        PairMap.render_line = render_line  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        """Leave the map as it was."""
        PairMap.render_line = self.render  # type: ignore[method-assign]


Timed = tuple[float, int, float]
"""Seconds that went by, bytes, and seconds of computing on all threads."""


async def timed(app: Screenful, pilot: Pilot[None], act: Callable[[], object]) -> Timed:
    """Seconds from an act to the last frame it leads to, and the bytes that were sent."""
    await pilot.pause(0.03)
    app.sent, app.drawn, began, busy = 0, 0.0, time.perf_counter(), time.process_time()
    act()
    while not app.drawn and time.perf_counter() - began < 5:
        await asyncio.sleep(0.001)
    busy = time.process_time() - busy
    await pilot.pause(0.05)
    return app.drawn - began, app.sent, busy


async def timed_whole(app: Whole, key: events.Key) -> Timed:
    """Seconds from a key to the frame with another map or cursor, and the bytes that were sent until then."""
    while app.session.jobs:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    app.again()
    began, busy = time.perf_counter(), time.process_time()
    app._driver.send_message(key)  # type: ignore[union-attr]
    while not app.drawn and time.perf_counter() - began < 10:
        await asyncio.sleep(0.001)
    return app.drawn - began, app.sent, time.process_time() - busy


def presser(app: Screenful, key: str) -> Callable[[], object]:
    """A key as the terminal's driver sends it."""
    return lambda: app._driver.send_message(events.Key(key, None))  # type: ignore[union-attr]


async def alone(keys: int) -> None:
    """The map alone, each in turn."""
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
    tell({"cursor": moves, "a page": pages, "another grid": switches})


async def screen(keys: int, text: Path) -> None:
    """The attention screen: another head at every ``]``, then a cursor that walks."""
    app = Whole()
    with Painting(app):
        async with app.run_test(size=(120, 40)):
            while not app.session.place.model or app.session.jobs:
                await asyncio.sleep(0.05)
            await app.switch_mode("attention")
            form, pairs = app.screen.query_one(PlanForm), app.screen.query_one(PairMap)
            form.set("text", "")
            form.set("text_file", str(text))
            app.screen.action_head()  # type: ignore[attr-defined]
            while pairs.grid.rows != TOKENS:
                await asyncio.sleep(0.05)
            pairs.go(300, 40)
            heads = [await timed_whole(app, events.Key("right_square_bracket", "]")) for _ in range(keys)]
            walk = [WALK[i // 25 % len(WALK)] for i in range(keys)]
            moves = [await timed_whole(app, events.Key(key, None)) for key in walk]
    print(f"the attention screen, {TOKENS} tokens on nano, until drawn")
    tell({"another head": heads, "cursor": moves})


def tell(found: dict[str, list[Timed]]) -> None:
    """A line for each."""
    for name, pairs in found.items():
        times = [seconds * 1000 for seconds, _, _ in pairs]
        size, busy = (statistics.median(pair[i] for pair in pairs) for i in (1, 2))
        p95, middle = statistics.quantiles(times, n=20)[-1], statistics.median(times)
        print(f"  {name}: median {middle:.1f} ms, p95 {p95:.1f} ms, {busy * 1000:.1f} ms computed, {size:,.0f} bytes")


def text_of_length(tokens: int) -> str:
    """So many tokens of nano's, with ``<bos>``, of words that come again in another order."""
    from gemma_tui.hub.models import resolve
    from gemma_tui.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(resolve("nano").folder)
    words = ["the", "rain", "came", "over", "a", "small", "hill", "and", "every", "child", "ran", "home", "to", "old"]
    chosen = np.random.default_rng(0).choice(words, tokens)
    for count in range(tokens, 0, -1):
        text = " ".join(chosen[:count])
        if len(tokenizer.encode(text)) <= tokens:
            return text + "." * (tokens - len(tokenizer.encode(text)))
    raise AssertionError("a word has more tokens than the text")


async def main(keys: int) -> None:
    """Both."""
    await alone(keys)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(text_of_length(TOKENS))
        await screen(keys, text)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
