"""The hub on the models screen: search, details, queue, cancel, verify, remove, by keyboard, at both sizes."""

from __future__ import annotations

import json
import threading
from queue import SimpleQueue

import pytest
from stand_in_hub import COMMIT, Repo, StandInHub, partial_files
from textual.widgets import DataTable, Input

from gemma_tui.hub import cache, remote
from gemma_tui.hub.downloads import Download
from gemma_tui.hub.fetching import Request
from gemma_tui.hub.models import resolve
from gemma_tui.runs.store import RunStore
from gemma_tui.screens.hub_search import HubSearch
from gemma_tui.widgets.dialogs import Question, Reading
from gemma_tui.widgets.download_list import DownloadList

from .conftest import Open, Opened, Size
from .test_hostile import TEXTS, nothing_foreign

TINY = "org/gemma-3-tiny"


async def searched(it: Opened, words: str = "gemma-3") -> None:
    """Search the hub from the list of models."""
    await it.table()
    await it.press("slash")
    await it.until(lambda: isinstance(it.app.screen, HubSearch) and it.app.screen.is_current, "the search")
    it.app.screen.query_one(Input).value = words
    await it.press("enter")
    await it.until(lambda: "…" not in it.static("#about") and "searches" not in it.static("#about"), "an answer")


async def queued(it: Opened) -> None:
    """Queue what was found first, and go back."""
    await searched(it)
    await it.press("d", "escape")
    await it.until(lambda: it.app.screen.query_one(DownloadList).row_count, "the queue")


async def test_a_model_is_found_looked_at_and_fetched(opened: Open, hub: StandInHub, size: Size) -> None:
    async with opened(size, model="") as it:
        await searched(it)
        await it.until(lambda: it.sees(TINY, "repository"), "the table")
        await it.press("enter")
        await it.until(lambda: it.sees("to fetch", "memory"), "the details")
        assert it.sees("stored as F32")
        await it.press("f")
        await it.until(lambda: it.sees("what org/gemma-3-tiny needs here", "relora"), "the needs")
        await it.press("escape")
        await it.until(lambda: isinstance(it.app.screen, HubSearch), "the search")
        assert not cache.repo_folder(TINY).exists()
        await it.press("c")
        await it.until(lambda: isinstance(it.app.screen, Reading), "the command")
        assert it.app.clipboard == f"gemma-tui models download {TINY}"
        await it.press("escape", "d", "escape")
        await it.until(lambda: it.sees("done"), "the end")
        table = await it.table()
        await it.until(lambda: TINY in [str(key.value) for key in table.rows], "the model in the list")
        await it.until(lambda: it.sees("██████████"), "the whole bar")
        it.app.screen.query_one(DownloadList).focus()
        await it.press("delete")
        assert not it.app.screen.query_one(DownloadList).display


