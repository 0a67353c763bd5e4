"""Fetching with the real client from a stand-in hub: what comes, what is refused, and what goes wrong on the way."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stand_in_hub
from safetensors import numpy as reference
from stand_in_hub import COMMIT, NEXT_COMMIT, Repo, StandInHub, partial_files, serving

from engines.errors import EngineError
from gemma_tui.hub import cache, convert, fetching, metering, remote
from gemma_tui.hub.fetching import Request, fetch
from gemma_tui.hub.headers import look_inside
from gemma_tui.hub.metering import CancelledError, Control
from gemma_tui.hub.models import local_models, resolve

TINY = "org/gemma-3-tiny"
TOKEN = "hf_" + "g" * 34
OTHER = "hf_" + "x" * 34
ASKED = "hf_" + "w" * 34

Events = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BACK_OFF", 0.01)
    monkeypatch.setattr(metering, "TELL_SECONDS", 0.0)
    # The client's own waits between its tries.
    monkeypatch.setattr(time, "sleep", lambda seconds, real=time.sleep: real(min(seconds, 0.05)))


def fetched(events: Events | None = None, control: Control | None = None, **request: Any) -> Path:
    told = [] if events is None else events
    return fetch(
        Request(**{"repo": TINY, **request}),
        lambda kind, **values: told.append({"kind": kind, **values}),
        control or Control(),
    )


def refused(**request: Any) -> str:
    with pytest.raises(EngineError) as caught:
        fetched(**request)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def nothing_is_left(repo: str = TINY) -> None:
    assert not cache.repo_folder(repo).exists()


def test_a_model_comes_whole_is_checked_and_has_its_name(hub: StandInHub) -> None:
    events: Events = []
    folder = fetched(events)
    assert resolve(TINY).folder == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == hub.repos[TINY].files
    plan, last = events[0], events[-1]
    whole = sum(map(len, hub.repos[TINY].files.values()))
    assert (plan["kind"], plan["bytes"], plan["download"], plan["commit"]) == ("plan", whole, whole, COMMIT)
    assert (last["kind"], last["bytes"]) == ("fetched", whole)
    counts = [e["bytes"] for e in events if e["kind"] == "progress"]
    assert counts == sorted(counts)
    assert counts[-1] == whole
    assert any(0 < count < whole for count in counts)
    assert (TINY, "hub cache") in [(item.model.name, item.model.source) for item in local_models() if not item.problem]


def test_what_is_here_does_not_come_again(hub: StandInHub) -> None:
    fetched()
    before = hub.count("GET", "/resolve/")
    events: Events = []
    fetched(events)
    assert events[0]["download"] == 0
    # The config is looked at before anything else.
    assert hub.count("GET", "/resolve/") <= before + 1


def test_what_another_commit_has_is_counted_as_here(hub: StandInHub) -> None:
    fetched()
    hub.repos[TINY].commit = NEXT_COMMIT
    hub.repos[TINY].files["generation_config.json"] = b'{"new": 1}'
    events: Events = []
    fetched(events)
    plan = events[0]
    counts = [e["bytes"] for e in events if e["kind"] == "progress"]
    assert plan["download"] == len(b'{"new": 1}')
    assert counts == sorted(counts)
    assert (counts[0] >= plan["bytes"] - plan["download"], counts[-1]) == (True, plan["bytes"])


def test_one_commit_is_fetched_while_the_branch_moves(hub: StandInHub) -> None:
    hub.faults.moving = True
    folder = fetched()
    commits = {path.split("/resolve/")[1].split("/")[0] for _, path, _ in hub.asked if "/resolve/" in path}
    assert commits == {folder.name}
    assert folder.name in (COMMIT, NEXT_COMMIT)


def test_a_revision_has_a_name_of_its_own(hub: StandInHub) -> None:
    folder = fetched(revision="v1")
    assert resolve(f"{TINY}@v1").folder == resolve(f"{TINY}@{COMMIT[:8]}").folder == folder
    with pytest.raises(EngineError, match=f"gemma-tui models download {TINY}`"):
        resolve(TINY)
    assert "no revision 'v9'" in refused(revision="v9")


# ------------------------------------------------------------------------------------------------ access

TERMS = {
    "no token": (None, "auto", "log in with `hf auth login` or set HF_TOKEN"),
    "a bad token": (OTHER, "auto", "rejects your token"),
    "terms to accept": (TOKEN, "auto", "accept its terms at http"),
    "approval to ask for": (TOKEN, "manual", "wait for its owners' approval"),
    "approval to wait for": (ASKED, "manual", "your request awaits its owners' approval"),
}


@pytest.mark.parametrize("case", TERMS)
def test_a_gated_model_says_what_to_do(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    token, gated, sentence = TERMS[case]
    hub.repos[TINY].gated, hub.repos[TINY].asked = gated, (ASKED,)
    hub.tokens[ASKED] = "walter"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refused()
    assert sentence in said
    assert TINY in said
    assert "hf_" not in said
    nothing_is_left()
    assert hub.served == 0


def test_a_gated_model_comes_with_a_token_that_may_have_it(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[TINY].gated, hub.repos[TINY].allowed = "auto", (TOKEN,)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched().name == COMMIT


def test_a_token_that_may_not_read_gated_models_gives_the_hubs_own_words(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[TINY].gated = "auto"
    hub.faults.message = f"enable gated repositories in {TOKEN}"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = refused()
    assert "enable gated repositories" in said
    assert TOKEN not in said


def test_a_token_that_is_revoked_meanwhile(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[TINY].gated, hub.repos[TINY].allowed = "auto", (OTHER,)
    hub.tokens[OTHER] = "olga"
    monkeypatch.setenv("HF_TOKEN", OTHER)

    def tell(kind: str, **values: Any) -> None:
        hub.tokens.pop(OTHER, None)

    with pytest.raises(EngineError, match="rejects your token"):
        fetch(Request(TINY), tell, Control())
    nothing_is_left()


def test_another_server_that_has_the_files_is_not_given_the_token(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[TINY].gated, hub.repos[TINY].allowed = "auto", (TOKEN,)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as other:
        other.repos[TINY] = Repo(hub.repos[TINY].files)
        hub.faults.elsewhere = other.url
        fetched()
        assert {path.rsplit("/", 1)[1] for _, path, _ in other.asked} == set(hub.repos[TINY].files)
        assert {token for _, _, token in other.asked} == {""}
    assert {token for _, path, token in hub.asked if "/resolve/" in path} == {TOKEN}


def test_a_name_that_is_not_there(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "check the name, or log in" in refused(repo="org/gone")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "org/gone is not on the hub, or not yours to see" in refused(repo="org/gone")


@pytest.mark.parametrize("repo", ["gone", "a/b/c", "../x", "org/-x", "org/a\n", "-o/x", "org/" + "x" * 200, ""])
def test_what_is_no_id_is_refused_before_anything_is_asked(hub: StandInHub, repo: str) -> None:
    refused(repo=repo)
    refused(revision="../main")
    assert not hub.asked


def test_offline_uses_what_is_here_and_asks_nothing(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert fetched() == folder
    assert "HF_HUB_OFFLINE is set" in refused(repo="org/other")
    assert len(hub.asked) == asked


# ------------------------------------------------------------------------------------------------ faults


def cut(hub: StandInHub) -> None:
    # The header's, and the weights'.
    hub.faults.cut, hub.faults.piece = 2, 4096


def reset(hub: StandInHub) -> None:
    cut(hub)
    hub.faults.reset = True


def statuses(part: str, *given: int) -> Callable[[StandInHub], None]:
    return lambda hub: hub.faults.statuses.update({part: list(given)})


PASSING = {
    "a dropped line": cut,
    "a line that is reset": reset,
    "500 at the first question": statuses("/revision/main", 500, 503),
    "429 at the tree": statuses("/tree/", 429),
    "500 at a header": statuses("/model.safetensors", 500),
    "500 at a file": statuses("/model.safetensors", 200, 200, 500),
    "502 at the access check": statuses("/auth-check", 502),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_by_itself_is_tried_again(hub: StandInHub, fault: str) -> None:
    PASSING[fault](hub)
    folder = fetched()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == hub.repos[TINY].files


def test_a_line_that_falls_silent_is_taken_up_where_it_was(hub: StandInHub) -> None:
    # As after a laptop's sleep.
    hub.faults.piece, hub.faults.stall = 4096, 1
    whole = sum(map(len, hub.repos[TINY].files.values()))

    def tell(kind: str, **values: Any) -> None:
        if kind == "progress":
            served.append(hub.served)

    served: list[int] = []
    folder = fetch(Request(TINY), tell, Control())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == hub.repos[TINY].files
    assert hub.faults.stall == 0
    assert hub.served - served[0] <= whole


def test_tries_are_counted_anew_where_files_were_finished(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "DOWNLOAD_TRIES", 2)
    monkeypatch.setattr(fetching, "WORKERS", 1)
    hub.repos[TINY].files |= {f"{i}.json": f"[{i}]".encode() for i in range(4)}
    hub.faults.statuses = {f"GET /{TINY}/resolve/{COMMIT}/{i}.json": [500] for i in range(4)}
    events: Events = []
    fetched(events)
    retries = [e["attempt"] for e in events if e["kind"] == "retry"]
    assert (set(retries), len(retries) > 1) == ({1}, True)
    hub.repos[TINY].commit = NEXT_COMMIT
    hub.repos[TINY].files["5.json"] = b"[5]"
    hub.faults.statuses = {f"GET /{TINY}/resolve/{NEXT_COMMIT}/5.json": [500, 500]}
    assert "500" in refused()


def test_a_wait_is_told_with_its_reason(hub: StandInHub) -> None:
    statuses("/revision/main", 500)(hub)
    events: Events = []
    fetched(events)
    assert [(e["attempt"], "500" in e["reason"]) for e in events if e["kind"] == "retry"] == [(1, True)]


def test_a_hub_that_stays_broken_is_told_in_one_line(hub: StandInHub) -> None:
    statuses("/revision/main", *[500] * 50)(hub)
    assert "500" in refused()
    nothing_is_left()


def test_a_hub_that_is_not_there_is_told_in_one_line(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in refused()


def test_other_content_than_the_checksum_says_is_never_usable(hub: StandInHub) -> None:
    hub.faults.flip = {"model.safetensors"}
    said = refused()
    assert "model.safetensors" in said
    assert "checksum" in said
    assert not list(cache.cache_folder().rglob("*.safetensors"))
    with pytest.raises(EngineError, match="not in the hub cache"):
        resolve(TINY)
    hub.faults.flip = set()
    assert fetched().name == COMMIT


def test_a_file_that_comes_short_is_never_usable(hub: StandInHub) -> None:
    hub.faults.short = {"model.safetensors"}
    refused()
    assert not partial_files(TINY)
    hub.faults.short = set()
    fetched()


def test_a_body_without_an_end_is_stopped(hub: StandInHub) -> None:
    hub.faults.endless = {"model.safetensors"}
    assert "sends more than" in refused()
    assert not partial_files(TINY)


def test_a_disk_without_room_is_told_before_the_first_byte(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(map(len, hub.repos[TINY].files.values()))
    free = convert.RESERVE_BYTES + whole - 1_000_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 0, free))  # type: ignore[attr-defined]
    assert f"has no room for {whole / 1000:.0f} KB and a reserve: free 1.0 GB more, or set HF_HOME" in refused()
    assert hub.count("GET", "/model.safetensors") == 0


def test_a_disk_that_fills_up_meanwhile_is_told_and_keeps_no_part(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(place: object) -> int:
        return 0 if hub.count("GET", "/model.safetensors") > 1 else 10**12  # the header's comes first

    monkeypatch.setattr(fetching, "free_bytes", free)
    monkeypatch.setattr(metering, "free_bytes", free)
    assert "is full" in refused()
    assert not partial_files(TINY)
    assert hub.count("GET", "/model.safetensors") == 2


def test_a_disk_that_takes_no_more_is_told_and_keeps_no_part(hub: StandInHub) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(hub.repos[TINY].files["model.safetensors"]) // 2, hard))
    try:
        assert "is full" in refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not partial_files(TINY)
    assert hub.count("GET", "/model.safetensors") == 2
    assert fetched().name == COMMIT


def test_a_cancel_leaves_no_part_and_the_next_try_is_clean(hub: StandInHub) -> None:
    hub.faults.slow, hub.faults.piece = 0.02, 4096
    control, events = Control(), []

    def tell(kind: str, **values: Any) -> None:
        events.append(kind)
        if events.count("progress") == 3:
            control.stop.set()

    with pytest.raises(CancelledError):
        fetch(Request(TINY), tell, control)
    assert not partial_files(TINY)
    with pytest.raises(EngineError, match="not in the hub cache"):
        resolve(TINY)
    hub.faults.slow = 0
    assert fetched().name == COMMIT


def test_a_pause_lets_nothing_come(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.slow, hub.faults.piece = 0.01, 4096
    control, looks = Control(), threading.Semaphore(0)
    counts: list[int] = []
    folder = cache.repo_folder(TINY) / "snapshots" / COMMIT

    def tell(kind: str, **values: Any) -> None:
        if kind == "progress":
            counts.append(values["bytes"])
            # From here on the weights come alone, so that no other thread has passed the look at the pause.
            if (folder / "config.json").exists() and (folder / "tokenizer.json").exists() and not before:
                before.append(len(counts))
                control.paused.set()

    def sleep(seconds: float, real: Callable[[float], None] = time.sleep) -> None:
        looks.release()
        real(seconds)

    before: list[int] = []
    monkeypatch.setattr(metering, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    thread = threading.Thread(target=lambda: fetch(Request(TINY), tell, control))
    thread.start()
    assert all(looks.acquire(timeout=20) for _ in range(10))
    assert [len(counts)] == before
    assert counts[-1] < sum(map(len, hub.repos[TINY].files.values()))
    control.paused.clear()
    thread.join(20)
    assert resolve(TINY).source == "hub cache"


# ------------------------------------------------------------------------------------------------ hostile repositories

NAMES = {
    "a parent": "../../evil.json",
    "an absolute path": "/etc/evil.json",
    "an escape sequence": "\x1b]0;x\x07.json",
    "a line break": "a\nb.json",
    "an option": "-rf.json",
    "hidden": ".evil.json",
    "a pattern": "[a].json",
    "too long": "x" * 300 + ".json",
    "an empty part": "a//evil.safetensors",
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_that_no_model_has_refuses_the_whole(hub: StandInHub, kind: str) -> None:
    hub.repos[TINY].files[NAMES[kind]] = b"{}"
    said = refused(include=("*evil*",))
    assert "names a file" in said
    nothing_is_left()
    assert not list(cache.cache_folder().parent.rglob("*evil*"))


ABOUT = {
    "no JSON": "{",
    "HTML": "<html>",
    "nothing": "",
    "a list": "[]",
    "null": "null",
    "no commit": {"sha": None},
    "another commit": {"sha": "../../x"},
    "files that are numbers": {"siblings": [7]},
    "a name that is a number": {"siblings": [{"rfilename": 7}]},
    "no names": {"siblings": [{}]},
    "no files": {"siblings": None},
    "sizes that are text": {"siblings": [{"rfilename": "model.safetensors", "size": "x" * 100, "blobId": 7}]},
    "half a large file": {"siblings": [{"rfilename": "model.safetensors", "lfs": {}}]},
    "an escape sequence": {"siblings": [{"rfilename": "\x1b[2J.safetensors"}]},
    "nested lists": "[" * 100_000,
}


@pytest.mark.parametrize("kind", ABOUT)
def test_an_answer_that_makes_no_sense_is_one_line(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    given = ABOUT[kind]
    right = {"id": TINY, "sha": COMMIT, "siblings": [], "tags": []}
    answer = given if isinstance(given, str) else json.dumps(right | given)
    monkeypatch.setattr(stand_in_hub, "_about", lambda hub, it, name, rest: it.send(200, answer.encode()))
    refused()
    assert hub.count("GET", "/model.safetensors") == 0
    nothing_is_left()


def test_ten_thousand_files_are_refused(hub: StandInHub) -> None:
    hub.repos[TINY].files |= {f"{i}.json": b"" for i in range(10_000)}
    assert "names 10,0" in refused()
    assert hub.count("GET", "/resolve/") == 0


def test_ten_thousand_files_that_are_not_wanted_stay(hub: StandInHub) -> None:
    names = set(hub.repos[TINY].files)
    hub.repos[TINY].files |= {f"logs/{i}.json": b"" for i in range(10_000)}
    assert {p.name for p in fetched().rglob("*")} == names


def test_a_file_that_plain_http_does_not_give_is_refused(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LARGEST_FILE", 1 << 16)
    said = refused()
    assert "model.safetensors of 0 GB comes over Xet alone" in said
    assert f"`hf download {TINY}`" in said


def config(**values: Any) -> Callable[[Repo], None]:
    def change(repo: Repo) -> None:
        repo.files["config.json"] = json.dumps({**json.loads(repo.files["config.json"]), **values}).encode()

    return change


def config_text(text: bytes) -> Callable[[Repo], None]:
    return lambda repo: repo.files.update({"config.json": text})


def only_pickles(repo: Repo) -> None:
    repo.files["pytorch_model.bin"] = repo.files.pop("model.safetensors")


def only_gguf(repo: Repo) -> None:
    repo.files["tiny-Q4_K_M.gguf"] = repo.files.pop("model.safetensors")


REFUSED = {
    "code": (config(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "a file of code": (config(model_file="x.py"), "model_file"),
    "another architecture": (config(model_type="llama"), "'llama' is not Gemma-3"),
    "a path for a type": (config(model_type="../../x"), "is not Gemma-3"),
    "nested lists": (config_text(b"[" * 100_000), "is no model config"),
    "5,000 digits": (config_text(b'{"model_type": ' + b"9" * 5000 + b"}"), "is no model config"),
    "a list": (config_text(b"[]"), "no JSON object"),
    "a large config": (config_text(b" " * (1 << 20) + b"{}"), "over the limit"),
    "pickles alone": (only_pickles, "pytorch_model.bin, which could run code"),
    "GGUF alone": (only_gguf, "--include: tiny-Q4_K_M.gguf"),
    "no weights": (lambda repo: repo.files.pop("model.safetensors"), "no .safetensors"),
    "no config": (lambda repo: repo.files.pop("config.json"), "no config.json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_computed_is_refused_before_it_comes(hub: StandInHub, kind: str) -> None:
    change, reason = REFUSED[kind]
    change(hub.repos[TINY])
    assert reason in refused()
    assert hub.count("GET", "/model.safetensors") == 0
    nothing_is_left()


def test_code_and_pickles_stay_on_the_hub(hub: StandInHub) -> None:
    names = set(hub.repos[TINY].files)
    hub.repos[TINY].files |= dict.fromkeys(("modeling.py", "model.bin", ".gitattributes", "onnx/config.json"), b"x")
    events: Events = []
    folder = fetched(events)
    assert {p.name for p in folder.rglob("*")} == names
    assert events[0]["left_out"] == 2


def resave(repo: Repo, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    arrays = reference.load(repo.files["model.safetensors"])
    change(arrays)
    repo.files["model.safetensors"] = reference.save(arrays)


def double(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float64)


def pack(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.norm.weight"] = arrays["model.norm.weight"].view(np.uint32)


MEGABYTES = 4 << 20
WEIGHTS = {
    "a tail": (
        lambda repo: repo.files.update({"model.safetensors": repo.files["model.safetensors"] + b"\0" * MEGABYTES}),
        "it is cut or has a tail",
    ),
    "a header without an end": (
        lambda repo: repo.files.update({"model.safetensors": struct.pack("<Q", MEGABYTES) + b"{" * MEGABYTES}),
        "not valid JSON",
    ),
    "a header over the limit": (
        lambda repo: repo.files.update({"model.safetensors": struct.pack("<Q", 26 << 20) + b"{" * (27 << 20)}),
        "over the limit",
    ),
    "a parameter less": (lambda repo: resave(repo, lambda a: a.pop("model.norm.weight")), "lacks model.norm.weight"),
    "another shape": (config(hidden_size=64), "its config.json says"),
    "float64": (lambda repo: resave(repo, double), "is F64"),
    "packed weights that are not told": (lambda repo: resave(repo, pack), "is packed"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_no_engine_may_map_are_refused_by_their_headers(hub: StandInHub, kind: str) -> None:
    change, reason = WEIGHTS[kind]
    change(hub.repos[TINY])
    said = refused()
    assert (reason in said, "check the network" in said) == (True, False), said
    assert hub.count("GET", "/model.safetensors") == 1
    nothing_is_left()


def test_another_form_of_the_model_beside_it_is_no_part_of_it(hub: StandInHub) -> None:
    arrays = reference.load(hub.repos[TINY].files["model.safetensors"])
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    hub.repos[TINY].files["wide.safetensors"] = reference.save(wide)
    assert look_inside(TINY).dtypes == {"F32": sum(array.size for array in arrays.values())}


def test_a_header_of_a_server_that_knows_no_ranges_comes_alone(hub: StandInHub) -> None:
    # Behind the header are megabytes, each piece of which takes a second.
    resave(hub.repos[TINY], lambda arrays: arrays.update(more=np.zeros(MEGABYTES, np.float32)))
    hub.faults.no_ranges, hub.faults.piece, hub.faults.slow = True, 1 << 16, 1.0
    found = look_inside(TINY)
    assert found.config is not None
    assert found.dtypes == {"F32": MEGABYTES + found.config.parameter_count()}
    assert hub.served < 1 << 20


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(repo: Repo) -> None:
    """The one file as two shards with an index."""
    arrays = reference.load(repo.files.pop("model.safetensors"))
    names = sorted(arrays)
    for part, file in enumerate(SHARDS):
        repo.files[file] = reference.save({name: arrays[name] for name in names[part::2]})
    index(repo, {name: SHARDS[i % 2] for i, name in enumerate(names)})


def index(repo: Repo, places: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": places})
    repo.files["model.safetensors.index.json"] = text.encode()


def points_elsewhere(repo: Repo) -> None:
    index(repo, {"model.norm.weight": "../../x.safetensors"})


def lacks_a_shard(repo: Repo) -> None:
    shard(repo)
    del repo.files[SHARDS[1]]


def names_too_much(repo: Repo) -> None:
    shard(repo)
    index(repo, {**json.loads(repo.files["model.safetensors.index.json"])["weight_map"], "more": SHARDS[0]})


def names_too_little(repo: Repo) -> None:
    # The shard that is not named holds what the config asks for, and is not read.
    shard(repo)
    places = json.loads(repo.files["model.safetensors.index.json"])["weight_map"]
    index(repo, {name: file for name, file in places.items() if file == SHARDS[0]})


def has_another_name(repo: Repo) -> None:
    repo.files["consolidated.safetensors"] = repo.files.pop("model.safetensors")


UNREADABLE = {
    "an index that points elsewhere": (points_elsewhere, "'../../x.safetensors', which is no shard"),
    "a shard less": (lacks_a_shard, f"has no {SHARDS[1]}"),
    "an index that promises too much": (names_too_much, "names 'more', which no shard holds"),
    "an index that names one shard": (names_too_little, "lacks model."),
    "weights of another name": (has_another_name, "has no model.safetensors"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_weights_that_could_not_be_read_are_refused_before_they_come(hub: StandInHub, kind: str) -> None:
    change, reason = UNREADABLE[kind]
    change(hub.repos[TINY])
    assert reason in refused()
    asked = Counter(path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors"))
    assert set(asked.values()) <= {1}  # the headers alone
    nothing_is_left()


def test_shards_are_read_as_their_index_says(hub: StandInHub) -> None:
    shard(hub.repos[TINY])
    has_more = {"model.norm.weight": np.zeros(3, np.float64)}
    hub.repos[TINY].files["consolidated.safetensors"] = reference.save(has_more)
    found = look_inside(TINY)
    assert found.config is not None
    assert found.dtypes == {"F32": found.config.parameter_count()}
    fetched()
    assert [item.problem for item in local_models() if item.model.name == TINY] == [""]


def test_a_gguf_comes_if_it_is_named(hub: StandInHub) -> None:
    hub.repos["org/quants"] = Repo({"tiny-Q4_K_M.gguf": b"GGUF4", "tiny-Q8_0.gguf": b"GGUF8", "README.md": b""})
    folder = fetched(repo="org/quants", include=("*Q4_K_M.gguf",))
    assert {p.name for p in folder.iterdir()} == {"tiny-Q4_K_M.gguf", "README.md"}
