"""Downloads in processes of their own, and the commands around the hub and its cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from stand_in_hub import COMMIT, NEXT_COMMIT, Repo, StandInHub, partial_files

from engines.errors import EngineError
from gemma_tui import paths
from gemma_tui.commands.hub import _tell
from gemma_tui.hub import cache, demo
from gemma_tui.hub.downloads import CANCELLED, DONE, FAILED, KILL_SECONDS, Download, Downloads
from gemma_tui.hub.fetching import SOFT_SECONDS, Request
from gemma_tui.hub.models import resolve
from gemma_tui.output import Output
from gemma_tui.runs.queue import Queue
from gemma_tui.runs.store import RunStore

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]

TINY = "org/gemma-3-tiny"
TOKEN = "hf_" + "g" * 34
SECONDS = 20.0
SILENCE = 3600.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} never happened"
        time.sleep(0.01)


def begun() -> Download:
    item = Download(Request(TINY), events=SimpleQueue())
    item.start()
    return item


def slowly(hub: StandInHub) -> Download:
    """A download whose weights take many seconds, begun."""
    hub.faults.slow, hub.faults.piece = 0.3, 4096
    item = begun()
    until(lambda: partial_files(TINY) and hub.count("GET", "/model.safetensors"), "the weights")
    return item


def small_files() -> None:
    """Wait until everything but the weights is here."""
    folder = cache.repo_folder(TINY) / "snapshots" / COMMIT
    until(lambda: all((folder / name).exists() for name in ("config.json", "tokenizer.json")), "the small files")


def ended(item: Download) -> list[dict[str, Any]]:
    """What it said, to its end, which has to come."""
    assert item.events is not None
    said = []
    while (event := item.events.get(timeout=SECONDS)) is not None:
        said.append(dict(event))
    return said


def test_a_cancel_takes_less_than_a_second_and_leaves_no_part(hub: StandInHub) -> None:
    assert SOFT_SECONDS < KILL_SECONDS < 1
    item = slowly(hub)
    hub.faults.slow = SILENCE
    item.cancel()
    # The client would wait for the silent hub, and then try again.
    assert "retry" not in [event["kind"] for event in ended(item)]
    assert item.state == CANCELLED
    assert "begins again" in item.detail
    assert item.done == cache.finished_bytes(TINY) < item.total
    assert not partial_files(TINY)
    hub.faults.slow = 0
    again = begun()
    assert ended(again)[-1]["kind"] == "fetched"
    assert again.state == DONE
    assert again.share == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_process_that_is_killed_anywhere_leaves_what_the_next_try_clears(hub: StandInHub, seed: int) -> None:
    whole = hub.repos[TINY].files
    point = random.Random(seed).randrange(sum(map(len, whole.values())) - (1 << 15))
    hub.faults.slow, hub.faults.piece = 0.02, 4096
    item = begun()
    until(lambda: hub.served > point, "the point")
    assert item._process is not None
    os.killpg(item._process.pid, signal.SIGKILL)
    assert ended(item)[-1]["kind"] == "failed"
    assert item.state == FAILED
    assert not partial_files(TINY)
    with pytest.raises(EngineError, match="not in the hub cache"):
        resolve(TINY)
    hub.faults.slow = 0
    again = begun()
    ended(again)
    assert again.state == DONE
    assert {p.name: p.read_bytes() for p in resolve(TINY).folder.iterdir()} == whole
    assert cache.leftovers().empty


def test_a_process_whose_asker_has_died_ends_and_leaves_no_part(hub: StandInHub) -> None:
    script = (
        "import os, sys, time\nfrom gemma_tui.hub.downloads import Download\n"
        "from gemma_tui.hub.fetching import Request\n"
        f"item = Download(Request({TINY!r}))\nitem.start()\nprint(item._process.pid, flush=True)\ntime.sleep(60)"
    )
    hub.faults.slow, hub.faults.piece = 0.3, 4096
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None
        pid = int(asker.stdout.readline())
        until(lambda: partial_files(TINY) and hub.count("GET", "/model.safetensors"), "the weights")
        asker.kill()
    until(lambda: not Path(f"/proc/{pid}").exists() and not _lives(pid), "its end")
    assert not partial_files(TINY)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_downloads_wait_for_one_another(hub: StandInHub) -> None:
    hub.repos["org/gemma-3-next"] = Repo(dict(hub.repos[TINY].files))
    downloads = Downloads()
    first, second = downloads.add(Request(TINY)), downloads.add(Request("org/gemma-3-next"))
    with pytest.raises(EngineError, match="in the queue already"):
        downloads.add(Request(TINY))
    downloads.advance()
    downloads.advance()
    assert [item.active for item in downloads.items] == [True, False]
    until(lambda: first.state == DONE, "the first")
    downloads.advance()
    assert (first.state, second.active) == (DONE, True)
    second.pause()
    assert second.active
    second.resume()
    until(lambda: not second.active, "the second")
    assert second.state == DONE
    assert [downloads.ended(), downloads.ended()] == [[first, second], []]
    assert first.events is second.events is None
    downloads.forget()
    assert not downloads.items


# ------------------------------------------------------------------------------------------------ commands


def test_search_lists_gemma_3_with_what_one_must_know(hub: StandInHub, command: Commands) -> None:
    files = {"config.json": b"{}"}
    packed = {"parameters": {"U32": 125_000_000, "BF16": 10**6}, "total": 10**9}
    said = {"tags": ["license:gemma", "gemma3"], "safetensors": {"parameters": {"BF16": 10**9}, "total": 10**9}}
    hub.repos = {
        "google/gemma-3-1b": Repo(files, gated="manual", info={**said, "downloads": 7}),
        "mlx-community/gemma-3-1b-4bit": Repo(files, info={"tags": ["mlx", "gemma3_text"], "safetensors": packed}),
        "someone/tuned": Repo(files, info={"config": {"model_type": "gemma3_text"}}),
        "quants/gemma-3-1b-gguf": Repo(files, info={"gguf": {"total": 10**9, "architecture": "gemma3"}}),
        "quants/gemma-3-both": Repo(files, info={**said, "gguf": {"total": 10**9, "architecture": "gemma3"}}),
        "quants/llama-gguf": Repo(files, info={"gguf": {"total": 10**9, "architecture": "llama"}, "downloads": 99}),
        "someone/gemma-2-2b": Repo(files, info={"config": {"model_type": "gemma2"}}),
        "google/gemma-3n-E2B": Repo(files, info={"tags": ["gemma3n"]}),
    }
    code, rows, _ = command("models", "search", "")
    found = {row["name"]: row for row in rows if row["kind"] == "found"}
    assert (code, rows[-1]["status"]) == (0, "done")
    others = {"someone/tuned", "quants/gemma-3-1b-gguf", "quants/gemma-3-both"}
    assert set(found) == {"google/gemma-3-1b", "mlx-community/gemma-3-1b-4bit"} | others
    assert rows[0]["name"] == "google/gemma-3-1b"
    official = found["google/gemma-3-1b"]
    assert (official["bytes"], official["dtype"], official["parameters"]) == (2 * 10**9, "BF16", 10**9)
    assert (official["licence"], official["gated"], official["downloads"]) == ("gemma", "manual", 7)
    assert set(official["fits"]) == {"inference", "full training"}
    mlx = found["mlx-community/gemma-3-1b-4bit"]
    assert (mlx["format"], mlx["dtype"], mlx["bytes"]) == ("MLX", "quantised", 502_000_000)
    assert {name: found[name]["format"] for name in others} == {
        "someone/tuned": "weights", "quants/gemma-3-1b-gguf": "GGUF", "quants/gemma-3-both": "weights",
    }  # fmt: skip


def test_a_search_on_a_narrow_terminal_leaves_out_its_last_columns(
    hub: StandInHub, spoken: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mlx-community/gemma-3-27b-it-4bit-of-a-long-name"
    info = {"tags": ["gemma3", "license:gemma"], "downloads": 1_999_999}
    hub.repos = {name: Repo({}, info={**info, "safetensors": {"parameters": {"BF16": 999_999_999}, "total": 1}})}
    whole = spoken("models", "search")[1].splitlines()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    narrow = spoken("models", "search")[1].splitlines()
    assert [len(whole), len(narrow)] == [2, 2]
    assert ("downloads" in whole[0], "2M" in whole[1], "downloads" in narrow[0]) == (True, True, False)
    assert name in narrow[1]
    assert " 1B " in narrow[1]
    assert max(map(len, re.sub(r"\x1b\[\d*m", "", "\n".join(narrow)).splitlines())) <= 80
    assert "nothing of Gemma-3" in spoken("models", "search", "no-such-words")[1]


def test_what_a_search_brings_is_foreign(
    hub: StandInHub, command: Commands, spoken: Callable[..., tuple[int, str, str]]
) -> None:
    wrong = {
        "downloads": "many",
        "tags": [7, None, "license:\x1b[2J", "gemma3"],
        "safetensors": {"parameters": {"BF16": -1}, "total": -1},
    }
    right = {"tags": ["gemma3"], "downloads": 0}
    hub.repos = {name: Repo({}, info=right) for name in ("a/gemma-3-x", "a/gemma-3-\x1b]0;x\x07", "a/gemma-3-y")}
    hub.repos["a/gemma-3-x"].info = wrong
    code, rows, _ = command("models", "search", "gemma-3")
    assert code == 0
    assert [row["name"] for row in rows[:-1]] == ["a/gemma-3-x", "a/gemma-3-y"]
    assert (rows[0]["downloads"], rows[0]["parameters"]) == (0, 0)
    assert "\x1b" not in spoken("models", "search", "gemma-3")[1]


@pytest.mark.parametrize("answer", ["{", "<html>", '{"a": 1}', "[1]", '[{"id": 7}]', "[" * 100_000])
def test_a_search_that_makes_no_sense_is_one_line(
    hub: StandInHub, command: Commands, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    import stand_in_hub

    monkeypatch.setattr(stand_in_hub, "_search", lambda hub, it, query: it.send(200, answer.encode()))
    code, rows, said = command("models", "search", "gemma-3")
    assert rows[-1]["kind"] == "end"
    assert (code, len(said.splitlines())) in ((1, 1), (0, 0))


def test_download_tells_events_and_the_model_is_usable(hub: StandInHub, command: Commands) -> None:
    hub.repos["org/gemma-3-next"] = Repo(dict(hub.repos[TINY].files))
    code, rows, _ = command("models", "download", TINY, "org/gemma-3-next")
    kinds = [row["kind"] for row in rows]
    assert code == 0
    assert (kinds.count("plan"), kinds.count("fetched"), kinds[-1]) == (2, 2, "end")
    assert rows[-1]["models"] == [TINY, "org/gemma-3-next"]
    code, rows, _ = command("models", "info", TINY)
    assert (code, rows[0]["name"], rows[0]["commit"]) == (0, TINY, COMMIT)


def test_one_that_cannot_be_had_fails_the_command_and_not_the_others(hub: StandInHub, command: Commands) -> None:
    code, rows, said = command("models", "download", "org/gone", TINY)
    assert code == 1
    assert "org/gone" in said
    assert resolve(TINY).source == "hub cache"
    assert rows[-1]["status"] == "failed"
    assert command("models", "download", "no-id")[0] == 2


def test_an_interrupted_command_ends_with_130_and_no_part(hub: StandInHub) -> None:
    hub.faults.slow, hub.faults.piece = 0.3, 4096
    with subprocess.Popen(
        [sys.executable, "-m", "gemma_tui", "models", "download", TINY, "--json"], stdout=subprocess.PIPE, text=True
    ) as process:
        until(lambda: partial_files(TINY) and hub.count("GET", "/model.safetensors"), "the weights")
        small_files()
        hub.faults.slow = SILENCE
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "retry" not in [json.loads(line)["kind"] for line in out.splitlines()]
    last = json.loads(out.splitlines()[-1])
    whole = {name: len(data) for name, data in hub.repos[TINY].files.items() if name != "model.safetensors"}
    assert (last["status"], last["kept"]) == ("interrupted", sum(whole.values()))
    assert not partial_files(TINY)


def test_a_command_that_is_to_outlive_its_terminal_does(hub: StandInHub) -> None:
    hub.faults.slow, hub.faults.piece = 0.3, 4096
    command = shlex.join([sys.executable, "-m", "gemma_tui", "models", "download", TINY, "--json"])
    with subprocess.Popen(["sh", "-c", f"trap '' HUP; exec {command}"], stdout=subprocess.PIPE, text=True) as process:
        until(lambda: partial_files(TINY) and hub.count("GET", "/model.safetensors"), "the weights")
        process.send_signal(signal.SIGHUP)
        hub.faults.slow = 0
        out, _ = process.communicate(timeout=SECONDS)
    assert (process.returncode, json.loads(out.splitlines()[-1])["status"]) == (0, "done")


def test_a_detached_download_outlives_its_command(hub: StandInHub, command: Commands) -> None:
    hub.faults.slow, hub.faults.piece = 0.3, 4096
    code, rows, _ = command("models", "download", TINY, "--detach")
    assert (code, rows[-1]["status"]) == (0, "detached")
    assert _lives(rows[-1]["pid"])
    hub.faults.slow = 0
    until(lambda: not _lives(rows[-1]["pid"]), "its end")
    assert resolve(TINY).folder.name == COMMIT
    last = Path(rows[-1]["log"]).read_text().splitlines()[-1]
    assert json.loads(last) == {"kind": "end", "status": "done", "models": [TINY]}
    hub.repos[TINY].gated = "auto"
    code, rows, said = command("models", "download", TINY, "--detach")
    assert (code, "log in with" in said, rows[-1]["status"]) == (1, True, "failed")


def test_a_download_ends_although_what_it_left_cannot_be_tidied(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(repo: str) -> None:
        raise PermissionError

    monkeypatch.setattr(cache, "tidy", refuse)
    item = slowly(hub)
    assert item._process is not None
    os.killpg(item._process.pid, signal.SIGKILL)
    assert ended(item)[-1]["kind"] == "failed"
    assert item.state == FAILED


def test_a_gguf_that_has_come_says_how_it_is_imported(
    hub: StandInHub, spoken: Callable[..., tuple[int, str, str]]
) -> None:
    hub.repos["org/quants"] = Repo({"tiny-Q4_K_M.gguf": b"GGUF4", "config.json": b"{}", "README.md": b""})
    code, said, _ = spoken("models", "download", "org/quants", "--include", "*.gguf")
    path = cache.repo_folder("org/quants") / "snapshots" / COMMIT / "tiny-Q4_K_M.gguf"
    assert (code, path.exists()) == (0, True)
    assert f"`gemma-tui models import {path}`" in said.replace("\n", "")
    assert "models info" not in said


def test_the_gguf_that_is_imported_is_the_one_that_has_come(
    hub: StandInHub, spoken: Callable[..., tuple[int, str, str]]
) -> None:
    hub.repos["org/quants"] = Repo({"a.gguf": b"GGUF1", "sub/b.gguf": b"GGUF2", "README.md": b""})
    folder = cache.repo_folder("org/quants") / "snapshots" / COMMIT
    for pattern, name in (("sub/*", "sub/b.gguf"), ("a.gguf", "a.gguf"), ("*b.gguf", "sub/b.gguf")):
        said = spoken("models", "download", "org/quants", "--include", pattern)[1]
        assert f"`gemma-tui models import {folder / name}`" in said.replace("\n", "")


@pytest.mark.parametrize(("state", "told"), [(DONE, True), (CANCELLED, False)])
def test_what_has_come_as_it_was_cancelled_is_not_told_to_be_ready(
    capsys: pytest.CaptureFixture[str], state: str, told: bool
) -> None:
    item = Download(Request(TINY), state=state, folder="somewhere" if told else "")
    _tell(item, {"kind": "fetched", "commit": COMMIT, "folder": "somewhere", "bytes": 1}, Output(False))
    assert ("is checked and ready" in capsys.readouterr().out) == told


def test_a_token_is_nowhere_but_with_the_hub(hub: StandInHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repos["org/gated"] = Repo(dict(hub.repos[TINY].files), gated="auto")
    hub.faults.message = f"no: {TOKEN}"
    hub.faults.statuses = {"gone/revision": [403], "broken/": [500]}
    said = ""
    for repo in (TINY, "org/gated", "org/gone", "org/broken"):
        done = subprocess.run(
            [sys.executable, "-m", "gemma_tui", "models", "download", repo, "--debug"], capture_output=True, text=True,
            timeout=60, env={**os.environ, "HF_DEBUG": "1"}, check=False,
        )  # fmt: skip
        said += done.stdout + done.stderr
    assert any(token == TOKEN for _, _, token in hub.asked)
    assert TOKEN not in said
    assert "org/gated is gated" in said
    assert hub.count("GET", "broken/") > 1
    kept = [path for path in home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not kept


@pytest.fixture
def cached(hub: StandInHub) -> Path:
    """The tiny model in the cache, as a download leaves it; the folder of its commit."""
    item = begun()
    ended(item)
    return resolve(TINY).folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)


@pytest.mark.parametrize("how", [(), ("--offline",)])
def test_verify_finds_a_flipped_bit(cached: Path, command: Commands, how: tuple[str, ...]) -> None:
    code, rows, _ = command("models", "verify", TINY, *how)
    assert (code, rows[0]["problems"], rows[0]["files"]) == (0, {}, 3)
    flip(cached / "model.safetensors")
    code, rows, said = command("models", "verify", TINY, *how)
    assert code == 1
    assert rows[0]["problems"] == {"model.safetensors": "other content than its checksum says"}
    assert "fetch it again" in said


def test_verify_finds_a_link_to_elsewhere(cached: Path, command: Commands, tmp_path: Path) -> None:
    outside = tmp_path / "tokenizer.json"
    shutil.copyfile(cached / "tokenizer.json", outside)
    (cached / "tokenizer.json").unlink()
    (cached / "tokenizer.json").symlink_to(outside)
    _, rows, _ = command("models", "verify", TINY)
    assert rows[0]["problems"] == {"tokenizer.json": "a link to outside of the cache"}


def test_verify_of_a_model_without_checksums_looks_at_its_headers(tiny: str, command: Commands) -> None:
    code, rows, _ = command("models", "verify", tiny)
    assert (code, rows[0]["files"], rows[0]["problems"]) == (0, 0, {})
    with (paths.models() / tiny / "model.safetensors").open("ab") as file:
        file.write(b"x")
    code, rows, _ = command("models", "verify", tiny)
    assert (code, list(rows[0]["problems"])) == (1, ["headers"])


def test_the_list_has_the_disk_use_by_repository_and_commit(cached: Path, command: Commands) -> None:
    rows = [row for row in command("models", "list")[1] if row["kind"] == "cached"]
    size = sum(path.stat().st_size for path in cached.iterdir())
    assert [(row["name"], row["bytes"]) for row in rows] == [(TINY, size)]
    (only,) = rows[0]["revisions"]
    assert (only["commit"], only["refs"], only["files"], only["nbytes"]) == (COMMIT, ["main"], 3, size)


def test_remove_shows_first_and_frees_what_it_said(cached: Path, command: Commands) -> None:
    code, rows, _ = command("models", "remove", TINY)
    assert (code, rows[-1]["status"]) == (0, "preview")
    assert cached.is_dir()
    code, rows, _ = command("models", "remove", TINY, "--yes")
    assert (code, rows[-1]["freed"], rows[0]["frees"]) == (0, rows[0]["frees"], rows[-1]["freed"])
    assert rows[0]["frees"] > 0
    assert not cache.repo_folder(TINY).exists()
    assert command("models", "remove", TINY)[0] == 1


def test_removing_one_commit_keeps_what_the_other_shares(cached: Path, hub: StandInHub, command: Commands) -> None:
    hub.repos[TINY].commit = NEXT_COMMIT
    hub.repos[TINY].files["generation_config.json"] = b'{"new": 1}'
    command("models", "download", TINY)
    assert resolve(TINY).folder.name == NEXT_COMMIT
    code, rows, _ = command("models", "remove", f"{TINY}@{COMMIT[:8]}", "--yes")
    assert (code, rows[0]["frees"], rows[0]["commits"]) == (0, 0, [COMMIT])
    assert command("models", "verify", TINY)[0] == 0


@pytest.mark.parametrize("name", ["nano", "gemma-3-270m", "..", ".", "../models", "/etc", "org/../x", ""])
def test_what_is_not_ours_is_not_removed(hub: StandInHub, command: Commands, name: str) -> None:
    assert command("models", "remove", name, "--yes")[0] == 1


def test_a_model_that_a_run_uses_stays(cached: Path, command: Commands, store: RunStore) -> None:
    run = store.create("mine", "train", "torch", {"model": TINY}, "gemma-tui train", 10)
    store.set_state(run.run_id, "running")
    code, _, said = command("models", "remove", TINY, "--yes")
    assert code == 1
    assert run.run_id in said
    assert cached.is_dir()
    store.set_state(run.run_id, "done")
    assert command("models", "remove", TINY, "--yes")[0] == 0


def test_a_plan_of_the_queue_names_paths_from_its_own_folder(
    tiny: str, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (there / "base").symlink_to(paths.models() / tiny)
    with closing(Queue()) as queue:
        (number,) = queue.enqueue([{"model": "base"}], "torch", str(there))
    monkeypatch.chdir(here)
    code, _, said = command("models", "remove", tiny, "--yes")
    assert (code, f"plan {number} of the queue" in said) == (1, True)
    (there / "base").unlink()
    (here / "base").symlink_to(paths.models() / tiny)
    assert command("models", "remove", tiny, "--yes")[0] == 0


def test_looking_who_uses_a_model_imports_none(
    tiny: str, prepared_model: Path, command: Commands, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[object] = []
    monkeypatch.setattr(demo, "packaged", lambda: True)
    monkeypatch.setattr(demo, "_chunks", lambda: [prepared_model / "tokenizer.json"])
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256((prepared_model / "tokenizer.json").read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "import_gguf", lambda *given: imported.append(given) or prepared_model)
    run = store.create("mine", "train", "torch", {"model": "gemma-3-270m"}, "gemma-tui train", 10)
    store.set_state(run.run_id, "running")
    adapter = paths.adapters() / "on-the-real-one"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "gemma-3-270m"}')
    assert command("adapters", "list")[0] == command("models", "list")[0] == 0
    assert command("models", "remove", tiny, "--yes")[0] == 0
    assert not imported


def test_clean_takes_what_broken_downloads_left_and_nothing_else(cached: Path, command: Commands) -> None:
    blobs = cache.repo_folder(TINY) / "blobs"
    (blobs / f"{'c' * 64}.12345678.incomplete").write_bytes(b"x" * 100)
    detached = cached.with_name("c" * 40)
    detached.mkdir()
    (blobs / ("d" * 40)).write_bytes(b"y" * 50)
    (detached / "x.json").symlink_to(blobs / ("d" * 40))
    (cache.cache_folder() / "models--org--nothing" / "refs").mkdir(parents=True)
    code, rows, _ = command("models", "clean")
    assert (code, rows[0]["frees"], rows[-1]["status"]) == (0, 150, "preview")
    code, rows, _ = command("models", "clean", "--yes")
    assert (code, rows[-1]["freed"]) == (0, 150)
    assert command("models", "clean")[1][-1]["freed"] == 0
    assert not (cache.cache_folder() / "models--org--nothing").exists()
    assert command("models", "verify", TINY)[0] == 0


def test_clean_keeps_a_whole_model_without_a_name(cached: Path, hub: StandInHub, command: Commands) -> None:
    assert command("models", "download", TINY, "--revision", COMMIT)[0] == 0
    assert resolve(f"{TINY}@{COMMIT}").folder == cached
    (cache.repo_folder(TINY) / "refs" / "main").unlink()
    assert command("models", "clean", "--yes")[1][-1]["freed"] == 0
    assert command("models", "verify", f"{TINY}@{COMMIT}")[0] == 0
    # As another program leaves it that was told to fetch that commit.
    shutil.rmtree(cache.repo_folder(TINY) / "refs")
    assert command("models", "clean", "--yes")[1][-1]["freed"] == 0
    (cached / "model.safetensors").rename(cached / "pytorch_model.bin")
    assert command("models", "clean", "--yes")[1][-1]["freed"] == 0
    assert (cached / "pytorch_model.bin").is_file()


def beside(snapshot: Path, names: tuple[str, ...]) -> Path:
    """A commit without a name beside another, as a program leaves it that was told to fetch that commit."""
    folder = snapshot.with_name("c" * 40)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        blob = cache.repo_folder(TINY) / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.write_bytes(name.encode())
        (folder / name).symlink_to(blob)
    return folder


@pytest.mark.parametrize(
    ("names", "stays"),
    [
        (("adapter_config.json", "adapter_model.safetensors", "README.md"), True),
        (("model_index.json", "unet/diffusion_pytorch_model.safetensors"), True),
        (("config.json", "onnx/model.onnx"), True),
        (("config.json", "flax_model.msgpack"), True),
        (("config.json", "quants/q.gguf"), True),
        (("config.json", "pytorch_model.bin"), True),
        (("config.json", "tokenizer.json"), False),
        (("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"), False),
    ],
)
def test_clean_keeps_what_another_program_fetched(
    cached: Path, command: Commands, names: tuple[str, ...], stays: bool
) -> None:
    folder = beside(cached, names)
    code, rows, _ = command("models", "clean", "--yes")
    assert (code, rows[-1]["freed"] == 0, folder.is_dir()) == (0, stays, stays)


def test_clean_keeps_the_finished_files_of_a_download_that_goes_on(hub: StandInHub, command: Commands) -> None:
    item = slowly(hub)
    small_files()
    folder = cache.repo_folder(TINY) / "snapshots" / COMMIT
    code, rows, _ = command("models", "clean", "--yes")
    assert (code, rows[-1]["freed"], partial_files(TINY) != []) == (0, 0, True)
    assert (folder / "config.json").exists()
    item.cancel()
    ended(item)
    assert command("models", "clean", "--yes")[1][-1]["freed"] == sum(
        len(data) for name, data in hub.repos[TINY].files.items() if name != "model.safetensors"
    )


def test_clean_refuses_what_a_run_uses(cached: Path, command: Commands, store: RunStore) -> None:
    shutil.rmtree(cache.repo_folder(TINY) / "refs")
    (cached / "model.safetensors").unlink()
    run = store.create("mine", "train", "torch", {"model": str(cached)}, "gemma-tui train", 10)
    store.set_state(run.run_id, "running")
    code, _, said = command("models", "clean", "--yes")
    assert (code, run.run_id in said, cached.is_dir()) == (1, True, True)


def test_removal_takes_the_repository_that_was_named(cached: Path, hub: StandInHub, command: Commands) -> None:
    other = "org/gemma-3-next"
    hub.repos[other] = Repo(dict(hub.repos[TINY].files))
    for gone, stays in ((TINY, other), (other, TINY)):
        assert command("models", "download", TINY, other)[0] == 0
        assert command("models", "remove", gone, "--yes")[0] == 0
        assert (cache.repo_folder(gone).exists(), resolve(stays).folder.name) == (False, COMMIT)


def test_clean_leaves_what_another_process_writes(cached: Path, command: Commands) -> None:
    from huggingface_hub.utils import WeakFileLock

    part = cache.repo_folder(TINY) / "blobs" / f"{'c' * 64}.12345678.incomplete"
    part.write_bytes(b"x")
    with WeakFileLock(cache.cache_folder() / ".locks" / cache.repo_folder(TINY).name / f"{'c' * 64}.lock"):
        command("models", "clean", "--yes")
        assert part.exists()
    command("models", "clean", "--yes")
    assert not part.exists()


def test_a_cache_that_links_to_elsewhere_deletes_nothing_there(
    hub: StandInHub, command: Commands, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    for commit in (COMMIT, NEXT_COMMIT):
        (outside / commit).mkdir(parents=True)
        (outside / commit / "config.json").write_text("{}")
    cache.repo_folder("org/linked").mkdir(parents=True)
    (cache.repo_folder("org/linked") / "snapshots").symlink_to(outside)
    (cache.repo_folder("org/linked") / "refs").mkdir()
    (cache.repo_folder("org/linked") / "blobs").mkdir()
    cache.point("org/linked", "main", COMMIT)
    assert command("models", "remove", f"org/linked@{NEXT_COMMIT}", "--yes")[0] == 1
    assert command("models", "clean", "--yes")[0] == 1
    assert (outside / NEXT_COMMIT / "config.json").exists()


def test_an_adopted_folder_is_a_model_and_not_a_copy(prepared_model: Path, command: Commands, hub: StandInHub) -> None:
    code, rows, _ = command("models", "adopt", str(prepared_model), "--name", "adopted")
    assert code == 0
    assert (paths.models() / "adopted").is_symlink()
    assert resolve("adopted").source == "data folder"
    assert command("models", "adopt", str(prepared_model), "--name", "adopted")[0] == 1
    code, rows, _ = command("models", "remove", "adopted", "--yes")
    assert (code, rows[0]["frees"]) == (0, 0)
    assert (prepared_model / "config.json").is_file()
    with pytest.raises(EngineError):
        resolve("adopted")


@pytest.mark.parametrize("what", ["gone", "empty", "pickle", "code"])
def test_a_folder_that_is_no_model_is_not_adopted(
    prepared_model: Path, command: Commands, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "other"
    if what != "gone":
        folder.mkdir()
    if what in ("pickle", "code"):
        shutil.copyfile(prepared_model / "config.json", folder / "config.json")
        (folder / "pytorch_model.bin").write_bytes(b"x")
    if what == "code":
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, "auto_map": {}}))
    code, _, said = command("models", "adopt", str(folder))
    assert (code, len(said.splitlines())) == (1, 1)
    assert not list(paths.models().glob("*"))
