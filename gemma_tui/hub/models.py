"""Which models are here, and what a name means."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engines.adapter_configs import CONFIG as ADAPTER_CONFIG
from engines.adapters import adapter_base
from engines.base import Progress
from engines.checkpoints import model_tensors
from engines.errors import EngineError
from engines.gemma3 import MAX_CONFIG_BYTES, Gemma3Config, read_config
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.cache import cached_repos, snapshot
from gemma_tui.hub.remote import REPO_ID, REVISION

NANO = "nano"
REAL = "gemma-3-270m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
RUNS_LISTED = 50
NAME = re.compile(r"[\w.\-]{1,120}")
WEIGHTS = re.compile(r"\.(safetensors(\.index\.json)?|bin|pt|pth|pkl)$")


@dataclass(frozen=True)
class Model:
    """A model on this machine.

    Attributes:
        source: ``built-in``, ``data folder``, ``hub cache``, ``adapter``, ``run`` or ``folder``.
        adapter: an adapter to put on the model in ``folder``, if the name means one.
    """

    name: str
    folder: Path
    source: str
    adapter: Path | None = None

    def config(self) -> Gemma3Config:
        """Its config, read from disk."""
        return read_config(self.folder)


@dataclass(frozen=True)
class Summary:
    """A model in a list. ``problem`` says why it cannot be used, if so; then the numbers are 0."""

    model: Model
    parameters: int = 0
    dtype: str = ""
    nbytes: int = 0
    problem: str = ""
    installed: bool = True
    """False for the real model while it still waits to be imported."""
    packed: bool = False
    """Whether the matrices are quantised, and stay so in memory."""


def resolve(name: str, progress: Progress | None = None) -> Model:
    """The model that a name means: built-in, of the data folder, an adapter, a folder, a run or a hub id in the cache.

    The real 270M is imported at its first use. An adapter comes with the model it was made for.

    Raises:
        GemmaTuiError: nothing of that name is here.
    """
    if (found := _adapter_folder(name)) is not None:
        folder, source = found
        return adapted(folder.name if source == "folder" else name, source, folder, progress)
    return whole_model(name, progress)


def adapted(name: str, source: str, adapter: Path, progress: Progress | None = None) -> Model:
    """An adapter on the model that it names.

    Raises:
        EngineError: that model is not here, or the adapter's config is broken.
    """
    return Model(name, base_model(adapter, progress).folder, source, adapter)


def base_model(adapter: Path, progress: Progress | None = None) -> Model:
    """The model that an adapter names as its base.

    Raises:
        EngineError: that model is not here, or the adapter's config is broken.
    """
    base = adapter_base(adapter)
    try:
        return whole_model(base, progress)
    except GemmaTuiError:
        raise GemmaTuiError(
            f"{adapter} is an adapter of {base[:120]!r}, which is not here: fetch it, or import with another --base"
        ) from None


def whole_model(name: str, progress: Progress | None = None) -> Model:
    """The model that a name means; adapters are none.

    Raises:
        GemmaTuiError: no model of that name is here.
    """
    if name == NANO:
        return Model(NANO, paths.assets() / "gemma-3-nano", "built-in")
    if name == REAL:
        from gemma_tui.hub.demo import ensure_imported

        return Model(REAL, ensure_imported(progress), "built-in")
    if NAME.fullmatch(name) and (folder := paths.models() / name / "config.json").is_file():
        return Model(name, folder.parent, "data folder")
    if (path := folder_named(name)) is not None:
        return Model(path.name, path.resolve(), "folder")
    if NAME.fullmatch(name) and (folder := paths.runs() / name / "model" / "config.json").is_file():
        return Model(name, folder.parent, "run")
    repo, _, revision = name.partition("@")
    if REPO_ID.fullmatch(repo) and REVISION.fullmatch(revision or "main"):
        if (cached := snapshot(repo, revision or "main")) is not None:
            return Model(name, cached, "hub cache")
        more = f" --revision {revision}" if revision else ""
        raise GemmaTuiError(f"{name} is not in the hub cache: fetch it with `gemma-tui models download {repo}{more}`")
    raise GemmaTuiError(f"no model {name[:80]!r}: give a folder, a run, or a name from `gemma-tui models list`")


def no_import(share: float, what: str) -> None:
    """A progress for who only looks at models: it ends the import of the real one as that begins.

    Raises:
        GemmaTuiError: always.
    """
    raise GemmaTuiError("told once the model is imported: load it on the first screen")


def is_only_remote(name: str) -> bool:
    """Whether a name is a hub id of which nothing is here, and the hub may be asked."""
    from huggingface_hub import is_offline_mode

    repo, _, revision = name.partition("@")
    absent = bool(REPO_ID.fullmatch(repo)) and snapshot(repo, revision or "main") is None
    return absent and folder_named(name) is None and not is_offline_mode()


def local_models() -> list[Summary]:
    """Everything that can be loaded here: built-in models, the data folder, the hub cache, adapters, trained runs."""
    from gemma_tui.hub.demo import imported_folder

    nano = Model(NANO, paths.assets() / "gemma-3-nano", "built-in")
    real = Model(REAL, imported_folder(), "built-in")
    waiting = Summary(real, parameters=268_098_176, dtype="BF16", nbytes=536_196_352, installed=False)
    found = [summary(nano), summary(real) if (real.folder / "config.json").is_file() else waiting]
    if paths.models().is_dir():
        folders = sorted(p for p in paths.models().iterdir() if (p / "config.json").is_file())
        found += [summary(Model(p.name, p, "data folder")) for p in folders if p.name not in (NANO, REAL)]
    return found + [summary(model) for model in (*_cached_models(), *_adapter_models(), *_trained_models())]


def summary(model: Model) -> Summary:
    """Size, dtype and parameter count from the files' headers; no weights are read."""
    try:
        config = model.config()
        if not any(WEIGHTS.search(path.name) for path in model.folder.iterdir()):
            fresh = f"no weights yet: `gemma-tui train --model {model.name} --fresh --method full` makes them"
            return Summary(model, config.parameter_count(), problem=fresh)
        tensors = model_tensors(model.folder)
    except EngineError as error:
        return Summary(model, problem=str(error))
    nbytes = sum(t.nbytes for t in tensors.values())
    largest = max(tensors.values(), key=lambda t: t.nbytes)
    dtype = f"{config.quantization.bits}-bit" if config.quantization else largest.dtype
    return Summary(model, config.parameter_count(), dtype, nbytes, packed=config.quantization is not None)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what belongs to the tokenizer of a model into another folder.

    Raises:
        GemmaTuiError: the disk is full or not writable.
    """
    try:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise GemmaTuiError(f"{target} cannot be written ({error.strerror}): free some space") from None


def folder_named(name: str) -> Path | None:
    """The folder of that path, from the home of a user with ``~``; None if there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of no one
        return None


