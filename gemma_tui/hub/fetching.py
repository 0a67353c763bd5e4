"""Fetching a model into the Hugging Face cache: pre-flight, download, checksums, and only then its name.

Runs as ``python -m gemma_tui.hub.fetching`` in a process of its own, because the client waits for the files in flight
when it is interrupted: a process can be ended. Orders come as lines on stdin, events go as JSON lines to stdout, and
when stdin ends so does the process.

A file that is finished is kept for good. Of one that is not, the client resumes what it has only within one call, after
a dropped line; after a cancel or a crash it begins that file again.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engines.checkpoints import model_tensors
from engines.errors import EngineError
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub import cache
from gemma_tui.hub.convert import ensure_space
from gemma_tui.hub.headers import remote_tensors
from gemma_tui.hub.metering import TELL_SECONDS, CancelledError, Control, Tell, Watch, free_bytes, meter
from gemma_tui.hub.refusals import reason
from gemma_tui.hub.remote import Remote, RemoteFile, check_access, check_names, look, remote_config, wanted
from gemma_tui.hub.verification import check_files
from gemma_tui.text import one_line, without_tokens

T = TypeVar("T")

TRIES, DOWNLOAD_TRIES = 6, 10
"""In a row, of a question and of a download: a laptop that wakes up may need minutes until the line is there."""

BACK_OFF, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try; each wait is twice the one before, up to the longest."""

PASSING = (408, 425, 429, 500, 502, 503, 504)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 1 << 16
"""Bytes between two looks at whether to pause or stop."""

SOFT_SECONDS = 0.4
"""What a soft cancel is given before the process ends itself."""

WORKERS = 4
CANCELLED = 130


@dataclass(frozen=True)
class Request:
    """What to fetch. ``include`` are patterns of files beside the usual ones, as ``*Q4_K_M.gguf``."""

    repo: str
    revision: str = "main"
    include: tuple[str, ...] = ()


class WrongContentError(Exception):
    """Files came that are not what their checksums say; they are deleted."""


def fetch(request: Request, tell: Tell, control: Control) -> Path:
    """Fetch a model, check it, and make it usable by its name; returns its folder in the cache.

    Raises:
        CancelledError: it was; finished files stay, unfinished ones are gone.
        EngineError: it cannot be had, or is not what can be computed here.
    """
    from huggingface_hub import is_offline_mode

    check_names(request.repo, request.revision)
    if is_offline_mode():
        return _offline(request, tell)
    try:
        remote = _patiently(lambda: look(request.repo, request.revision), tell, control)
        files = _preflight(remote, request, tell, control)
        folder = _patiently(
            lambda: _download(remote, files, tell, control), tell, control, DOWNLOAD_TRIES, lambda: _here(remote, files)
        )
        if any(f.path.endswith(".safetensors") for f in files):
            model_tensors(folder)
        cache.point(request.repo, request.revision, remote.commit)
    finally:
        cache.tidy(request.repo)
    tell("fetched", repo=request.repo, commit=remote.commit, folder=str(folder), bytes=sum(f.size for f in files))
    return folder


def _offline(request: Request, tell: Tell) -> Path:
    folder = cache.snapshot(request.repo, request.revision)
    if folder is None:
        raise GemmaTuiError(
            f"HF_HUB_OFFLINE is set and {request.repo} is not in the cache: unset it to fetch the model"
        )
    model_tensors(folder)
    tell("fetched", repo=request.repo, commit=folder.name, folder=str(folder), bytes=0, offline=True)
    return folder


def _preflight(remote: Remote, request: Request, tell: Tell, control: Control) -> list[RemoteFile]:
    """Everything that can be known before the first byte of weights; what is fetched."""
    _patiently(lambda: check_access(remote), tell, control)
    files = list(wanted(remote, request.include))
    weights = any(f.path.endswith(".safetensors") for f in files)
    config = _patiently(lambda: remote_config(remote), tell, control) if weights else None
    total, place = sum(f.size for f in files), cache.cache_folder()
    needed = total - _here(remote, files)
    tell(
        "plan", repo=remote.repo, commit=remote.commit, files=len(files), bytes=total, download=needed,
        free=free_bytes(place), licence=remote.licence, gated=remote.gated, left_out=len(remote.code),
    )  # fmt: skip
    ensure_space(place, needed, "set HF_HOME")
    if config is not None and needed:
        _patiently(lambda: remote_tensors(remote, files, config), tell, control)
    return files


def _here(remote: Remote, files: list[RemoteFile]) -> int:
    """Bytes of the files that are here, from this commit or, by their checksums, from another one."""
    folder = cache.repo_folder(remote.repo)
    commit, blobs = folder / "snapshots" / remote.commit, folder / "blobs"
    return sum(
        f.size for f in files if (commit / f.path).exists() or (f.digest.isalnum() and (blobs / f.digest).is_file())
    )


