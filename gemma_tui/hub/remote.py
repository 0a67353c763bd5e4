"""The hub as it is asked: search, and what a repository holds.

Everything that comes back is foreign: ids, names, licences and numbers are checked here before anything uses them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engines.checkpoints import ITEM_BYTES
from engines.gemma3 import MAX_CONFIG_BYTES, Gemma3Config, parse_config, read_config_dict
from gemma_tui.errors import GemmaTuiError, UsageError
from gemma_tui.hub.metering import meter
from gemma_tui.hub.refusals import client, explained
from gemma_tui.text import one_line

REPO_ID = re.compile(r"\w[\w.\-]{0,95}/\w[\w.\-]{0,95}", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w.\-/]{0,119}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SEGMENT = re.compile(r"\w[\w.+\-=,@ ()]{0,199}", re.ASCII)
"""One part of a file's path: nothing hidden, no option, no pattern, no control character."""

KINDS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE")
"""What is fetched of a model. Pickles and code are not."""

CODE = (".bin", ".pt", ".pth", ".pkl", ".py", ".h5", ".keras", ".ckpt")
MAX_FILES = 1000
LARGEST_FILE = 50 * 10**9
"""Bytes; what is larger the hub gives by plain HTTP no more."""

MAX_ANSWERS = 200
TAGS = ("gemma3_text", "gemma3", "gguf")
"""What the hub calls the models by their configs, and GGUF files, whose architecture is looked at here."""

EXPANDED = ("safetensors", "gguf", "gated", "downloads", "tags", "config", "lastModified", "sha")


@dataclass(frozen=True)
class Found:
    """A model in a search.

    Attributes:
        kind: of what is fetched: ``weights``, ``MLX`` for mlx-lm's layout, or ``GGUF``, if there is nothing else.
        parameters: 0 if the hub does not tell, as of quantised weights.
        nbytes: of the weights; 0 if the hub does not tell, as of GGUF, which comes in several sizes.
        gated: ``auto``, ``manual``, or empty if it is open.
    """

    repo: str
    kind: str
    parameters: int
    dtype: str
    nbytes: int
    licence: str
    gated: str
    downloads: int
    modified: str


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; ``digest`` is a SHA-256 for what is kept as a large file, else git's SHA-1."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Remote:
    """A repository at one commit, to which everything that follows is pinned."""

    repo: str
    commit: str
    gated: str
    licence: str
    files: tuple[RemoteFile, ...]

    @property
    def code(self) -> tuple[str, ...]:
        """Files that could run code, which are never fetched."""
        return tuple(f.path for f in self.files if f.path.endswith(CODE))


def check_names(repo: str, revision: str = "main") -> None:
    """Refuse what is no repository's id or no revision.

    Raises:
        UsageError: one of them is none.
    """
    if not REPO_ID.fullmatch(repo):
        raise UsageError(f"{repo[:80]!r} is no id of a repository on the hub: give owner/name")
    if not REVISION.fullmatch(revision):
        raise UsageError(f"{revision[:80]!r} is no revision: give a branch, a tag or a commit")


def search(query: str, limit: int = 50) -> list[Found]:
    """Gemma-3 models on the hub, tuned ones of any name too, the most downloaded first.

    Raises:
        GemmaTuiError: the hub cannot be reached, or refuses.
    """
    found: dict[str, Found] = {}
    with explained("the search"):
        for tag in TAGS:
            answers = client().list_models(
                search=query or None,
                filter=tag,
                sort="downloads",
                limit=min(2 * limit, MAX_ANSWERS),
                expand=list(EXPANDED),  # type: ignore[arg-type]
            )
            found |= {item.repo: item for item in map(_found, answers) if item is not None}
    return sorted(found.values(), key=lambda item: (-item.downloads, item.repo))[:limit]


def look(repo: str, revision: str = "main") -> Remote:
    """What a repository holds now; its commit is settled here, once.

    Raises:
        UsageError: the names are none.
        AccessError: the repository is not there, or not for this user.
        GemmaTuiError: the hub cannot be reached, or its answer makes no sense.
    """
    check_names(repo, revision)
    with explained(repo, revision):
        info = client().model_info(repo, revision=revision, files_metadata=True)
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise GemmaTuiError(f"the hub names no commit for {repo}: try again later")
    files = tuple(_file(repo, sibling) for sibling in info.siblings or ())
    return Remote(repo, info.sha, _gated(info.gated), _licence(info.tags), files)


def check_access(remote: Remote) -> None:
    """Whether this user may fetch the files.

    Raises:
        AccessError: not; the message is the next thing to do.
    """
    with explained(remote.repo, gated=remote.gated):
        client().auth_check(remote.repo)


def remote_config(remote: Remote) -> Gemma3Config:
    """The config of a repository, of which nothing is kept here.

    Raises:
        CheckpointError: it is not Gemma-3, asks for code, or for what is not computed here.
        GemmaTuiError: there is none, or it cannot be had.
    """
    if all(f.path != "config.json" for f in remote.files):
        raise GemmaTuiError(f"{remote.repo} has no config.json: it holds no model that can be computed here")
    where = f"{remote.repo}: config.json"
    with passing_copy(remote, "config.json", MAX_CONFIG_BYTES) as path:
        return parse_config(read_config_dict(path.parent, where), where)


