"""Checkpoints of a run: folders that are there whole or not at all, whenever the process or the machine stops.

``step-00001234/`` holds what an engine wrote, ``state.json`` with what the study adds, and ``manifest.json`` with the
size and SHA-256 of each file. It is made under another name, and gets its own when all of it is on disk; so a reader
trusts nothing but the manifest. ``LATEST`` names the newest for people and scripts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.disk import sync
from engines.errors import CheckpointError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs.processes import began_before
from gemma_tui.text import one_line

FORMAT = 1
MANIFEST, STATE, LATEST, BALLAST = "manifest.json", "state.json", "LATEST", ".ballast"
NAME = re.compile(r"step-(\d{8,})")
PARTIAL = re.compile(r"\.tmp-.+-(\d+)")
MARGIN = 1.1
RESERVE = 64 << 20
"""Bytes that a checkpoint leaves free for the run's database, its log and other programs."""
BALLAST_BYTES = 8 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the optimizer steps taken before it, and what the study kept."""

    path: Path
    step: int
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, if there is one, and a line for each newer one that is damaged."""

    checkpoint: Checkpoint | None
    problems: tuple[str, ...] = ()


def write(
    folder: Path,
    step: int,
    fill: Callable[[Path], object],
    state: Mapping[str, Any],
    keep: int = 2,
    needed: int | None = None,
) -> Path:
    """Write the checkpoint of a step; one of that step that is there and whole is kept as it is.

    Args:
        folder: holds the checkpoints of one run; made if it is missing.
        fill: writes the engine's files into the folder it is given.
        state: what the study goes on from, as JSON.
        keep: older checkpoints are removed when the new one was read back, until this many are left.
        needed: bytes it will take, if known; nothing is written where they are not free.

    Returns:
        The checkpoint's folder.

    Raises:
        GemmaTuiError: the disk is full or not writable; earlier checkpoints are as they were. A full disk also costs
            the ballast, so that the end of the run can be recorded.
    """
    target = folder / f"step-{step:08d}"
    if damage(target) is None:
        return target
    partial = folder / f".tmp-{step}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if needed is not None:
            _ensure_space(folder, step, needed)
        _remove(partial)
        partial.mkdir()
        fill(partial)
        _write_file(partial / STATE, _json(state))
        _seal(partial, step)
        if os.path.lexists(target):  # damaged, or no folder at all
            _retire(target)
        partial.rename(target)
        _sync_folder(folder)
        if (problem := damage(target)) is not None:
            raise GemmaTuiError(f"{folder}: {problem}, though just written: the disk may be failing, take another")
        _point_latest(folder, target.name)
    except (OSError, CheckpointError) as error:
        reason = _os_error(error)
        if reason is None:
            raise
        written = _bytes(partial)
        _remove(partial)
        raise _refused(folder, step, reason, max(written, needed or 0)) from None
    finally:
        _remove(partial)
    _prune(folder, step, keep)
    return target


