"""Whether files are what the hub says they are, and whether an engine may map them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engines.base import Progress
from engines.checkpoints import model_tensors
from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.cache import cache_folder
from gemma_tui.hub.models import Model
from gemma_tui.hub.remote import RemoteFile, look

BLOCK = 1 << 20
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Verified:
    """What a check found.

    Attributes:
        against: what the files were held against.
        problems: for each file that is not as it should be, how.
    """

    against: str
    files: int
    nbytes: int
    problems: dict[str, str]


def verify(model: Model, offline: bool, progress: Progress) -> Verified:
    """Hold a model's files against the hub's checksums, and its headers against our limits.

    A file in the cache is named by its checksum, which is what is used without a network. Models of the data folder
    and others were made here and have none; of them the config and the headers alone are looked at.

    Raises:
        EngineError: the hub cannot be asked, or a file cannot be read.
    """
    if model.source != "hub cache":
        return _headers(model, Verified("no checksums, which only models of the hub have", 0, 0, {}))
    repo, commit = model.name.split("@")[0], model.folder.name
    if offline:
        found = check_files(model.folder, named_files(model.folder), progress)
        return _headers(model, Verified("the names of the cache's files, which are checksums", *found))
    remote = look(repo, commit)
    here = [f for f in remote.files if (model.folder / f.path).is_symlink() or (model.folder / f.path).exists()]
    found = check_files(model.folder, here, progress)
    return _headers(model, Verified(f"the hub's checksums at {commit[:12]}", *found))


def check_files(folder: Path, files: Iterable[RemoteFile], progress: Progress) -> tuple[int, int, dict[str, str]]:
    """Number of files, their bytes, and what is wrong with which.

    Raises:
        GemmaTuiError: a file cannot be read.
    """
    files, problems, done = list(files), {}, 0
    total = max(1, sum(f.size for f in files))
    for file in files:
        progress(done / total, f"checking {file.path}")
        path = folder / file.path
        try:
            problem = _problem(path, file, partial(_tell, progress, total, done, file.path))
        except OSError as error:
            raise GemmaTuiError(f"{path} cannot be read ({error.strerror}): check the disk") from None
        if problem:
            problems[file.path] = problem
        done += file.size
    return len(files), done, problems


def _tell(progress: Progress, total: int, before: int, name: str, read: int) -> None:
    progress((before + read) / total, f"checking {name}")


def named_files(folder: Path) -> list[RemoteFile]:
    """The files of a commit in the cache, with the checksum that each file's name is; others have none."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        blob = path.resolve()
        digest = blob.name if DIGEST.fullmatch(blob.name) else ""
        found.append(RemoteFile(str(path.relative_to(folder)), blob.stat().st_size if blob.exists() else 0, digest))
    return found


def _problem(path: Path, file: RemoteFile, read: Callable[[int], None]) -> str:
    if not path.exists():
        return "missing"
    if path.is_symlink() and not path.resolve().is_relative_to(cache_folder().resolve()):
        return "a link to outside of the cache"
    if (size := path.stat().st_size) != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    if not DIGEST.fullmatch(file.digest):
        return "without a checksum"
    return "" if digest(path, file.digest, read) == file.digest else "other content than its checksum says"


def digest(path: Path, expected: str, read: Callable[[int], None] | None = None) -> str:
    """The checksum of a file, of the kind that ``expected`` is: SHA-256, or git's SHA-1 of a blob; hexadecimal."""
    whole = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    done = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
            done += len(block)
            if read is not None:
                read(done)
    return whole.hexdigest()


def _headers(model: Model, found: Verified) -> Verified:
    try:
        model.config()
        model_tensors(model.folder)
    except EngineError as error:
        return Verified(found.against, found.files, found.nbytes, found.problems | {"headers": str(error)})
    return found
