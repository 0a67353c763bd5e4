"""Checkpoints of a run: whole or not there, whatever happens to the writer, the disk or the files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engines.checkpoints import replacing
from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs import checkpoints
from gemma_tui.runs.checkpoints import latest, sweep, write

CRASHING = Path(__file__).with_name("crashing.py")


def fill(partial: Path) -> None:
    (partial / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (partial / "more").mkdir()
    (partial / "more" / "place.json").write_text("{}")


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(folder.glob("step-*"))]


def crashed(how: str, home: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(CRASHING), how, str(home)], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        write(folder, step, fill, {"step": step})
    return folder


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    state = {"cursor": 7, "rate": 0.1 + 0.2, "order": [3, 1], "name": "é"}
    path = write(tmp_path / "run" / "checkpoints", 1234, fill, state)
    found = latest(path.parent)
    assert found.checkpoint is not None
    assert (found.checkpoint.path, found.checkpoint.step, found.checkpoint.state) == (path, 1234, state)
    assert path.name == "step-00001234"
    assert (path / "weights.bin").read_bytes() == bytes(range(256)) * 8
    assert (path / "more" / "place.json").read_text() == "{}"
    assert found.problems == ()
    assert (path.parent / "LATEST").read_text() == "step-00001234\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["LATEST", "step-00001234"]


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") == latest(tmp_path) == checkpoints.Found(None, ())
    assert sweep(tmp_path / "none") == 0


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 6):
        write(tmp_path, step, fill, {}, keep=keep)
    assert steps(tmp_path) == left


def test_damaged_ones_do_not_count_among_those_kept(two: Path) -> None:
    (two / "step-00000002" / "weights.bin").unlink()
    write(two, 3, fill, {})
    assert steps(two) == [1, 3]


def test_a_later_checkpoint_is_not_removed_by_an_earlier_one(two: Path) -> None:
    write(two, 9, fill, {}, keep=9)
    write(two, 3, fill, {})
    assert steps(two) == [2, 3, 9]


def test_a_whole_checkpoint_of_the_same_step_is_kept(two: Path) -> None:
    write(two, 2, lambda partial: pytest.fail("was written again"), {"step": "other"})
    found = latest(two).checkpoint
    assert found is not None
    assert found.state == {"step": 2}


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(two: Path) -> None:
    (two / "step-00000002" / "weights.bin").write_bytes(b"short")
    write(two, 2, fill, {"step": "new"})
    found = latest(two).checkpoint
    assert found is not None
    assert found.state == {"step": "new"}
    assert steps(two) == [1, 2]


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(two: Path) -> None:
    (two / "step-00000003").write_text("no folder")
    assert latest(two).problems == ("step-00000003 is no folder",)
    write(two, 3, fill, {})
    assert latest(two).problems == ()


class Damage(NamedTuple):
    does: Callable[[Path], object]
    says: str


def flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 4
    path.write_bytes(blob)


DAMAGES = {
    "flipped": Damage(lambda p: flip(p / "weights.bin"), "weights.bin has changed since it was written"),
    "flipped deep": Damage(lambda p: flip(p / "more" / "place.json"), "more/place.json has changed since"),
    "cut": Damage(lambda p: os.truncate(p / "weights.bin", 2047), "weights.bin has 2,047 bytes of 2,048"),
    "emptied": Damage(lambda p: os.truncate(p / "state.json", 0), "state.json has 0 bytes of "),
    "grown": Damage(lambda p: os.truncate(p / "weights.bin", 2049), "weights.bin has 2,049 bytes of 2,048"),
    "missing": Damage(lambda p: (p / "weights.bin").unlink(), "weights.bin is missing"),
    "a folder": Damage(lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir()), "state.json is missing"),
    "a pipe": Damage(lambda p: ((p / "state.json").unlink(), os.mkfifo(p / "state.json")), "state.json is missing"),
    "no manifest": Damage(lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": Damage(lambda p: os.truncate(p / "manifest.json", 40), "manifest.json is garbled"),
    "empty manifest": Damage(lambda p: os.truncate(p / "manifest.json", 0), "manifest.json is garbled"),
    "null manifest": Damage(lambda p: (p / "manifest.json").write_text("null"), "manifest.json is garbled"),
    "deep manifest": Damage(lambda p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json is garbled"),
    "binary manifest": Damage(lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json is garbled"),
    "another's": Damage(
        lambda p: (shutil.rmtree(p), shutil.copytree(p.with_name("step-00000001"), p)), "manifest.json is garbled"
    ),
    "all gone": Damage(lambda p: [f.unlink() for f in p.iterdir() if f.is_file()], "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(two: Path, damage: Damage) -> None:
    damage.does(two / "step-00000002")
    found = latest(two)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.checkpoint.state) == (1, {"step": 1})
    assert len(found.problems) == 1
    assert found.problems[0].startswith("step-00000002: " + damage.says)
    write(two, 2, fill, {"step": 2})
    assert latest(two).problems == ()


def test_every_bit_of_a_checkpoint_counts(two: Path) -> None:
    files = [p for p in (two / "step-00000002").rglob("*") if p.is_file()]
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        for place in range(0, len(whole), 1 if path.name == "manifest.json" else 97):
            for bit in range(8):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                assert checkpoints.damage(path.parents[len(path.relative_to(two).parts) - 2]) is not None, (path, place)
        path.write_bytes(whole)
    assert latest(two).problems == ()


def test_files_that_others_add_do_no_harm(two: Path) -> None:
    (two / "step-00000002" / ".DS_Store").write_text("")
    (two / "step-2").mkdir()
    (two / "step-x").write_text("")
    found = latest(two)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.problems) == (2, ())


@pytest.mark.parametrize("pointer", ["step-00000099\n", "", "../../etc", None])
def test_the_pointer_is_not_needed(two: Path, pointer: str | None) -> None:
    (two / "LATEST").unlink()
    if pointer is not None:
        (two / "LATEST").write_text(pointer)
    found = latest(two).checkpoint
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("name", ["/etc/passwd", "../step-00000001/weights.bin", "\x1b[2J\n", "a\0b", "\ud800"])
def test_a_manifest_that_lies_is_seen_through(two: Path, name: str) -> None:
    path = two / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 2048, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    found = latest(two)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert found.problems[0].isprintable()


def test_a_folder_that_is_a_file_is_said_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints"
    file.write_text("")
    with pytest.raises(GemmaTuiError, match="cannot be listed"):
        latest(file)
    with pytest.raises(GemmaTuiError, match=r"step 1 cannot be written \(File exists\)"):
        write(file, 1, fill, {})


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    def private(partial: Path) -> None:
        fill(partial)
        (partial / "weights.bin").chmod(0o600)

    old = os.umask(0o027)
    try:
        path = write(tmp_path, 1, private, {})
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*") if p.is_file()} == {0o640}


def test_all_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    write(tmp_path, 1, fill, {})
    monkeypatch.setattr(checkpoints, "sync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    rename, replace = Path.rename, Path.replace

    def renamed(path: Path, target: Path) -> Path:
        if target.name == "step-00000002":
            assert {p.stat().st_ino for p in (path, *path.rglob("*"))} <= set(done)
            assert done[-1] == path.stat().st_ino
            done.append("renamed")
        return rename(path, target)

    def replaced(path: Path, target: Path) -> Path:
        assert done[-3:] == ["renamed", tmp_path.stat().st_ino, path.stat().st_ino]
        done.append("pointed")
        return replace(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    write(tmp_path, 2, fill, {})
    assert done[-2:] == ["pointed", tmp_path.stat().st_ino]


def test_a_checkpoint_that_cannot_be_read_back_removes_nothing(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def spoiling(path: Path, target: Path) -> Path:
        if target.name == "step-00000003":
            flip(path / "weights.bin")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", spoiling)
    with pytest.raises(GemmaTuiError, match=r"weights\.bin has changed since it was written, though just written"):
        write(two, 3, fill, {}, keep=1)
    assert steps(two) == [1, 2, 3]
    assert (two / "LATEST").read_text() == "step-00000002\n"
    found = latest(two).checkpoint
    assert found is not None
    assert found.step == 2


def test_killed_before_any_call_it_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    rows = crashed("kill", tmp_path)
    assert len(rows) > 30
    assert [row["code"] for row in rows] == [-9] * (len(rows) - 1) + [4]
    found = [row["step"] for row in rows]
    assert found == sorted(found)
    assert set(found) == {2, 3}
    for row in rows:
        assert row["right"]
        assert row["problems"] == []
        assert len(row["whole"]) >= 2
        assert row["after"] == {
            "step": 4, "right": True, "problems": [], "whole": [row["step"], 4], "partial": [],
        }  # fmt: skip


def test_full_at_any_call_it_says_so_and_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    rows = crashed("full", tmp_path)
    assert {row["code"] for row in rows[:-1]} == {0, 3}
    assert sum(row["code"] == 3 for row in rows) > 20
    for row in rows:
        assert row["right"]
        assert row["problems"] == []
        assert row["step"] == 3 or row["code"] == 3, row
        assert len(row["whole"]) >= 2
        assert row["after"]["step"] == 4
        assert row["after"]["partial"] == []


def test_killed_at_any_moment_nothing_that_was_told_is_lost(tmp_path: Path) -> None:
    rows = crashed("anytime", tmp_path)
    assert rows[-1]["step"] > 25
    for row in rows:
        assert row["step"] is None or row["right"]
        assert (row["step"] or 0) >= row["told"]
        assert row["problems"] == []
        assert row["swept"] == len(row["partial"])


def test_only_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    mine = (f".tmp-1-{os.getpid()}", f".tmp-1-{os.getppid()}", "step-00000001", ".tmp-nonsense")
    left = (f".tmp-1-{gone.pid}", f".tmp-step-00000001-{gone.pid}", f".tmp-LATEST-{gone.pid}")
    for name in (*mine, *left[:2]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / left[2]).write_text("")
    assert sweep(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(mine)


def test_a_pid_that_is_used_again_is_not_the_writers(tmp_path: Path) -> None:
    old = tmp_path / f".tmp-1-{os.getpid()}"
    old.mkdir()
    os.utime(old, (1e9, 1e9))
    assert sweep(tmp_path) == 1


def full(partial: Path) -> None:
    fill(partial)
    raise OSError(errno.ENOSPC, "No space left on device")


def full_below_an_engine(partial: Path) -> None:
    fill(partial)
    with replacing(partial / "parameters.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("filling", [full, full_below_an_engine])
def test_a_full_disk_costs_the_ballast_and_nothing_else(two: Path, filling: Callable[[Path], None]) -> None:
    assert checkpoints.hold_ballast(two)
    assert (two / ".ballast").stat().st_blocks * 512 >= 8 << 20
    before = {p: p.read_bytes() for p in two.glob("step-*/*.*")}
    with pytest.raises(GemmaTuiError, match=r"step 3 needs more than 0\.0 MB and [\d,.]+ MB are free: free some space"):
        write(two, 3, filling, {})
    assert {p: p.read_bytes() for p in two.glob("step-*/*.*")} == before
    assert sorted(p.name for p in two.iterdir()) == ["LATEST", "step-00000001", "step-00000002"]


def test_too_little_space_is_seen_before_anything_is_written(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, count))

    needed = 1_000_000_000
    wanted = int(1.1 * needed) + (64 << 20)
    free(wanted - 1)
    with pytest.raises(GemmaTuiError, match=r"needs more than 1,167\.1 MB and 1,167\.1 MB are free"):
        write(two, 3, lambda partial: pytest.fail("was written"), {}, needed=needed)
    free(wanted)
    write(two, 3, fill, {}, needed=needed)
    assert steps(two) == [2, 3]


def test_what_an_engine_refuses_passes_through(two: Path) -> None:
    def refuse(partial: Path) -> None:
        raise EngineError("the model is gone")

    with pytest.raises(EngineError, match="the model is gone"):
        write(two, 3, refuse, {})
    assert sorted(p.name for p in two.iterdir()) == ["LATEST", "step-00000001", "step-00000002"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        folder = disk / "checkpoints"
        assert checkpoints.hold_ballast(folder)
        write(folder, 1, fill, {})
        with pytest.raises(GemmaTuiError, match=r"needs more than [34]\.\d MB and [34]\.\d MB are free"):
            write(folder, 2, lambda partial: (partial / "big").write_bytes(bytes(20 << 20)), {})
        found = latest(folder)
        assert found.checkpoint is not None
        assert (found.checkpoint.step, found.problems) == (1, ())
        assert shutil.disk_usage(disk).free > 8 << 20
        (folder / "rest").write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 20)))
        assert not checkpoints.hold_ballast(folder)
        assert not (folder / ".ballast").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
