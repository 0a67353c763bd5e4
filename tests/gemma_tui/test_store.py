from __future__ import annotations

import json
import math
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.runs.store import Run, RunStore

REGISTER = """
from gemma_tui.runs.store import RunStore
store = RunStore()
run = store.create("child", "training", "torch", {"model": "m"}, "gemma-tui train", 10_000)
print(run.run_id, flush=True)
"""
WRITE_FOREVER = """
for step in range(1, 10_000):
    store.record(run.run_id, "step", step, {"loss": step / 2})
    print(step, flush=True)
"""


NUMBERS = st.floats() | st.integers(-(2**60), 2**60)


def created(store: RunStore, name: str = "lora", **facts: object) -> Run:
    return store.create(name, "training", "torch", {"model": "m", **facts}, "gemma-tui train", 10)


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_run_comes_back_as_it_was_registered(store: RunStore) -> None:
    run = created(store, nested=[1, "é"])
    assert store.run(run.run_id) == run
    assert (run.run_id, run.state, run.step, run.steps, run.error, run.request) == ("lora-1", "running", 0, 10, "", "")
    assert run.plan == {"model": "m", "nested": [1, "é"]}
    assert run.active
    assert run.folder == paths.runs() / "lora-1"
    assert run.folder.is_dir()


def test_runs_are_numbered_by_name_and_listed_newest_first(store: RunStore) -> None:
    names = [created(store, name).run_id for name in ("lora", "lora", "full", "lora", "lora-1")]
    assert names == ["lora-1", "lora-2", "full-1", "lora-3", "lora-1-1"]
    assert [run.run_id for run in store.runs()] == names[::-1]
    assert [run.run_id for run in store.runs(limit=2)] == names[:2:-1]


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "-x", ".hidden", "a b", "a\x1b[2J", "\ud800", "x" * 200])
def test_a_name_that_is_no_folder_of_its_own_is_refused(store: RunStore, name: str) -> None:
    with pytest.raises(UsageError, match="is no run name"):
        created(store, name)
    assert store.runs() == []


def test_rows_come_back_in_order_and_from_where_the_last_read_ended(store: RunStore) -> None:
    run, other = created(store), created(store)
    for step in range(1, 6):
        store.record(run.run_id, "step", step, {"loss": 1 / step})
        store.record(other.run_id, "step", step, {"loss": 9.0})
        store.record(run.run_id, "warning", step, {"text": f"w{step}"})
    first = store.metrics(run.run_id, limit=2)
    assert [(row.step, row.values) for row in first] == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    rest = store.metrics(run.run_id, after=first[-1].cursor)
    assert [row.step for row in rest] == [3, 4, 5]
    assert store.metrics(run.run_id, after=rest[-1].cursor) == []
    events = store.events(run.run_id, limit=3)
    assert [e.values["text"] for e in events + store.events(run.run_id, events[-1].cursor)] == [
        f"w{n}" for n in range(1, 6)
    ]


def test_an_evaluation_is_told_from_a_step(store: RunStore) -> None:
    run = created(store)
    store.record(run.run_id, "step", 1, {"loss": 2.0})
    store.record(run.run_id, "evaluation", 1, {"valid_loss": 3.0})
    assert [(row.kind, row.values) for row in store.metrics(run.run_id)] == [
        ("step", {"loss": 2.0}),
        ("evaluation", {"valid_loss": 3.0}),
    ]


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=5), NUMBERS | st.text(max_size=5), max_size=4))
def test_finite_values_come_back_exactly_and_others_as_none(values: dict[str, object]) -> None:
    store = RunStore()
    run = created(store)
    store.record(run.run_id, "step", 1, values)
    expected = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    assert store.metrics(run.run_id)[0].values == expected
    store.close()


def test_the_step_of_a_run_is_its_last_and_never_goes_back(store: RunStore) -> None:
    run = created(store)
    for step in (1, 2, 5, 3):
        store.record(run.run_id, "step", step, {})
    assert store.run(run.run_id).step == 5


