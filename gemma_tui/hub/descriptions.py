"""What is on the hub, and what a deletion takes, in words: the same on the command line and on the screen."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from gemma_tui.hub import fit
from gemma_tui.hub.cache import Removal, repo_of
from gemma_tui.hub.downloads import Download
from gemma_tui.hub.fetching import Request
from gemma_tui.hub.headers import Inside
from gemma_tui.hub.remote import Found, is_named
from gemma_tui.output import bytes_text, count_text

FOUND = ("repository", "size", "params", "fits", "access", "format", "dtype", "licence", "downloads")


def fit_of(item: Found) -> dict[str, str]:
    """Whether a model fits this machine: in float32, or as it is stored where parameters are not told, as when packed.

    Empty if its size is not told either.
    """
    if not item.parameters:
        return {"inference": fit.here(item.nbytes)} if item.nbytes else {}
    return {"inference": fit.here(4 * item.parameters), "full training": fit.here(16 * item.parameters)}


def found_cells(item: Found) -> tuple[str, ...]:
    """A model of a search as cells, in the order of ``FOUND``: a narrow terminal shows the first of them."""
    return (
        item.repo,
        bytes_text(item.nbytes) if item.nbytes else "",
        count_text(item.parameters) if item.parameters else "",
        fit_of(item).get("inference", ""),
        item.gated or "open",
        item.kind,
        item.dtype,
        item.licence,
        count_text(item.downloads),
    )


def inside_lines(inside: Inside) -> list[tuple[str, str]]:
    """A model of the hub before anything of it is fetched: what comes."""
    remote, config = inside.remote, inside.config
    about = [("commit", remote.commit), ("licence", remote.licence or "not told"), ("access", remote.gated or "open")]
    if config is None:
        return [*about, ("to fetch", "one of these files"), *((bytes_text(f.size), f.path) for f in inside.files)]
    left_out = ", ".join(remote.code[:8])
    return [
        *about,
        ("parameters", f"{config.parameter_count():,}"),
        ("layers", f"{config.num_hidden_layers}, global: {', '.join(map(str, config.global_layers)) or 'none'}"),
        ("to fetch", f"{len(inside.files)} files, {bytes_text(sum(f.size for f in inside.files))}"),
        ("stored as", ", ".join(inside.dtypes or ())),
        *([("left out", left_out)] if left_out else []),
    ]


def name_of(request: Request) -> str:
    """What the model is called here."""
    return request.repo if request.revision == "main" else f"{request.repo}@{request.revision}"


def fetching_command(request: Request) -> str:
    """The command that fetches it."""
    words = ["gemma-tui", "models", "download", request.repo]
    words += ["--revision", request.revision] if request.revision != "main" else []
    return shlex.join([*words, *(word for pattern in request.include for word in ("--include", pattern))])


def using_command(item: Download) -> str:
    """The command for what has come; GGUF alone is no model here before it is imported.

    Of several files of GGUF, which other downloads may have left beside it, it is the first that was asked for.
    """
    folder = Path(item.folder)
    if not list(folder.glob("*.safetensors")):
        for path in sorted(folder.rglob("*.gguf")):
            if is_named(path.relative_to(folder).as_posix(), item.request.include):
                return shlex.join(["gemma-tui", "models", "import", str(path)])
    return f"gemma-tui models info {name_of(item.request)}"


def preview(found: Removal, adapters: Iterable[str]) -> list[str]:
    """What a deletion takes away."""
    standing = ", ".join(adapters)
    lines = [f"{found.what}: frees {bytes_text(found.frees)}"]
    lines += [f"  commit {folder.name[:12]} of {repo_of(folder)}" for folder in found.snapshots]
    lines += [f"  {path}" for path in (*found.folders, *found.files)]
    lines += [f"  the link {path}; what it points to stays" for path in found.links]
    return lines + ([f"  adapters that stand on it: {standing}"] if standing else [])
