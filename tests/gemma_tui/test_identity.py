"""The digest of a model is that of its contents, read again only when a file has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub import identity


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_TUI_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_digest_is_that_of_names_and_contents(folder: Path) -> None:
    parts = b"model.safetensors" + hashlib.sha256(b"weights").digest() + b"config.json" + hashlib.sha256(b"{}").digest()
    assert identity.model_digest(folder) == hashlib.sha256(parts).hexdigest()


def test_another_weight_or_adapter_is_another_digest(folder: Path, tmp_path: Path) -> None:
    before = identity.model_digest(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    assert identity.model_digest(folder, adapter) != before
    (folder / "model.safetensors").write_bytes(b"Weights2")
    assert identity.model_digest(folder) != before


def test_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = identity.model_digest(folder)
    monkeypatch.setattr(identity, "_digest", lambda files: "read again")
    assert identity.model_digest(folder) == digest
    (folder / "config.json").write_text("{ }")
    assert identity.model_digest(folder) == "read again"


def test_a_broken_memory_is_no_reason_to_fail(folder: Path, tmp_path: Path) -> None:
    digest = identity.model_digest(folder)
    (tmp_path / "home" / identity.FILE).write_text("[1, 2")
    assert identity.model_digest(folder) == digest


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "more.safetensors").symlink_to(folder / "gone")
    with pytest.raises(GemmaTuiError, match=r"more\.safetensors cannot be read"):
        identity.model_digest(folder)