def latest(folder: Path) -> Found:
    """The newest checkpoint that is whole, every byte of it read; damaged newer ones are passed over and named.

    Raises:
        GemmaTuiError: the folder cannot be listed.
    """
    problems: list[str] = []
    for path in reversed(_checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            state = json.loads((path / STATE).read_bytes())
            return Found(Checkpoint(path, _step(path), state), tuple(problems))
        problems.append(problem)
    return Found(None, tuple(problems))


def whole(folder: Path) -> list[tuple[Path, int]]:
    """Every checkpoint that is whole, with the optimizer steps taken before it, by rising step.

    Raises:
        GemmaTuiError: the folder cannot be listed.
    """
    return [(path, _step(path)) for path in _checkpoints(folder) if damage(path) is None]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in one line that names the file; None if it is whole, every byte of it read."""
    try:
        return _damage(path, contents=True)
    except OSError as error:
        return one_line(f"{path.name}: {Path(str(error.filename)).name} cannot be read ({error.strerror})")


def sweep(folder: Path) -> int:
    """Remove what writers that are gone left half done; returns how many there were. Called when a run starts."""
    count = 0
    for path in _entries(folder):
        found = PARTIAL.fullmatch(path.name)
        if found and not _written_by_living(path, int(found[1])):
            _remove(path)
            count += 1
    return count


def hold_ballast(folder: Path) -> bool:
    """Take up some MB beside the checkpoints, to be given back when the disk is full; tells whether they could be had.

    The study calls it when a run starts. ``write`` lets go of it when the disk is full; whoever records the end of a
    run calls ``release_ballast`` first, in any case.
    """
    path = folder / BALLAST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Random, since some file systems take no space for zeros.
        _write_file(path, os.urandom(BALLAST_BYTES))
    except OSError:
        release_ballast(folder)
        return False
    return True


def release_ballast(folder: Path) -> None:
    """Give the ballast back; it does not matter whether it is there."""
    with suppress(OSError):
        (folder / BALLAST).unlink()


def _ensure_space(folder: Path, step: int, needed: int) -> None:
    wanted, free = int(needed * MARGIN) + RESERVE, shutil.disk_usage(folder).free
    if free < wanted:
        raise _full(folder, step, wanted, free)


def _seal(partial: Path, step: int) -> None:
    """Put every file on disk, and the manifest after them."""
    # Python's open() heeds the umask, which cannot be asked for without changing it; safetensors makes files of 0600.
    mode = (partial / STATE).stat().st_mode & 0o666
    files = {path.relative_to(partial).as_posix(): _sealed(path, mode) for path in _files(partial)}
    _write_file(partial / MANIFEST, _json({"format": FORMAT, "step": step, "files": files}))
    for path in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
        _sync_folder(path)


def _sealed(path: Path, mode: int) -> dict[str, Any]:
    path.chmod(mode)
    with path.open("rb") as file:
        sync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _point_latest(folder: Path, name: str) -> None:
    partial = folder / f".tmp-{LATEST}-{os.getpid()}"
    try:
        _write_file(partial, f"{name}\n".encode())
        partial.replace(folder / LATEST)
        _sync_folder(folder)
    finally:
        _remove(partial)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove old checkpoints up to ``step``, and damaged ones among them, which do not count. Later ones stay."""
    with suppress(OSError, GemmaTuiError):  # what cannot be removed does no harm
        past = [path for path in reversed(_checkpoints(folder)) if _step(path) <= step]
        whole = [path for path in past if _damage(path, contents=False) is None]
        for path in past:
            if path not in whole[: max(1, keep)]:
                _retire(path)


def _retire(path: Path) -> None:
    """Remove a checkpoint, such that it is never seen with half of its files."""
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    _remove(partial)
    path.rename(partial)
    _remove(partial)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise GemmaTuiError(f"{folder} cannot be listed ({error.strerror}): make it a folder you can read") from None


def _checkpoints(folder: Path) -> list[Path]:
    """Whatever has a checkpoint's name, by rising step."""
    return sorted((path for path in _entries(folder) if NAME.fullmatch(path.name)), key=lambda p: (_step(p), p.name))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of each file; ``ValueError`` and its like if it is not what ``_seal`` writes."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    files = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in files)
    if manifest["format"] != FORMAT or manifest["step"] != _step(path) or STATE not in files or not inside:
        raise ValueError
    return files


def _damage(path: Path, contents: bool) -> str | None:
    """``damage``, of the sizes only or of the contents too.

    Raises:
        OSError: it cannot be told, which may be the fault of the moment.
    """
    if path.is_symlink() or not path.is_dir():
        return f"{path.name} is no folder"
    try:
        files = _manifest(path)
    except FileNotFoundError:
        return f"{path.name}: {MANIFEST} is missing"
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return f"{path.name}: {MANIFEST} is garbled"
    for name, (size, digest) in files.items():
        if (problem := _file_damage(path / name, size, digest if contents else None)) is not None:
            return one_line(f"{path.name}: {name} {problem}")
    return None


def _file_damage(path: Path, size: int, digest: str | None) -> str | None:
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    if found != size:
        return f"has {found:,} bytes of {size:,}"
    if digest is None:
        return None
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == digest
    return None if same else "has changed since it was written"


def _written_by_living(path: Path, pid: int) -> bool:
    """A process that began after the file was last written only has its writer's pid."""
    try:
        return began_before(pid, path.lstat().st_mtime)
    except OSError:
        return True


def _bytes(folder: Path) -> int:
    with suppress(OSError):
        return sum(path.stat().st_size for path in _files(folder))
    return 0


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error below one of an engine, which says it in its own words."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _refused(folder: Path, step: int, error: OSError, needed: int) -> GemmaTuiError:
    if error.errno not in FULL:
        return GemmaTuiError(f"{folder}: the checkpoint of step {step} cannot be written ({error.strerror})")
    free = 0
    with suppress(OSError):  # the folder itself could not be made
        free = shutil.disk_usage(folder).free
    release_ballast(folder)
    return _full(folder, step, needed, free)


def _full(folder: Path, step: int, needed: int, free: int) -> GemmaTuiError:
    return GemmaTuiError(
        f"{folder}: the checkpoint of step {step} needs more than {_mb(needed)} and {_mb(free)} are free: "
        "free some space; the checkpoints before it are whole"
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
