"""One of the texts that are written side by side: its numbers, its tokens, and what is under the cursor."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from gemma_tui.studies.generation import AR
from gemma_tui.studies.replay import Cell, Replay
from gemma_tui.studies.side_by_side import DONE, WAITING, WRITING, Side, SideBySide
from gemma_tui.text import one_line
from gemma_tui.widgets.token_flow import visible
from gemma_tui.widgets.token_strip import TokenStrip


class SidePane(Vertical):
    """A line of numbers, the tokens, and a line on the one under the cursor."""

    DEFAULT_CSS = """
    SidePane { height: 1fr; width: 1fr; padding: 0 1; }
    SidePane > Static { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    SidePane > .numbers { text-style: bold; }
    SidePane > .under { color: $text-muted; }
    """

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self.side: Side | None = None
        self.replay = Replay()
        self._texts = SideBySide()
        self._shown = ("", "")

    def compose(self) -> ComposeResult:
        """Numbers, tokens, the token under the cursor."""
        yield Static("", classes="numbers", markup=False)
        yield TokenStrip()
        yield Static("", classes="under", markup=False)

    @property
    def strip(self) -> TokenStrip:
        """The tokens."""
        return self.query_one(TokenStrip)

    def begin(self, side: Side, texts: SideBySide, block: int) -> None:
        """Show another text.

        Args:
            block: places that its passes are counted by.
        """
        self.side, self._texts = side, texts
        self.replay = Replay(side.generation.passes, block)
        self.strip.begin(self.replay, texts.label)

    def read(self) -> None:
        """Take in what was written."""
        # Whether it is all is asked before, since it grows in another thread.
        done = self.side is not None and self.side.state == DONE
        self.replay.read()
        if self.side is not None and done:
            self.replay.end = len(self.side.generation.tokens)

    def tell(self, running: bool, other: SidePane | None) -> None:
        """Bring both lines up to date.

        Args:
            running: whether what writes the texts is still at it.
            other: the text it is compared with.
        """
        if self.side is None:
            return
        shown = self._numbers(self.side, running), self._under(other)
        for kind, old, new in zip((".numbers", ".under"), self._shown, shown, strict=True):
            if new != old:
                self.query_one(kind, Static).update(new, layout=False)
        self._shown = shown

    def _numbers(self, side: Side, running: bool) -> str:
        told, plan = side.generation, side.plan
        name = "next token" if plan.decoder == AR else f"blocks of {plan.block}, γ {plan.gamma:g}"
        if side.state == WAITING:
            return f"{name}: {'comes next' if running else 'not written'}"
        end = "writing" if side.state == WRITING and running else told.ended or "ended"
        return (
            f"{name}: {len(told.tokens):,} tokens in {len(told.passes):,} passes ({told.tokens_per_pass:.2f} each), "
            f"{told.tokens_per_second:.1f}/s, {one_line(end)}"
        )

    def _under(self, other: SidePane | None) -> str:
        cell = self.strip.cell
        if cell is None:
            return ""
        what = f"token {cell.place} {self._word(cell)}"
        how = f"pass {cell.step} ({cell.turn} of its block)" if cell.decided else "not decided"
        numbers = f"{cell.entropy:.3g} nats, p {cell.probability:.3g}"
        return one_line(" · ".join(part for part in (what, how, numbers, self._beside(cell, other)) if part))

    def _beside(self, cell: Cell, other: SidePane | None) -> str:
        """How the token compares with that at its place in the other text."""
        if other is None or other.side is None or not cell.decided:
            return ""
        tokens = other.side.generation.tokens
        if cell.place >= len(tokens):
            return ""
        if tokens[cell.place] == cell.token:
            return "agrees"
        return f"differs: {visible(self._texts.label(tokens[cell.place]))}"

    def _word(self, cell: Cell) -> str:
        return f'"{visible(self._texts.label(cell.token))}"'
