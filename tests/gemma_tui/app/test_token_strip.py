"""What is drawn of a text after each pass, held against the passes themselves."""

from __future__ import annotations

from typing import Any

import pytest
from decoding_passes import in_blocks, one_by_one, said
from rich.cells import cell_len
from textual.app import App, ComposeResult

from engines.blocks import DecodingPass
from gemma_tui.heat import RAMP, VIRIDIS
from gemma_tui.studies.replay import Replay
from gemma_tui.widgets.token_flow import TokenFlow
from gemma_tui.widgets.token_strip import BY_ENTROPY, BY_PASS, DIFFERENT, TokenStrip

WORDS = {
    100 + i: word for i, word in enumerate(["▁the", "▁sea", "\n", "▁is", "漢字", "▁", "<end_of_turn>", "s", "<0x0A>"])
}
BLOCK = 4
TOKENS = [100 + i % len(WORDS) for i in range(22)]
ENTROPIES = [[0.5, 0.0, 2.0, 0.15, 3.0, 0.12, 0.03][i % 7] for i in range(22)]


def label(token: int) -> str:
    return WORDS.get(token, f"▁other{token}")


def drawn_as(token: int) -> str:
    return label(token).replace("▁", "·").replace("<0x0A>", "↵").replace("\n", "↵")


