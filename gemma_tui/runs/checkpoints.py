"""Checkpoints that survive a crash at any moment: folders that are either whole or not there.

A checkpoint is written beside its place, flushed, listed with sizes and hashes in a manifest that comes last, and only
then renamed. What a crash leaves is a folder whose name begins with a dot, or the old state.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.checkpoints import sync
from engines.errors import CheckpointError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs.processes import alive, own_start

MANIFEST, STATE = "manifest.json", "state.json"
BALLAST, BALLAST_BYTES = "ballast", 4 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        state: what the study goes on from, as it gave it.
    """

    folder: Path
    step: int
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, if there is one, and a line for each newer one that is damaged."""

    checkpoint: Checkpoint | None
    problems: tuple[str, ...]


def write(
    folder: Path, step: int, fill: Callable[[Path], object], state: Mapping[str, Any], keep: int = 2
) -> Checkpoint:
    """Write a checkpoint of a step, verify it, and remove all but the newest ``keep``.

    Args:
        folder: of all checkpoints of a run.
        fill: writes files into the folder it is given.

    Raises:
        GemmaTuiError: the disk is full or not writable; earlier checkpoints stay, and a little room is freed, so that
            the end of the run can still be recorded.
    """
    target, beside = folder / f"step-{step:08d}", folder / f".tmp-{step:08d}-{os.getpid()}-{own_start():.0f}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        _ballast(folder)
        if target.exists() and not _problem(target):
            return read(target)  # it was written before a crash, at this very step
        shutil.rmtree(target, ignore_errors=True)
        beside.mkdir()
        fill(beside)
        (beside / STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
        files = {path.name: _sealed(path) for path in sorted(beside.iterdir())}
        (beside / MANIFEST).write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")
        _flush(beside / MANIFEST)
        _flush(beside)
        beside.rename(target)
        _flush(folder)
    except (OSError, CheckpointError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        (folder / BALLAST).unlink(missing_ok=True)
        raise GemmaTuiError(_why(folder, error)) from None
    checkpoint = read(target)
    for old in _steps(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return checkpoint


def latest(folder: Path) -> Found:
    """The newest checkpoint that is whole, hashes included; what is damaged is named and left alone."""
    problems: list[str] = []
    for path in _steps(folder):
        try:
            return Found(read(path), tuple(problems))
        except GemmaTuiError as error:
            problems.append(str(error))
    return Found(None, tuple(problems))


def read(path: Path) -> Checkpoint:
    """A checkpoint, checked.

    Raises:
        GemmaTuiError: a file is missing, of another size or with other content; it is named.
    """
    if problem := _problem(path):
        raise GemmaTuiError(problem)
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return Checkpoint(path, int(manifest["step"]), json.loads((path / STATE).read_text(encoding="utf-8")))


def sweep(folder: Path) -> None:
    """Remove what writers that are gone have left."""
    for path in folder.glob(".tmp-*"):
        _, _, pid, started = [*path.name.split("-"), "", "", ""][:4]
        writing = pid.isdigit() and started.isdigit() and (int(pid) == os.getpid() or alive(int(pid), float(started)))
        if not writing:
            shutil.rmtree(path, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints, the newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def _problem(path: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        int(manifest["step"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{path / MANIFEST} is missing or broken"
    if STATE not in files:
        return f"{path / MANIFEST} does not list {STATE}"
    for name, (size, digest) in files.items():
        file = path / Path(name).name
        if not file.is_file() or file.stat().st_size != size or _digest(file) != digest:
            return f"{file} is missing or damaged"
    return ""


def _sealed(path: Path) -> tuple[int, str]:
    """Flush a file; its size and hash."""
    _flush(path)
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Bring a file or folder to the disk itself."""
    if os.name == "nt" and path.is_dir():
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems have no such call
            raise
    finally:
        os.close(descriptor)


def _ballast(folder: Path) -> None:
    """A few bytes to give up when the disk is full: the run's end is still to be written then."""
    path = folder / BALLAST
    if not path.exists():
        path.write_bytes(os.urandom(BALLAST_BYTES))


def _why(folder: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno != errno.ENOSPC:
        return f"{folder}: the checkpoint cannot be written ({error.strerror}); the one before is whole"
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    return f"{folder}: the checkpoint does not fit, {free / 1e6:,.0f} MB are free; free some space, then resume"