async def test_a_late_answer_does_not_overwrite_a_newer_one(
    opened: Open, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/gemma-3-next"] = Repo(dict(hub.repos[TINY].files))
    late, came = threading.Event(), []
    real_search, real_look = remote.search, remote.look

    def search(words: str) -> list[remote.Found]:
        if words == "tiny":
            late.wait(20)
        return real_search(words)

    def look(repo: str) -> remote.Remote:
        if repo == TINY:
            late.wait(20)
        return real_look(repo)

    def counted(name: str) -> None:
        real = getattr(HubSearch, name)
        monkeypatch.setattr(HubSearch, name, lambda *given: (real(*given), came.append(given[1])))

    monkeypatch.setattr(remote, "search", search)
    monkeypatch.setattr(remote, "look", look)
    counted("_fill")
    counted("_about")
    async with opened((120, 40), model="") as it:
        await searched(it, "next")
        it.app.screen.query_one(Input).value = "tiny"
        await it.press("slash", "enter")
        it.app.screen.query_one(Input).value = "gemma-3"
        await it.press("enter")
        await it.until(lambda: "gemma-3" in came, "the newer answer")
        table = it.app.screen.query_one(DataTable)
        assert table.row_count == 2
        late.set()
        await it.until(lambda: "tiny" in came, "the late answer")
        assert table.row_count == 2
        late.clear()
        rows = [table.get_row_at(at)[0].plain for at in range(2)]
        table.move_cursor(row=rows.index(TINY))
        await it.press("enter")
        table.move_cursor(row=1 - rows.index(TINY))
        await it.until(lambda: "org/gemma-3-next" in it.static("#about"), "the other model")
        late.set()
        await it.until(lambda: TINY in came, "the late details")
        assert "to fetch" not in it.static("#about")


async def test_what_is_not_in_float32_is_not_called_so(opened: Open, hub: StandInHub) -> None:
    packed = {"parameters": {"U32": 125_000_000, "BF16": 10**6}, "total": 10**9}
    hub.repos = {"org/gemma-3-4bit": Repo({}, info={"tags": ["mlx", "gemma3"], "safetensors": packed})}
    async with opened((120, 40), model="") as it:
        await searched(it)
        assert "as it is stored: inference" in it.static("#about")


async def test_a_file_of_gguf_is_chosen_and_fetched(opened: Open, hub: StandInHub, size: Size) -> None:
    files = {"tiny-Q8_0.gguf": b"GGUF" * 9, "tiny-Q4_K_M.gguf": b"GGUF"}
    hub.repos = {"org/gemma-3-gguf": Repo(files, info={"gguf": {"total": 7, "architecture": "gemma3"}})}
    async with opened(size, model="") as it:
        await searched(it)
        await it.press("enter")
        await it.until(lambda: it.sees("one of these files", "tiny-Q8_0.gguf"), "the files")
        await it.press("d")
        await it.until(lambda: isinstance(it.app.screen, Question), "the question")
        await it.until(lambda: it.sees("1 4 B tiny-Q4_K_M.gguf"), "the smallest file")
        await it.press("1", "escape")
        await it.until(lambda: it.sees("done"), "the end")
        folder = cache.repo_folder("org/gemma-3-gguf") / "snapshots" / COMMIT
        assert [path.name for path in folder.iterdir()] == ["tiny-Q4_K_M.gguf"]
        await it.until(lambda: "has the command for it" in it.told(), "what to do with it")
        rows = it.app.screen.query_one(DownloadList)
        await it.until(lambda: rows.focus().has_focus, "the focus")
        await it.until(lambda: "done, " in it.static(".detail"), "all of the row")
        await it.press("c")
        await it.until(lambda: isinstance(it.app.screen, Reading), "the command")
        assert it.app.clipboard == f"gemma-tui models import {folder / 'tiny-Q4_K_M.gguf'}"


async def test_safetensors_beside_gguf_are_fetched(opened: Open, hub: StandInHub) -> None:
    files = {**hub.repos[TINY].files, "tiny-Q4_K_M.gguf": b"GGUF"}
    hub.repos = {"org/gemma-3-both": Repo(files, info={"gguf": {"total": 7, "architecture": "gemma3"}})}
    async with opened((120, 40), model="") as it:
        await searched(it)
        assert it.sees("GGUF")
        await it.press("d")
        await it.until(lambda: "is queued" in it.static("#about"), "the queue")
        assert not isinstance(it.app.screen, Question)
        await it.until(lambda: it.app.downloads and it.app.downloads.items[0].state == "done", "the end")
        folder = cache.repo_folder("org/gemma-3-both") / "snapshots" / COMMIT
        assert "model.safetensors" in {path.name for path in folder.iterdir()}
        assert not list(folder.glob("*.gguf"))


async def test_a_late_question_is_not_asked(opened: Open, hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos = {
        f"org/gemma-3-{name}": Repo({"a.gguf": b"GGUF"}, info={"gguf": {"total": 7, "architecture": "gemma3"}})
        for name in ("one", "two")
    }
    late, asked, came = threading.Semaphore(0), [], []
    real_look, real_ask = remote.look, HubSearch._ask

    def look(repo: str) -> remote.Remote:
        asked.append(repo)
        late.acquire(timeout=20)
        return real_look(repo)

    monkeypatch.setattr(remote, "look", look)
    monkeypatch.setattr(HubSearch, "_ask", lambda *given: (real_ask(*given), came.append(given[2])))
    async with opened((120, 40), model="") as it:

        async def ask() -> None:
            before = len(asked)
            await it.press("d")
            await it.until(lambda: len(asked) > before, "the hub is asked")

        async def answer() -> None:
            before = len(came)
            late.release()
            await it.until(lambda: len(came) > before, "the late answer")
            await it.pilot.pause()

        await searched(it)
        await ask()
        await it.press("down")
        await answer()
        assert not isinstance(it.app.screen, Question)  # another row was chosen
        await ask()
        await ask()
        questions = 0
        for _ in range(2):
            await answer()
            if isinstance(it.app.screen, Question):
                questions += 1
                await it.press("escape")
        assert questions == 1
        await ask()
        await it.press("c")
        await answer()
        assert isinstance(it.app.screen, Reading)  # the command lies over the search
        await it.press("escape")
        await ask()
        await it.press("escape")
        await answer()
        assert not isinstance(it.app.screen, Question)  # the search was left


async def test_a_download_is_paused_goes_on_and_is_cancelled(opened: Open, hub: StandInHub) -> None:
    hub.faults.slow, hub.faults.piece = 0.3, 4096
    async with opened(model="") as it:
        await queued(it)
        await it.until(lambda: partial_files(TINY), "the first bytes")
        it.app.screen.query_one(DownloadList).focus()
        await it.press("space")
        await it.until(lambda: it.sees("paused"), "the pause")
        await it.press("space")
        await it.until(lambda: it.sees("running"), "the end of the pause")
        await it.until(lambda: "running, " in it.static(".detail") and TINY in it.static(".detail"), "all of the row")
        await it.press("x")
        await it.until(lambda: it.sees("cancelled") and not partial_files(TINY), "the cancel")
        assert it.app.downloads is not None
        assert "begins again" in it.static(".detail")
        assert it.app.downloads.items[0].rate == 0
        hub.faults.slow = 0
        await it.press("space")
        await it.until(lambda: it.sees("done"), "the end of the second try")
        assert len(it.app.downloads.items) == 1


async def test_a_second_waits_and_the_same_twice_is_refused(opened: Open, hub: StandInHub) -> None:
    hub.repos["org/gemma-3-next"] = Repo(dict(hub.repos[TINY].files))
    hub.faults.slow, hub.faults.piece = 0.1, 64  # minutes for the first, unless it is hurried below
    async with opened((120, 40), model="") as it:
        await searched(it)
        await it.press("d", "d", "down", "d", "escape")
        await it.until(lambda: "in the queue already" in it.told(), "the refusal")
        await it.until(lambda: it.sees("waiting", "running"), "the queue")
        hub.faults.slow = 0
        await it.until(lambda: it.app.downloads and {d.state for d in it.app.downloads.items} == {"done"}, "both")


async def test_leaving_asks_and_leaves_no_part(opened: Open, hub: StandInHub) -> None:
    hub.faults.slow, hub.faults.piece = 0.3, 4096
    async with opened(model="") as it:
        await queued(it)
        it.app.fetch("org/gemma-3-next")
        await it.until(lambda: partial_files(TINY), "the first bytes")
        await it.press("q")
        await it.until(lambda: isinstance(it.app.screen, Question), "the question")
        await it.until(lambda: it.sees(f"{TINY} is being fetched, 1 more in the queue."), "how many")
        await it.press("s")
        downloads = it.app.downloads
        assert downloads is not None
        await it.until(lambda: not partial_files(TINY), "the end")
        assert downloads.items[0].state == "cancelled"


async def test_a_hub_that_refuses_is_told(opened: Open, hub: StandInHub) -> None:
    hub.repos[TINY].gated = "auto"
    async with opened(model="") as it:
        await searched(it)
        assert "gated" in it.static("#about")
        await it.press("enter")
        await it.until(lambda: "log in with" in it.static("#about"), "the sentence that helps")
        await it.press("d", "escape")
        # The message lies over the list.
        await it.until(lambda: "log in with" in it.told(), "the failure")
        row = it.app.screen.query_one(DownloadList).get_row_at(0)
        assert (row[1].plain, "log in with" in row[-1].plain) == ("failed", True)


@pytest.fixture
def cached(hub: StandInHub) -> str:
    hub.repos[TINY].files["README.md"] = b"---\nlicense: gemma\n---\n# Tiny\nA **small** [model](http://x.y).\n"
    item = Download(Request(TINY), events=SimpleQueue())
    item.start()
    list(item.follow())
    return item.state


async def on_the_model(it: Opened) -> None:
    table = await it.table()
    await it.until(lambda: TINY in [str(key.value) for key in table.rows], "the model")
    table.move_cursor(row=table.get_row_index(TINY))
    await it.pilot.pause()


async def test_a_model_is_verified_and_shown(opened: Open, cached: str, size: Size) -> None:
    async with opened(size, model="") as it:
        await on_the_model(it)
        await it.press("v")
        await it.until(lambda: "everything is as it should be" in it.static(".detail"), "the result")
        path = resolve(TINY).folder / "model.safetensors"
        data = path.read_bytes()
        path.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        await it.press("v")
        await it.until(lambda: "other content than its checksum says" in it.static(".detail"), "the problem")
        await it.press("i")
        await it.until(lambda: isinstance(it.app.screen, Reading), "the facts")
        await it.until(lambda: it.sees("licence gemma", "A small model.", "commit aaaa"), "their text")


async def test_a_model_is_removed_after_a_look(opened: Open, cached: str, size: Size) -> None:
    async with opened(size, model="") as it:
        await on_the_model(it)
        await it.press("delete")
        await it.until(lambda: isinstance(it.app.screen, Question), "the question")
        await it.until(lambda: it.sees(f"{TINY}: frees", f"commit aaaaaaaaaaaa of {TINY}"), "what goes")
        await it.press("escape")
        assert cache.repo_folder(TINY).exists()
        await on_the_model(it)
        await it.press("delete")
        await it.until(lambda: isinstance(it.app.screen, Question), "the question")
        await it.press("y")
        table = await it.table()
        await it.until(lambda: TINY not in [str(key.value) for key in table.rows], "the removal")
        assert not cache.repo_folder(TINY).exists()


async def test_a_model_in_use_is_not_removed(opened: Open, cached: str, store: RunStore) -> None:
    run = store.create("mine", "train", "torch", {"model": TINY}, "gemma-tui train", 10)
    store.set_state(run.run_id, "running")
    async with opened(model="") as it:
        await on_the_model(it)
        await it.press("delete")
        await it.until(lambda: run.run_id in it.told(), "the refusal")
        await it.press("enter")
        await it.loaded(TINY)
        store.set_state(run.run_id, "done")
        await it.press("delete")
        await it.until(lambda: "is loaded" in it.told(), "the refusal")
        await it.press("k")
        await it.until(lambda: "nothing to delete" in it.told(), "the answer")


async def test_what_the_hub_says_is_foreign(opened: Open, hub: StandInHub) -> None:
    hub.repos = {}
    for number, text in enumerate(TEXTS):
        said = text.encode("utf-8", "replace").decode()
        info = {"tags": [f"license:{said}", "gemma3"], "config": {"model_type": said}}
        config = json.dumps({"model_type": said}).encode()
        hub.repos[f"org/gemma-3-{number}"] = Repo({"config.json": config, "model.safetensors": b""}, info=info)
    async with opened((120, 40), model="") as it:
        await searched(it)
        await it.until(lambda: f"gemma-3-{len(TEXTS) - 1}" in nothing_foreign(it), "the table")
        for _ in TEXTS:
            await it.press("enter")
            await it.until(lambda: "model_type" in it.static("#about"), "the refusal")
            nothing_foreign(it)
            await it.press("down")