def _download(remote: Remote, files: list[RemoteFile], tell: Tell, control: Control) -> Path:
    """One try: what is missing, and the checksums of everything."""
    from huggingface_hub import snapshot_download

    folder = cache.repo_folder(remote.repo) / "snapshots" / remote.commit
    watch = Watch(_here(remote, files), sum(f.size for f in files), tell, control, cache.cache_folder())
    snapshot_download(
        remote.repo,
        revision=remote.commit,
        allow_patterns=[f.path for f in files],
        max_workers=WORKERS,
        tqdm_class=meter(watch.more),
    )
    watch.tell_now()
    _check(folder, files, tell, control)
    return folder


def _check(folder: Path, files: list[RemoteFile], tell: Tell, control: Control) -> None:
    told = [0.0]

    def progress(share: float, text: str) -> None:
        if control.stop.is_set():
            raise CancelledError
        if time.monotonic() - told[0] > TELL_SECONDS:
            told[0] = time.monotonic()
            tell("checking", share=round(share, 4), what=text)

    _, _, problems = check_files(folder, files, progress)
    for path in problems:
        file = folder / path
        blob = file.resolve()
        file.unlink(missing_ok=True)
        if blob.is_relative_to(cache.cache_folder().resolve()):
            blob.unlink(missing_ok=True)
    if problems:
        name, problem = next(iter(problems.items()))
        raise WrongContentError(f"{name} came wrong ({problem})")


def _patiently(
    step: Callable[[], T], tell: Tell, control: Control, tries: int = TRIES, finished: Callable[[], int] = lambda: 0
) -> T:
    """What a step returns, tried again after what passes by itself: a dropped line, a server that is busy or broken.

    Args:
        finished: what is done for good; where that grows, the tries are counted anew.
    """
    attempt, before = 0, finished()
    while True:
        try:
            return step()
        except Exception as error:
            if control.stop.is_set():
                raise CancelledError from None
            told, now = _explained(error), finished()
            attempt = 1 if now > before else attempt + 1
            before = max(before, now)
            if attempt >= (2 if isinstance(error, WrongContentError) else tries) or not _passes(error):
                raise told from None
        wait = min(BACK_OFF * 2 ** (attempt - 1), LONGEST_WAIT)
        tell("retry", attempt=attempt, seconds=wait, reason=one_line(str(told), 200))
        if control.stop.wait(wait):
            raise CancelledError


def _passes(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, WrongContentError):
        return True
    cause: BaseException | None = error
    while cause is not None:
        if status := getattr(getattr(cause, "response", None), "status_code", None):
            return status in PASSING
        if getattr(cause, "errno", None) in FULL:
            return False
        of_the_line = type(cause).__module__.startswith(("httpx", "httpcore"))
        if of_the_line or isinstance(cause, ConnectionError | TimeoutError):
            return True
        cause = cause.__cause__
    # The client's name for a file that came shorter or longer than it should.
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _explained(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    if isinstance(error, WrongContentError):
        return GemmaTuiError(f"{error}; it is deleted: try again later, or tell the repository's owners")
    if getattr(error, "errno", None) in FULL:
        return GemmaTuiError(f"{cache.cache_folder()} is full: free some space and try again; finished files are kept")
    return reason(error, "the download")


def _obey(control: Control, soft: float = SOFT_SECONDS) -> None:
    """Take orders until stdin ends or says cancel; then see to it that the process ends."""
    for line in sys.stdin:
        order = line.strip()
        if order == "pause":
            control.paused.set()
        elif order == "resume":
            control.paused.clear()
        elif order == "cancel":
            break
    control.stop.set()
    time.sleep(soft)
    _drop_unfinished()
    os._exit(CANCELLED)


def _drop_unfinished() -> None:
    """Delete the unfinished files that this process still writes, before it ends."""
    import psutil

    with suppress(psutil.Error):
        for file in psutil.Process().open_files():
            if file.path.endswith(".incomplete"):
                Path(file.path).unlink(missing_ok=True)


def main() -> int:
    """One download by a request on stdin."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    request = Request(**json.loads(sys.stdin.readline()))
    control, lock = Control(), threading.Lock()

    def tell(kind: str, **values: Any) -> None:
        with lock:
            print(json.dumps({"kind": kind, **values}), flush=True)

    threading.Thread(target=_obey, args=(control,), daemon=True).start()
    try:
        fetch(request, tell, control)
    except CancelledError:
        tell("cancelled")
        return CANCELLED
    except BrokenPipeError:
        return 1
    except EngineError as error:
        tell("failed", error=without_tokens(str(error)))
        return 1
    except Exception as error:  # a line for the one who waits; there is no one here to see a traceback
        tell("failed", error=without_tokens(one_line(f"{type(error).__name__}: {error}", 300)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