def _adapter_folder(name: str) -> tuple[Path, str] | None:
    """Where the adapter of that name lies, and what kind of place it is; None if the name means a whole model."""
    if name in (NANO, REAL):
        return None
    if NAME.fullmatch(name):
        if (paths.models() / name / "config.json").is_file():
            return None
        if (paths.adapters() / name / ADAPTER_CONFIG).is_file():
            return paths.adapters() / name, "adapter"
    if (path := folder_named(name)) is not None:
        is_adapter = (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
        return (path.resolve(), "folder") if is_adapter else None
    return (adapter, "run") if NAME.fullmatch(name) and (adapter := run_adapter(paths.runs() / name)) else None


def run_adapter(run: Path) -> Path | None:
    """The adapter that a run left, if it left one and no whole model."""
    whole = (run / "model" / "config.json").is_file()
    return run / "adapter" if (run / "adapter" / ADAPTER_CONFIG).is_file() and not whole else None


def _cached_models() -> Iterator[Model]:
    """The commits in the cache that a branch or tag names: ``owner/name`` for main, else with ``@`` and the name."""
    for repo in sorted(cached_repos(), key=lambda r: r.repo):
        for ref in sorted({ref for revision in repo.revisions for ref in revision.refs}):
            folder = snapshot(repo.repo, ref)
            if folder is not None and _may_be_gemma(folder):
                yield Model(repo.repo if ref == "main" else f"{repo.repo}@{ref}", folder, "hub cache")


def imported_adapters() -> list[Path]:
    """The folders of the adapters in the data folder, by name."""
    folders = sorted(paths.adapters().iterdir()) if paths.adapters().is_dir() else []
    return [folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()]


def newest_runs() -> list[Path]:
    """The folders of the newest runs, the newest first."""
    folders = [p for p in paths.runs().iterdir() if p.is_dir()] if paths.runs().is_dir() else []
    return sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)[:RUNS_LISTED]


def _adapter_models() -> Iterator[Model]:
    """The adapters of the data folder; one whose base is gone cannot be loaded and is not listed."""
    for folder in imported_adapters():
        with suppress(EngineError):
            yield adapted(folder.name, "adapter", folder, no_import)


def _trained_models() -> Iterator[Model]:
    """What the newest runs left; one whose base is gone cannot be loaded and is not listed."""
    for folder in newest_runs():
        if (folder / "model" / "config.json").is_file():
            yield Model(folder.name, folder / "model", "run")
        elif (adapter := run_adapter(folder)) is not None:
            with suppress(EngineError):
                yield adapted(folder.name, "run", adapter, no_import)


def _may_be_gemma(folder: Path) -> bool:
    try:
        with (folder / "config.json").open("rb") as file:
            return b'"gemma3' in file.read(MAX_CONFIG_BYTES)
    except OSError:
        return False
