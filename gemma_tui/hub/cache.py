"""The Hugging Face cache as the model store: what lies there, what removing frees, and what downloads leave behind."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.checkpoints import model_tensors
from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.remote import COMMIT, REPO_ID, is_usual

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

LOCK_SECONDS = 0.01

SHARD = re.compile(r"\d-of-\d+\.safetensors$")


@dataclass(frozen=True)
class Revision:
    """A commit of a repository in the cache; without refs it is detached, as an interrupted download is."""

    commit: str
    refs: tuple[str, ...]
    files: int
    nbytes: int
    modified: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class CachedRepo:
    """A model's repository in the cache. ``nbytes`` counts what commits share once."""

    repo: str
    nbytes: int
    revisions: tuple[Revision, ...]


@dataclass(frozen=True)
class Removal:
    """What is about to be deleted, to be looked at first.

    Attributes:
        frees: bytes that the disk gets back; what other commits share stays.
        commits: the commits that go.
        snapshots: the folders of those commits.
        folders: folders that go beside what the library deletes.
        files: files that go.
        links: links to folders from elsewhere, which stay as they are.
        strategies: the library's own deletions, one for each repository.
    """

    what: str
    frees: int
    commits: tuple[str, ...] = ()
    snapshots: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()
    strategies: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to delete."""
        return not (self.commits or self.folders or self.files or self.links)

    def execute(self) -> None:
        """Delete it.

        Raises:
            GemmaTuiError: a file could not be deleted.
        """
        try:
            for strategy in self.strategies:
                strategy.execute()
            for path in (*self.links, *self.files):
                path.unlink(missing_ok=True)
            for folder in self.folders:
                shutil.rmtree(folder)
        except OSError as error:
            raise GemmaTuiError(f"{error.filename} cannot be deleted ({error.strerror}): check who owns it") from None


def cache_folder() -> Path:
    """Where the library keeps its cache, as ``HF_HOME`` or ``HF_HUB_CACHE`` say."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repo_folder(repo: str) -> Path:
    """The folder of a repository in the cache, whether or not it is there."""
    return cache_folder() / ("models--" + repo.replace("/", "--"))


def repo_of(snapshot: Path) -> str:
    """The repository of a commit's folder in the cache."""
    return snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


def snapshot(repo: str, revision: str = "main") -> Path | None:
    """The folder of a commit in the cache, named by a ref, by a commit or by the first digits of one."""
    folder = repo_folder(repo)
    commit = revision
    with suppress(OSError):
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    if COMMIT.fullmatch(commit):
        found = [folder / "snapshots" / commit]
    else:
        given = len(commit) >= 7 and commit.isalnum()
        found = list((folder / "snapshots").glob(f"{commit}*")) if given else []
    return found[0] if len(found) == 1 and (found[0] / "config.json").is_file() else None


def point(repo: str, revision: str, commit: str) -> None:
    """Let a branch, a tag or a commit's own number mean a commit; with that a download becomes usable by its name.

    The library writes no ref for a commit's number; without one it could not be told from what broke off.

    Raises:
        GemmaTuiError: the cache cannot be written.
    """
    ref = repo_folder(repo) / "refs" / revision
    partial = ref.with_name(f".{ref.name}.{os.getpid()}")
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(commit, encoding="utf-8")
        partial.replace(ref)
    except OSError as error:
        raise GemmaTuiError(f"{ref} cannot be written ({error.strerror}): check the disk") from None


def cached_repos() -> list[CachedRepo]:
    """The models in the cache, the largest first."""
    info = _scan()
    repos = [] if info is None else [r for r in info.repos if r.repo_type == "model" and REPO_ID.fullmatch(r.repo_id)]
    return sorted(map(_cached, repos), key=lambda r: (-r.nbytes, r.repo))


def removal(repo: str, revision: str | None = None) -> Removal:
    """What goes with a repository, or with one commit of it.

    Raises:
        GemmaTuiError: it is not in the cache.
    """
    info = _scan()
    found = next((r for r in info.repos if r.repo_type == "model" and r.repo_id == repo), None) if info else None
    if info is None or found is None:
        raise GemmaTuiError(f"{repo[:120]} is not in the hub cache: see `gemma-tui models list`")
    going = [
        r for r in found.revisions
        if revision is None or revision in r.refs or (len(revision) >= 7 and r.commit_hash.startswith(revision))
    ]  # fmt: skip
    if not going:
        raise GemmaTuiError(f"{repo} has no {revision!r} in the hub cache: see `gemma-tui models list`")
    return _deletion(info, found, f"{repo}{f'@{revision}' if revision else ''}", going)


