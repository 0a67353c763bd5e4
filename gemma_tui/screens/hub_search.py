"""The hub: words to search for, what was found, what is known of one of them, and queueing it."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static
from textual.worker import Worker, get_current_worker

from engines.errors import EngineError
from gemma_tui.output import bytes_text
from gemma_tui.text import clean, one_line
from gemma_tui.widgets.dialogs import Question, Reading

if TYPE_CHECKING:
    from gemma_tui.app import GemmaTui
    from gemma_tui.hub.remote import Found, RemoteFile

NAME_WIDTH = 44
FIRST_WORDS = "gemma-3"
KEYS = "123456789abcdef"
"""For the files of a repository, the smallest first; the rest are had by the command."""


class FoundTable(DataTable[Text]):
    """What a search found; enter asks the hub for more, d queues the download."""

    BINDINGS = [
        Binding("enter", "select_cursor", "Details", id="hub.details"),
        Binding("f", "screen.fit", "Fit", id="hub.fit",
                tooltip="What a model would need here, to be read with and to be trained, on each engine"),
        Binding("d", "screen.download", "Download", id="hub.download"),
        Binding("slash", "screen.words", "Search", id="hub.words", key_display="/"),
    ]  # fmt: skip


class HubSearch(ModalScreen[None]):
    """Gemma-3 models on the hub. Of a model nothing is fetched before d is pressed, but its config and headers."""

    DEFAULT_CSS = """
    HubSearch { align: center middle; }
    HubSearch > Vertical { width: 100%; height: 100%; background: $background; }
    HubSearch #beside { height: auto; max-height: 60%; padding: 0 1; border-top: solid $panel; }
    """
    BINDINGS = [
        Binding("escape", "close", "Back", id="hub.back"),
        Binding("c", "show_command", "Cmd", id="hub.command", tooltip="Show and copy the command that does this"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._found: list[Found] = []
        self._words = FIRST_WORDS

    @property
    def bench(self) -> GemmaTui:
        """The app, by its own type."""
        return cast("GemmaTui", self.app)

    def compose(self) -> ComposeResult:
        """Words, table, details, keys."""
        with Vertical():
            yield Input(FIRST_WORDS, placeholder="words of the name", compact=True, id="words")
            yield FoundTable(cursor_type="row", cell_padding=1)
            with VerticalScroll(id="beside"):
                yield Static("enter searches the hub", id="about", markup=False)
            yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Wait for words."""
        from gemma_tui.hub.descriptions import FOUND

        self.query_one(DataTable).add_columns(*FOUND)
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Search."""
        event.stop()
        self._words = event.value.strip()
        self._tell("searching the hub…")
        self._search(self._words)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Say what is known without asking again."""
        event.stop()
        if (item := self._chosen()) is not None:
            self._tell(_known(item))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Ask the hub for more."""
        event.stop()
        if (item := self._chosen()) is not None:
            self._tell(f"asking for {item.repo}…")
            self._look(item.repo)

    def action_words(self) -> None:
        """Search again."""
        self.query_one(Input).focus()

    def action_fit(self) -> None:
        """What the model under the cursor would need here; of its weights nothing comes but headers."""
        from gemma_tui.screens.model_figures import fit_screen

        if (item := self._chosen()) is not None:
            self.app.push_screen(fit_screen(item.repo))

    def action_download(self) -> None:
        """Queue the model under the cursor."""
        item = self._chosen()
        if item is not None and item.kind == "GGUF":
            self._tell(f"asking for the files of {item.repo}…")
            self._choose(item.repo)
        elif item is not None:
            self._fetch(item.repo)

    def action_show_command(self) -> None:
        """The command that does the same."""
        item = self._chosen()
        text = f"gemma-tui models search {shlex.quote(self._words)}"
        if item is not None and not self.query_one(Input).has_focus:
            text = f"gemma-tui models download {shlex.quote(item.repo)}"
        self.app.copy_to_clipboard(text)
        self.app.push_screen(Reading("the same as a command (copied)", text))

    def action_close(self) -> None:
        """Back to the models that are here."""
        self.dismiss(None)

    @work(thread=True, exclusive=True, group="hub")
    def _search(self, words: str) -> None:
        from gemma_tui.hub.descriptions import found_cells
        from gemma_tui.hub.remote import search

        app = self.app  # a screen that is left meanwhile has none
        for name in ("gemma_tui.hub.downloads", "gemma_tui.studies.fitting"):
            importlib.import_module(name)  # before a key asks for it on the event loop
        try:
            found = search(words)
        except EngineError as error:
            app.call_from_thread(self._failed, words, str(error))
            return
        app.call_from_thread(self._fill, words, found, [found_cells(item) for item in found])

    @work(thread=True, exclusive=True, group="files")
    def _choose(self, repo: str) -> None:
        """Ask which file of GGUF is wanted."""
        from gemma_tui.hub.remote import gguf_files, look

        app, asking = self.app, get_current_worker()  # a screen that is left meanwhile has none
        try:
            files = gguf_files(look(repo))
        except EngineError as error:
            app.call_from_thread(self._about, repo, str(error))
            return
        app.call_from_thread(self._ask, asking, repo, files)

    def _ask(self, asking: Worker[None], repo: str, files: Sequence[RemoteFile]) -> None:
        """Which file is wanted, unless something else is shown meanwhile; no GGUF to choose from means weights.

        Args:
            asking: is cancelled, though its thread goes on, if the files were asked for again.
        """
        if not files:
            self._fetch(repo)
            return
        if asking.is_cancelled or not self.is_active or not self._is_chosen(repo):
            return
        known = dict(zip(KEYS, files, strict=False))
        answers = {key: f"{bytes_text(file.size):>8}  {one_line(file.path, 48)}" for key, file in known.items()}

        def chosen(key: str | None) -> None:
            if key:
                self._fetch(repo, (known[key].path,))

        self.app.push_screen(Question(f"Which file of {one_line(repo, 48)}?", answers), chosen)

    def _fetch(self, repo: str, include: tuple[str, ...] = ()) -> None:
        if self.bench.attempt(lambda: self.bench.fetch(repo, include)):
            self._tell(f"{repo} is queued; the list of models shows how far it is")

    @work(thread=True, exclusive=True, group="hub")
    def _look(self, repo: str) -> None:
        from gemma_tui.hub.descriptions import inside_lines
        from gemma_tui.hub.headers import look_inside
        from gemma_tui.studies.fitting import memory_lines

        app = self.app  # a screen that is left meanwhile has none
        try:
            inside = look_inside(repo)
        except EngineError as error:
            app.call_from_thread(self._about, repo, str(error))
            return
        lines = inside_lines(inside) + (memory_lines(inside.config) if inside.config is not None else [])
        text = "\n".join(f"{name:<10}  {one_line(text, 200)}" for name, text in lines)
        app.call_from_thread(self._about, repo, text)

    def _about(self, repo: str, text: str) -> None:
        """Details, unless another model was chosen meanwhile, which does not stop a thread that waits for the hub."""
        if self.is_attached and self._is_chosen(repo):
            self._tell(text)

    def _failed(self, words: str, text: str) -> None:
        if words == self._words:
            self._tell(text)

    def _fill(self, words: str, found: list[Found], rows: list[tuple[str, ...]]) -> None:
        """What was found, unless other words were searched for meanwhile."""
        if not self.is_attached or words != self._words:
            return
        self._found = found
        table = self.query_one(DataTable)
        table.clear()
        for cells in rows:
            table.add_row(*(Text(one_line(cell, NAME_WIDTH)) for cell in cells))
        if found:
            table.focus()
            self._tell(_known(found[0]))
        else:
            self._tell("nothing of Gemma-3 was found: try other words")

    def _tell(self, text: str) -> None:
        if self.is_attached:
            self.query_one("#about", Static).update(Text(clean(text)))

    def _is_chosen(self, repo: str) -> bool:
        return (item := self._chosen()) is not None and item.repo == repo

    def _chosen(self) -> Found | None:
        at = self.query_one(DataTable).cursor_row
        return self._found[at] if 0 <= at < len(self._found) else None


def _known(item: Found) -> str:
    from gemma_tui.hub.descriptions import fit_of

    fits = ", ".join(f"{use} {band}" for use, band in fit_of(item).items())
    counted = "in float32: " if item.parameters else "as it is stored: " if fits else "its size is not told"
    changed = f"; changed {item.modified}" if item.modified else ""
    gate = {"": "open", "auto": "gated: its terms must be accepted", "manual": "gated: its owners approve requests"}
    return f"{item.repo}\n{gate[item.gated]}{changed}\n{counted}{fits}"