def test_states_follow_one_another_and_keep_the_error(store: RunStore) -> None:
    run = created(store)
    seen = []
    for state in ("paused", "running", "stopped"):
        store.set_state(run.run_id, state)
        seen.append((store.run(run.run_id).state, store.run(run.run_id).active))
    assert seen == [("paused", True), ("running", True), ("stopped", False)]
    store.set_state(run.run_id, "failed", "no such file")
    assert (store.run(run.run_id).state, store.run(run.run_id).error) == ("failed", "no such file")


def test_a_request_is_seen_by_another_connection(store: RunStore) -> None:
    run = created(store)
    other = RunStore()
    other.request(run.run_id, "stop")
    other.close()
    assert store.run(run.run_id).request == "stop"


def test_a_run_whose_process_is_gone_is_lost(store: RunStore) -> None:
    run_id = subprocess.run([sys.executable, "-c", REGISTER], capture_output=True, text=True, check=True).stdout.strip()
    assert store.run(run_id).state == "lost"
    assert not store.run(run_id).active


def test_a_run_that_ended_is_not_lost_when_its_process_is_gone(store: RunStore) -> None:
    code = REGISTER + "store.set_state(run.run_id, 'done')"
    run_id = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert store.run(run_id).state == "done"


@pytest.mark.parametrize("whose", [os.getpid, os.getppid])
def test_a_run_is_lost_when_another_process_has_its_pid(store: RunStore, whose: Callable[[], int]) -> None:
    run, pid = created(store), whose()
    before = psutil.Process(pid).create_time() - 3600
    with sqlite3.connect(paths.runs() / "gemma-tui.db") as db:
        db.execute("UPDATE gt_runs SET pid = ?, pid_started = ?", (pid, before))
    db.close()
    assert store.run(run.run_id).state == "lost"


def test_a_killed_process_is_gone_even_before_its_parent_looks(store: RunStore) -> None:
    with python(REGISTER + "input()") as child:
        assert child.stdout is not None
        run_id = child.stdout.readline().strip()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert store.run(run_id).state == "lost"


