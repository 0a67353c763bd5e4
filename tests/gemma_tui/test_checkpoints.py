"""Checkpoints are whole or not there, whatever happens while one is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs import checkpoints

WRITER = """
import os, sys
from pathlib import Path
from gemma_tui.runs import checkpoints
folder, point = Path(sys.argv[1]), int(sys.argv[2])
fill = lambda to: [(to / name).write_bytes(bytes([step]) * 1000) for name in ("a.bin", "b.bin")]
for step in (1, 2):
    checkpoints.write(folder, step, fill, {"step": step})
step, count = 3, 0
def watched(original):
    def call(*arguments, **named):
        global count
        count += 1
        if count == point:
            os._exit(9)
        return original(*arguments, **named)
    return call
checkpoints._flush = watched(checkpoints._flush)
checkpoints._digest = watched(checkpoints._digest)
Path.rename = watched(Path.rename)
Path.mkdir = watched(Path.mkdir)
Path.write_text = watched(Path.write_text)
checkpoints.shutil.rmtree = watched(checkpoints.shutil.rmtree)
checkpoints.write(folder, step, fill, {"step": step})
print(count)
"""


def fill(value: int) -> object:
    """A writer of two files."""

    def write(folder: Path) -> None:
        for name in ("a.bin", "b.bin"):
            (folder / name).write_bytes(bytes([value]) * 1000)

    return write


def two(folder: Path) -> Path:
    """Checkpoints of the steps 1 and 2; the newer one's folder."""
    checkpoints.write(folder, 1, fill(1), {"step": 1})
    return checkpoints.write(folder, 2, fill(2), {"step": 2}).folder


def run_writer(folder: Path, point: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(folder), str(point)], capture_output=True, text=True, check=False
    )


def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    whole = run_writer(tmp_path / "whole", -1)
    points = int(whole.stdout)
    assert points >= 12
    for point in range(1, points + 1):
        folder = tmp_path / str(point)
        assert run_writer(folder, point).returncode == 9
        found = checkpoints.latest(folder)
        assert found.checkpoint is not None
        assert found.problems == ()
        step = found.checkpoint.step
        assert step in (2, 3)
        assert (found.checkpoint.folder / "a.bin").read_bytes() == bytes([step]) * 1000
        checkpoints.write(folder, 3, fill(3), {"step": 3})
        assert checkpoints.latest(folder).checkpoint.step == 3  # type: ignore[union-attr]
        assert not list(folder.glob(".tmp-*"))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoints.write(tmp_path, step, fill(step), {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("name", ["a.bin", "b.bin", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "folder"])
def test_a_damaged_newest_falls_back_and_is_named(tmp_path: Path, name: str, how: str) -> None:
    path = two(tmp_path) / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[:-3])
    elif how == "flipped":
        content[0] ^= 1
        path.write_bytes(content)
    elif how == "folder":
        path.mkdir()
    found = checkpoints.latest(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert len(found.problems) == 1
    assert name in found.problems[0]
    assert "\n" not in found.problems[0]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "none") == checkpoints.Found(None, ())


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    folder = two(tmp_path)
    (tmp_path / "secret").write_bytes(b"x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"]["a.bin"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = checkpoints.latest(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1


def test_a_full_disk_leaves_the_one_before_and_says_so(tmp_path: Path) -> None:
    two(tmp_path)

    def full(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(GemmaTuiError, match=r"does not fit.*MB are free"):
        checkpoints.write(tmp_path, 3, full, {})
    assert checkpoints.latest(tmp_path).checkpoint.step == 2  # type: ignore[union-attr]
    assert not list(tmp_path.glob(".tmp-*"))
    assert not (tmp_path / "ballast").exists()


def test_what_a_living_writer_has_begun_stays(tmp_path: Path) -> None:
    from gemma_tui.runs.processes import own_start

    mine = tmp_path / f".tmp-00000001-{os.getpid()}-{own_start():.0f}"
    gone = tmp_path / ".tmp-00000001-999999999-1"
    mine.mkdir()
    gone.mkdir()
    checkpoints.sweep(tmp_path)
    assert mine.exists()
    assert not gone.exists()


def test_a_step_that_is_there_is_kept(tmp_path: Path) -> None:
    two(tmp_path)
    again = checkpoints.write(tmp_path, 2, fill(9), {"step": 9})
    assert again.state == {"step": 2}
    assert (again.folder / "a.bin").read_bytes() == bytes([2]) * 1000