def leftovers() -> Removal:
    """What downloads that broke off have left: partial files, commits without a name, and entries with nothing in.

    A commit that may be a model stays, and so do all commits of a repository of which something comes just now.
    """
    info = _scan()
    if info is None:
        return Removal("nothing", 0)
    abandoned = {folder: list(_abandoned(folder)) for folder in _repo_folders()}
    live = {folder.name for folder, parts in abandoned.items() if set(_unfinished(folder)) - set(parts)}
    found = []
    for repo in sorted(info.repos, key=lambda r: r.repo_id):
        if repo.repo_type == "model" and repo.repo_path.name not in live:
            going = [r for r in repo.revisions if not r.refs and not _may_be_model(r.snapshot_path)]
            found += [_deletion(info, repo, repo.repo_id, going)] if going else []
    partial = [path for parts in abandoned.values() for path in parts]
    return Removal(
        "leftovers of downloads",
        sum(one.frees for one in found) + sum(_size(path) for path in partial),
        commits=tuple(commit for one in found for commit in one.commits),
        snapshots=tuple(folder for one in found for folder in one.snapshots),
        folders=tuple(folder for folder in abandoned if _is_empty(folder)),
        files=tuple(partial),
        strategies=tuple(strategy for one in found for strategy in one.strategies),
    )


def tidy(repo: str) -> None:
    """Take away what a download that broke off has left of unfinished files; finished ones stay for the next try."""
    folder = repo_folder(repo)
    for path in _abandoned(folder):
        path.unlink(missing_ok=True)
    for place in (folder / "snapshots").glob("*"):
        with suppress(OSError):  # those that hold something stay
            place.rmdir()
    if folder.is_dir() and _is_empty(folder):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(cache_folder() / ".locks" / folder.name, ignore_errors=True)


def finished_bytes(repo: str) -> int:
    """Bytes of a repository's files that are here whole."""
    return sum(_size(path) for path in (repo_folder(repo) / "blobs").glob("*") if not path.name.endswith(".incomplete"))


def _scan() -> HFCacheInfo | None:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(cache_folder())
    except CacheNotFound:
        return None


def _cached(repo: Any) -> CachedRepo:
    revisions = sorted(repo.revisions, key=lambda r: r.last_modified, reverse=True)
    return CachedRepo(
        repo.repo_id,
        repo.size_on_disk,
        tuple(
            Revision(r.commit_hash, tuple(sorted(map(str, r.refs))), len(r.files), r.size_on_disk, r.last_modified)
            for r in revisions
        ),
    )


def _deletion(info: HFCacheInfo, repo: Any, what: str, going: Iterable[Any]) -> Removal:
    """What goes with some commits of a repository, which alone the library sees: others may have the same commits."""
    revisions = sorted(going, key=lambda r: str(r.commit_hash))
    strategy = replace(info, repos=frozenset({repo})).delete_revisions(*(r.commit_hash for r in revisions))
    root = cache_folder().resolve()
    for path in (*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.blobs):
        if not path.parent.resolve().is_relative_to(root):
            raise GemmaTuiError(f"{path} lies outside of {root}: nothing is deleted; look at the cache by hand")
    return Removal(
        what,
        strategy.expected_freed_size,
        commits=tuple(r.commit_hash for r in revisions),
        snapshots=tuple(r.snapshot_path for r in revisions),
        strategies=(strategy,),
    )


def _may_be_model(snapshot: Path) -> bool:
    """Whether a commit without a name is whole, or holds what only another program fetches.

    A file is linked here when it has come whole, so that of weights in one file nothing is missing; shards may be.
    """
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not path.is_dir()]
    if any(not is_usual(name) or (name.endswith(".safetensors") and not SHARD.search(name)) for name in files):
        return True
    with suppress(EngineError, OSError):
        return bool(model_tensors(snapshot))
    return False


def _repo_folders() -> Iterator[Path]:
    root = cache_folder()
    yield from (p for p in sorted(root.glob("models--*--*")) if p.is_dir() and not p.is_symlink())


def _is_empty(folder: Path) -> bool:
    """Whether a repository's folder holds no finished and no unfinished file."""
    files = [p for part in ("blobs", "snapshots") for p in (folder / part).rglob("*") if not p.is_dir()]
    return not files


def _unfinished(folder: Path) -> list[Path]:
    return sorted((folder / "blobs").glob("*.incomplete"))


def _abandoned(folder: Path) -> Iterator[Path]:
    """Unfinished files that no process writes: the library holds a lock of the blob's name while it does."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    for path in _unfinished(folder):
        lock = cache_folder() / ".locks" / folder.name / f"{path.name.split('.')[0]}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock, timeout=LOCK_SECONDS):
                yield path
        except (Timeout, OSError):
            continue


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.lstat().st_size
    return 0