def test_killing_a_writer_loses_no_row_it_finished(store: RunStore) -> None:
    with python(REGISTER + WRITE_FOREVER) as child:
        assert child.stdout is not None
        run_id = child.stdout.readline().strip()
        for _ in range(25):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        told = 25 + len(child.stdout.read().splitlines())
    steps = [row.step for row in store.metrics(run_id)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told - 1 >= 24
    assert store.run(run_id).state == "lost"
    assert store.check() == "ok"


def test_processes_that_open_and_write_at_once_lose_nothing(store: RunStore) -> None:
    code = REGISTER + WRITE_FOREVER.replace("10_000", "41")
    children = [python(code) for _ in range(3)]
    ids = [child.communicate()[0].splitlines()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sorted(ids) == ["child-1", "child-2", "child-3"]
    for run_id in ids:
        assert [row.step for row in store.metrics(run_id)] == list(range(1, 41))


def test_a_new_store_can_be_opened_by_several_processes_at_once() -> None:
    children = [python(REGISTER) for _ in range(3)]
    assert sorted(child.communicate()[0].strip() for child in children) == ["child-1", "child-2", "child-3"]


def test_a_run_is_found_by_the_beginning_of_its_name(store: RunStore) -> None:
    created(store, "alpha")
    created(store, "alpine")
    assert store.run("alpha").run_id == "alpha-1"
    assert store.run("alpi").run_id == "alpine-1"
    with pytest.raises(GemmaTuiError, match="'alp' fits 2 runs: give more"):
        store.run("alp")


def test_a_whole_name_wins_over_longer_ones(store: RunStore) -> None:
    created(store, "a")
    for _ in range(10):
        created(store, "a-1")
    assert store.run("a-1").run_id == "a-1"


@pytest.mark.parametrize("pattern", ["%", "_", "r_n", "run%", "\\", "'; DROP TABLE gt_runs; --", "\udcff", ""])
def test_a_pattern_is_not_a_name(store: RunStore, pattern: str) -> None:
    created(store, "run")
    created(store, "run")
    with pytest.raises(GemmaTuiError):
        store.run(pattern)
    assert len(store.runs()) == 2


def test_an_underscore_is_found_as_itself(store: RunStore) -> None:
    created(store, "my_run")
    created(store, "myxrun")
    assert store.run("my_").run_id == "my_run-1"


def test_the_tables_have_trackios_layout(store: RunStore) -> None:
    run = created(store)
    store.record(run.run_id, "step", 3, {"loss": math.nan, "rate": 0.5})
    db = sqlite3.connect(paths.runs() / "gemma-tui.db")
    columns = {t: [c[1] for c in db.execute(f"PRAGMA table_info({t})")] for t in ("metrics", "configs")}
    assert columns["metrics"] == ["id", "run_id", "timestamp", "run_name", "step", "metrics"]
    assert columns["configs"] == ["id", "run_id", "run_name", "config", "created_at"]
    run_id, time, name, step, metrics = db.execute(
        "SELECT run_id, timestamp, run_name, step, metrics FROM metrics"
    ).fetchone()
    assert (run_id, name, step) == ("lora-1", "lora-1", 3)
    assert json.loads(metrics, parse_constant=pytest.fail) == {"loss": None, "rate": 0.5}
    assert datetime.fromisoformat(time).utcoffset() == timedelta(0)
    assert abs(datetime.fromisoformat(time) - datetime.now(UTC)) < timedelta(minutes=1)
    assert json.loads(db.execute("SELECT config FROM configs").fetchone()[0]) == {"model": "m"}
    ours = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
    assert {name for name in ours if not name.startswith("gt_")} == {"metrics", "configs"}
    assert db.execute("PRAGMA user_version").fetchone() == (0,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_columns_that_trackio_adds_do_no_harm(store: RunStore) -> None:
    with sqlite3.connect(paths.runs() / "gemma-tui.db") as db:
        for table in ("metrics", "configs"):
            db.execute(f"ALTER TABLE {table} ADD COLUMN log_id TEXT")
    db.close()
    run = created(store)
    store.record(run.run_id, "step", 1, {"loss": 1.0})
    assert store.metrics(run.run_id)[0].values == {"loss": 1.0}


FILL = """
import resource, sys
from gemma_tui.errors import GemmaTuiError
store.record(run.run_id, "step", 1, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
told = []
for step in range(2, 400):
    try:
        store.record(run.run_id, "step", step, {"text": "x" * 2000})
    except GemmaTuiError as error:
        told.append(str(error))
        if len(told) == 3:
            break
    else:
        last = step
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.record(run.run_id, "step", 1000, {"loss": 2.0})
print(last, *told, sep="\\n")
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY, reason="files are bounded")
def test_when_the_disk_is_full_each_write_says_so_and_the_next_may_succeed(store: RunStore) -> None:
    code = REGISTER + FILL
    run_id, last, *told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(told) == 3
    assert all("gemma-tui.db: disk I/O error" in line or "is full" in line for line in told)
    assert [row.step for row in store.metrics(run_id)] == [*range(1, int(last) + 1), 1000]
    assert store.check() == "ok"


def test_a_database_that_may_not_grow_says_that_it_is_full(store: RunStore) -> None:
    run = created(store)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(2):
        with pytest.raises(GemmaTuiError, match="database or disk is full; free some space"):
            store.record(run.run_id, "step", 1, {"text": "x" * 10_000})
    assert store.metrics(run.run_id) == []


@pytest.mark.parametrize("content", [b"this is no database" * 300, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_one_line_and_stays_as_it_is(content: bytes) -> None:
    paths.runs().mkdir(parents=True)
    path = paths.runs() / "gemma-tui.db"
    path.write_bytes(content)
    with pytest.raises(GemmaTuiError, match=r"gemma-tui\.db: .*move the file away if it is damaged") as refused:
        RunStore()
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made_is_one_line(home: Path) -> None:
    home.write_text("a file in its place")
    with pytest.raises(GemmaTuiError, match=r"cannot be made .*set GEMMA_TUI_HOME"):
        RunStore()