@contextmanager
def passing_copy(remote: Remote, name: str, limit: int) -> Iterator[Path]:
    """A copy of a file of a repository, of at most ``limit`` bytes, that goes at the end of the block.

    Raises:
        GemmaTuiError: it is larger, or cannot be had.
    """
    from huggingface_hub import hf_hub_download

    size = next(f.size for f in remote.files if f.path == name)
    if size > limit:
        raise GemmaTuiError(f"{remote.repo}: {name} of {size:,} bytes is over the limit of {limit:,}")
    with tempfile.TemporaryDirectory() as folder:
        with explained(remote.repo, gated=remote.gated):
            hf_hub_download(remote.repo, name, revision=remote.commit, local_dir=folder, tqdm_class=meter())
        yield Path(folder, name)


def _found(info: Any) -> Found | None:
    repo, tags = info.id, [str(tag)[:100] for tag in _sequence(info.tags)]
    if not isinstance(repo, str) or not REPO_ID.fullmatch(repo):
        return None
    gguf = info.gguf if isinstance(info.gguf, dict) else {}
    config = info.config if isinstance(info.config, dict) else {}
    kinds = {str(config.get("model_type", "")), str(gguf.get("architecture", "")), *tags}
    if not kinds & {"gemma3", "gemma3_text"} and not re.search(r"gemma-?3(?!n)\b", repo, re.IGNORECASE):
        return None
    dtypes = _dtypes(info.safetensors)
    packed = any(not dtype.startswith(("F", "BF")) for dtype in dtypes)
    kind = "GGUF" if not dtypes and (gguf or "gguf" in tags) else "MLX" if "mlx" in tags else "weights"
    return Found(
        repo=repo,
        kind=kind,
        parameters=0 if packed else sum(dtypes.values()) or _count(gguf.get("total")),
        dtype="quantised" if packed else max(dtypes, key=lambda d: dtypes[d], default=""),
        nbytes=sum(count * ITEM_BYTES.get(dtype, 0) for dtype, count in dtypes.items()),
        licence=_licence(tags),
        gated=_gated(info.gated),
        downloads=_count(info.downloads),
        modified=str(info.last_modified or "")[:10],
    )


def _file(repo: str, sibling: Any) -> RemoteFile:
    path, large = sibling.rfilename, sibling.lfs
    if not isinstance(path, str):
        raise GemmaTuiError(f"{repo} names a file that is no text: nothing of it is fetched")
    digest = large.sha256 if large is not None else sibling.blob_id
    size = large.size if large is not None else sibling.size
    return RemoteFile(path, _count(size), str(digest or "")[:64].lower())


def wanted(remote: Remote, include: Iterable[str] = ()) -> tuple[RemoteFile, ...]:
    """The files that are fetched: weights, configs, tokenizer and card; of GGUF files those that are named.

    Raises:
        GemmaTuiError: there are no safe weights, or names or numbers that no model has.
    """
    named = tuple(include)
    files = [f for f in remote.files if (is_usual(f.path) or is_named(f.path, named)) and not f.path.endswith(CODE)]
    if len(files) > MAX_FILES:
        raise GemmaTuiError(f"{remote.repo} names {len(files):,} files to fetch; a model has at most {MAX_FILES:,}")
    for file in files:
        if not all(SEGMENT.fullmatch(part) for part in file.path.split("/")):
            raise GemmaTuiError(
                f"{remote.repo} names a file {one_line(repr(file.path), 60)}, so nothing of it is fetched"
            )
        if file.size > LARGEST_FILE:
            raise GemmaTuiError(
                f"{remote.repo}: {file.path} of {file.size / 1e9:.0f} GB comes over Xet alone, which cannot be paused: "
                f"`hf download {remote.repo}` fetches it into the same cache"
            )
    if any(f.path.endswith((".safetensors", ".gguf")) for f in files):
        return tuple(files)
    if quantised := gguf_files(remote):
        names = ", ".join(one_line(file.path, 60) for file in quantised[:8])
        raise GemmaTuiError(f"{remote.repo} has GGUF weights; name which with --include: {names}")
    if remote.code:
        kept = one_line(remote.code[0], 60)
        raise GemmaTuiError(f"{remote.repo} has only {kept}, which could run code: take a repository with .safetensors")
    raise GemmaTuiError(f"{remote.repo} has no .safetensors weights: there is nothing to compute with")


def gguf_files(remote: Remote) -> tuple[RemoteFile, ...]:
    """The GGUF weights of a repository, of which one is fetched; the smallest first, none if there are safetensors."""
    if any("/" not in f.path and f.path.endswith(".safetensors") for f in remote.files):
        return ()
    found = [f for f in remote.files if f.path.endswith(".gguf") and "mmproj" not in f.path]  # no towers that see
    return tuple(sorted(found, key=lambda f: (f.size, f.path)))


def is_usual(path: str) -> bool:
    """Whether a file is fetched without being named; below the top are other forms of the same model."""
    return "/" not in path and is_named(path, KINDS)


def is_named(path: str, patterns: Iterable[str]) -> bool:
    """Whether a file is one of those that ``--include`` names."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _dtypes(safetensors: Any) -> dict[str, int]:
    counts = getattr(safetensors, "parameters", None)
    return {str(k)[:12]: _count(v) for k, v in counts.items()} if isinstance(counts, dict) else {}


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 60 else 0


def _sequence(value: Any) -> Iterable[Any]:
    return value[:200] if isinstance(value, list) else ()


def _gated(value: Any) -> str:
    return value if value in ("auto", "manual") else "auto" if value is True else ""


def _licence(tags: Any) -> str:
    return next((str(t)[8:48] for t in _sequence(tags) if str(t).startswith("license:")), "")