class OneStrip(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.strip = TokenStrip()

    def compose(self) -> ComposeResult:
        yield self.strip


def boxes(strip: TokenStrip) -> list[tuple[str, str, Any]]:
    """Of every token that is seen: the sign before it, its text, and its style."""
    found = []
    for line in strip.render_lines(strip.size.region):
        pieces = [s for s in line if s.text]
        assert sum(cell_len(s.text) for s in pieces) == strip.size.width
        while len(pieces) > 1 and (pieces[0].text.strip() or pieces[1].text.strip()):
            before, text, *pieces = pieces
            found.append((before.text, text.text, text.style))
    return found


def colour(style: Any) -> tuple[int, int, int] | None:
    return tuple(style.bgcolor.triplet) if style and style.bgcolor and style.bgcolor.triplet else None


def expected(passes: list[DecodingPass], step: int) -> list[str]:
    """The texts, from nothing but the passes."""
    cells: dict[int, str] = {}
    for number, one in enumerate(passes[:step], 1):
        for place, token, decided in zip(one.places.tolist(), one.tokens.tolist(), one.decided.tolist(), strict=True):
            if decided:
                cells[place] = drawn_as(token)
            elif number == step:
                cells[place] = f"‹{drawn_as(token)}›"
    return [cells[place] for place in sorted(cells)]


@pytest.mark.parametrize("size", [(80, 24), (24, 30)], ids=str)
async def test_every_pass_is_drawn_as_it_was_said_forwards_and_backwards(size: tuple[int, int]) -> None:
    app, passes = OneStrip(), in_blocks(TOKENS, ENTROPIES, BLOCK, 0.1)
    async with app.run_test(size=size) as pilot:
        app.strip.begin(Replay(passes, BLOCK), label)
        there_and_back = [
            *range(len(passes) + 1),
            *range(len(passes) - 1, -1, -1),
            len(passes),
            0,
            5,
            1,
            len(passes) - 1,
            2,
            9,
            3,
        ]
        for step in there_and_back:
            app.strip.go(step)
            await pilot.pause()
            assert [text for _, text, _ in boxes(app.strip)] == expected(passes, step)


async def test_without_colour_the_sign_is_the_pass_of_the_block_or_the_height_of_the_entropy() -> None:
    app, passes = OneStrip(), in_blocks(TOKENS, ENTROPIES, BLOCK, 0.1)
    replay = Replay(passes, BLOCK)
    async with app.run_test(size=(80, 24)) as pilot:
        app.strip.begin(replay, label)
        app.strip.go(replay.steps)
        await pilot.pause()
        assert [sign for sign, _, _ in boxes(app.strip)] == [str(cell.turn) for cell in replay.decisions()]
        assert len({cell.turn for cell in replay.decisions()}) > 2
        app.strip.shade = BY_ENTROPY
        app.strip.refresh()
        await pilot.pause()
        signs = [sign for sign, _, _ in boxes(app.strip)]
        ranks = [RAMP.index(sign) for sign in signs]
        pairs = sorted(zip(ENTROPIES, ranks, strict=True))
        assert [rank for _, rank in pairs] == sorted(ranks)
        assert len(set(ranks)) >= 4
        assert {colour(style) for _, _, style in boxes(app.strip)} <= {None, colour(app.strip.rich_style)}


async def test_with_colour_the_backgrounds_go_by_pass_or_by_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    app, passes = OneStrip(), in_blocks(TOKENS, ENTROPIES, BLOCK, 0.1)
    replay = Replay(passes, BLOCK)
    async with app.run_test(size=(80, 24)) as pilot:
        app.strip.begin(replay, label)
        app.strip.go(replay.steps)
        await pilot.pause()
        by_turn: dict[int, set[Any]] = {}
        for (_, _, style), cell in zip(boxes(app.strip), replay.decisions(), strict=True):
            by_turn.setdefault(cell.turn, set()).add(colour(style))
        assert all(len(tints) == 1 for tints in by_turn.values())
        tints = [by_turn[turn].pop() for turn in sorted(by_turn)]
        assert len(set(tints)) == len(tints) > 2
        assert [VIRIDIS.index(tint) for tint in tints] == sorted(VIRIDIS.index(tint) for tint in tints)
        app.strip.shade = BY_ENTROPY
        app.strip.go(1)
        await pilot.pause()
        shown = {
            cell.place: colour(style) for (_, _, style), cell in zip(boxes(app.strip), replay.cells(1), strict=True)
        }
        order = sorted(shown, key=lambda place: ENTROPIES[place])
        assert [VIRIDIS.index(shown[place]) for place in order] == sorted(VIRIDIS.index(t) for t in shown.values())
        app.strip.shade = BY_PASS
        app.strip.refresh()
        await pilot.pause()
        undecided = [cell.place for cell in replay.cells(1) if not cell.decided]
        by_pass = [colour(style) for _, _, style in boxes(app.strip)]
        assert undecided
        assert [by_pass[place] for place in undecided] == [shown[place] for place in undecided]


async def test_what_the_last_pass_decided_is_underlined_and_the_first_difference_marked() -> None:
    app, passes = OneStrip(), in_blocks(TOKENS, ENTROPIES, BLOCK, 0.1)
    replay = Replay(passes, BLOCK)
    async with app.run_test(size=(80, 24)) as pilot:
        app.strip.begin(replay, label)
        app.strip.difference = 4
        for step in range(1, replay.steps + 1):
            app.strip.go(step)
            await pilot.pause()
            shown = boxes(app.strip)
            new = {i for i, (_, _, style) in enumerate(shown) if style.underline}
            assert new == set(passes[step - 1].places[passes[step - 1].decided].tolist())
            marked = [i for i, (sign, _, _) in enumerate(shown) if sign == DIFFERENT]
            assert marked == [4] * any(cell.place == 4 and cell.decided for cell in replay.cells(step))


async def test_the_cursor_goes_over_all_tokens_and_says_where_it_is() -> None:
    app, told = OneStrip(), []
    replay = Replay(one_by_one(TOKENS, ENTROPIES), BLOCK)
    async with app.run_test(size=(24, 8), message_hook=told.append) as pilot:
        app.strip.begin(replay, label)
        app.strip.go(replay.steps)
        app.strip.focus()
        await pilot.press("home")
        for place in range(len(TOKENS)):
            assert app.strip.cell == replay.decisions()[place]
            await pilot.press("right")
        assert app.strip.cursor == len(TOKENS) - 1
        await pilot.press("home", "down")
        second = app.strip._flow.lines[1][0].cell.place
        assert second <= app.strip.cursor < app.strip._flow.lines[2][0].cell.place
        await pilot.press("up")
        assert app.strip.cursor < second
        await pilot.press("pagedown", "end", "pageup")
        reversed_ = [i for i, (_, _, style) in enumerate(boxes(app.strip)) if style.reverse]
        assert len(reversed_) == 1
        await pilot.click(TokenStrip, offset=(1, 0))
        top = app.strip.scroll_offset.y
        assert app.strip.cursor == app.strip._flow.lines[top][0].cell.place
        assert [m.place for m in told if isinstance(m, TokenStrip.Moved)][-1] == app.strip.cursor


async def test_another_width_shows_the_same_tokens() -> None:
    app, passes = OneStrip(), in_blocks(TOKENS, ENTROPIES, BLOCK, 0.1)
    async with app.run_test(size=(80, 24)) as pilot:
        app.strip.begin(Replay(passes, BLOCK), label)
        app.strip.go(4)
        for width in (30, 60, 80):
            await pilot.resize_terminal(width, 24)
            await pilot.pause()
            assert [text for _, text, _ in boxes(app.strip)] == expected(passes, 4)


def test_lines_hold_what_fits_and_end_at_a_line_end() -> None:
    flow = TokenFlow(label, 20)
    flow.put(Replay(one_by_one(TOKENS, ENTROPIES)).cells(len(TOKENS)))
    assert [box.cell.place for line in flow.lines for box in line] == list(range(len(TOKENS)))
    for line in flow.lines[:-1]:
        end = line[-1].x + line[-1].width
        following = flow.lines[flow.line_of(line[-1].cell.place) + 1]
        assert end <= 20
        assert line[-1].text == "↵" or end + following[0].width > 20
        assert all(box.text != "↵" for box in line[:-1])


def test_a_token_is_cut_to_the_line_and_none_is_invisible() -> None:
    flow = TokenFlow(lambda token: ["x" * 500, "", "\u0301", "\u200b", " "][token], 12)
    flow.put(Replay([said((i, i, 0.0, i != 4)) for i in range(5)]).cells(5))
    texts = [box.text for line in flow.lines for box in line]
    assert texts == ["x" * 10 + "…", "∅", "◌\u0301", "\ufffd", "‹·›"]
    assert all(box.width == 1 + cell_len(box.text) for line in flow.lines for box in line)


def test_what_is_drawn_has_no_foreign_control() -> None:
    flow = TokenFlow(lambda token: "\x1b]0;x\x07\x9b2J\u202e")
    flow.put(Replay(one_by_one([1], [0.0])).cells(1))
    assert "␛" in flow.lines[0][0].text
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(flow.lines[0][0].text)
