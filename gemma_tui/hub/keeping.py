"""Models by name: what deleting one takes, what stands on it, and folders from elsewhere."""

from __future__ import annotations

from pathlib import Path

from engines.checkpoints import model_tensors
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub import cache
from gemma_tui.hub.adapters import listed
from gemma_tui.hub.cache import Removal
from gemma_tui.hub.models import NAME, NANO, REAL, Model
from gemma_tui.hub.naming import free_name, name_from
from gemma_tui.hub.remote import REPO_ID


def removal(name: str) -> Removal:
    """What goes when a model is removed: a repository, one commit of it (``owner/name@commit``), or a folder of ours.

    Raises:
        GemmaTuiError: there is none of that name, or it is not ours to delete.
    """
    if name == NANO:
        raise GemmaTuiError(f"{NANO} belongs to the program and stays")
    place = paths.models() / name
    if NAME.fullmatch(name) and place.is_symlink():
        return Removal(name, 0, links=(place,))
    if NAME.fullmatch(name) and name not in ("", ".", "..") and place.is_dir():
        return Removal(name, sum(p.lstat().st_size for p in place.rglob("*") if not p.is_dir()), folders=(place,))
    repo, _, revision = name.partition("@")
    if REPO_ID.fullmatch(repo):
        return cache.removal(repo, revision or None)
    again = "; it is imported at its first use" if name == REAL else ": see `gemma-tui models list`"
    raise GemmaTuiError(f"no model {name[:80]!r} in the data folder or the hub cache{again}")


def folders_of(found: Removal) -> list[Path]:
    """The folders that would go, to be held against what runs use."""
    return [path.resolve() for path in (*found.folders, *found.links, *found.snapshots)]


def adapters_on(found: Removal) -> list[str]:
    """Names of adapters whose base would go."""
    going = set(folders_of(found))
    return [item.name for item in listed() if item.base is not None and item.base.resolve() in going]


def adopt(folder: Path, name: str | None) -> Model:
    """Give a model's folder from elsewhere a name in the data folder, by a link.

    Raises:
        EngineError: it holds no model that can be computed here, or the name is taken.
    """
    try:
        source = folder.expanduser().resolve(strict=True)
    except (OSError, RuntimeError):
        raise GemmaTuiError(f"{folder} is not there: name a folder with a model") from None
    chosen = free_name(name or name_from(source.name))
    Model(chosen, source, "folder").config()
    model_tensors(source)
    link = paths.models() / chosen
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source, target_is_directory=True)
    except OSError as error:
        raise GemmaTuiError(f"{link} cannot be made ({error.strerror}): check the data folder") from None
    return Model(chosen, link, "data folder")
