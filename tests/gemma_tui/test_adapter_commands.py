"""Adapters by name: what the commands import, export, blend and fuse, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import available_engines, open_engine
from engines.adapters import LowRank, target_modules, write_adapter, write_mlx, write_peft
from engines.errors import EngineError
from engines.gemma3 import read_config
from engines.training import LoRASettings
from gemma_tui import paths
from gemma_tui.hub.adapters import find
from gemma_tui.hub.models import local_models, resolve

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]
Make = Callable[..., Path]
LORA = LoRASettings(rank=2, alpha=3.0)
TEXT = np.arange(2, 14, dtype=np.int32)[None]

pytestmark = pytest.mark.usefixtures("empty_hub_cache")


@pytest.fixture
def make(tiny: str, tmp_path: Path) -> Make:
    """``make("name", layout="mlx", rank=3, ...)``: a folder with a random adapter of the tiny model."""
    config = read_config(paths.models() / tiny)

    def write(name: str, layout: str = "peft", base: str = tiny, seed: int = 0, **terms: Any) -> Path:
        lora, generator = replace(LORA, **terms), np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return generator.standard_normal(shape).astype(np.float32)

        modules = target_modules(config, lora.targets, lora.layers)
        factors = {
            m: LowRank(draw(lora.rank, inner), draw(out, lora.rank), 2 + draw(out) if lora.dora else None)
            for m, (out, inner) in modules.items()
        }
        if layout == "mlx":
            write_mlx(tmp_path / name, factors, lora, config, base)
        else:
            write_peft(tmp_path / name, factors, lora, base)
        return tmp_path / name

    return write


def logits(name: str) -> np.ndarray:
    """What the model of that name computes."""
    model, engine = resolve(name), open_engine(available_engines()[0])
    engine.load(model.folder, "float32")
    if model.adapter is not None:
        engine.load_adapter(model.adapter)
    return engine.logits(TEXT)


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["peft", "mlx"])
@pytest.mark.parametrize("terms", [{}, {"dora": True, "layers": (0,), "rslora": True}], ids=["lora", "dora"])
def test_an_imported_adapter_is_a_model_and_comes_out_again(
    command: Commands, tiny: str, make: Make, tmp_path: Path, layout: str, terms: dict[str, Any]
) -> None:
    source = make("source", layout, **terms)
    expected = logits(str(source))
    assert np.abs(expected - logits(tiny)).max() > 0.1
    code, rows, errors = command("adapters", "import", str(source), "--name", "mine")
    assert (code, errors, rows[-1]["adapter"]) == (0, "", "mine")
    close(logits("mine"), expected)
    assert ("mine", "adapter") in [(item.model.name, item.model.source) for item in local_models()]
    for format in ("peft", "mlx"):
        code, rows, _ = command("adapters", "export", "mine", "--format", format, "--out", str(tmp_path / format))
        assert (code, rows[-1]["format"]) == (0, format)
        close(logits(str(tmp_path / format)), expected)
    exported = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert exported["model"] == str(paths.models() / tiny)
    assert sorted(p.name for p in (tmp_path / "mlx").iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_an_imported_adapter_writes_and_is_trained_on(command: Commands, make: Make, corpus: Path) -> None:
    command("adapters", "import", str(make("source")), "--name", "mine")
    code, rows, _ = command("generate", "mine", "--prompt", "fox", "--max-tokens", "3")
    assert (code, rows[-1]["status"]) == (0, "done")
    small = ("--steps", "1", "--batch-size", "2", "--sequence-length", "32")
    code, rows, _ = command("train", "--model", "mine", "--data", str(corpus), "--method", "full", *small)
    assert (code, rows[-1]["status"]) == (0, "done")


def test_another_base_can_be_named(
    command: Commands, tiny: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("source", base="someone/unknown")
    code, _, errors = command("adapters", "import", str(source), "--name", "mine")
    assert code == 1
    assert "someone/unknown" in errors
    assert "--base" in errors
    code, rows, _ = command("adapters", "import", str(source), "--name", "mine", "--base", tiny)
    assert (code, Path(rows[-1]["base"])) == (0, paths.models() / tiny)
    assert find("mine")[0].folder == paths.models() / tiny
    paths.home().rename(moved := tmp_path / "moved")
    monkeypatch.setenv("GEMMA_TUI_HOME", str(moved))
    assert find("mine")[0].folder == moved / "models" / tiny


@pytest.mark.parametrize("how", ["svd", "cat", "linear"])
def test_blends_are_adapters(command: Commands, make: Make, how: str) -> None:
    for i in range(2):
        command("adapters", "import", str(make(str(i), seed=i)), "--name", f"part-{i}")
    words = ("part-0", "part-1", "--weights", "0.5", "-0.25", "--how", how, "--name", "both")
    code, rows, errors = command("adapters", "blend", *words)
    assert (code, errors) == (0, "")
    assert rows[-1]["rank"] == (4 if how == "cat" else 2)
    assert (rows[-1]["kept"] is None) == (how == "linear")
    assert np.isfinite(logits("both")).all()


def test_names_that_are_not_given_come_from_the_adapters(
    command: Commands, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        command("adapters", "import", str(make(name)), "--name", name)
    code, rows, _ = command("adapters", "blend", "one", "two", "--weights", "0.5", "0.5")
    assert (code, rows[-1]["adapter"]) == (0, "blend-one-two")
    code, rows, _ = command("adapters", "export", "one", "--format", "mlx")
    assert (code, rows[-1]["folder"]) == (0, "one-mlx")
    assert (tmp_path / "one-mlx" / "adapters.safetensors").is_file()


def test_a_blend_of_one_adapter_with_itself_is_that_adapter(command: Commands, make: Make) -> None:
    source = str(make("source"))
    code, rows, _ = command(
        "adapters", "blend", source, source, "--weights", "0.4", "0.6", "--rank", "2", "--name", "both"
    )
    assert code == 0
    assert rows[-1]["kept"] == pytest.approx(1)
    close(logits("both"), logits(source))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_fused_adapter_is_a_model(command: Commands, tiny: str, make: Make, dtype: str | None) -> None:
    source = str(make("source", dora=True))
    words = () if dtype is None else ("--dtype", dtype)
    code, rows, errors = command("adapters", "fuse", source, "--name", "whole", *words)
    assert (code, errors, rows[-1]["model"]) == (0, "", "whole")
    assert resolve("whole").adapter is None
    assert (paths.models() / "whole" / "tokenizer.json").is_file()
    np.testing.assert_allclose(logits("whole"), logits(source), rtol=0, atol=0.5 if dtype == "bfloat16" else 1e-3)
    code, _, _ = command("generate", "whole", "--prompt", "fox", "--max-tokens", "2")
    assert code == 0


def test_a_run_is_an_adapter_too(command: Commands, tiny: str, corpus: Path, tmp_path: Path) -> None:
    small = ("--steps", "2", "--batch-size", "2", "--sequence-length", "32", "--rank", "2")
    _, rows, _ = command("train", "--model", tiny, "--data", str(corpus), *small)
    run = rows[0]["run"]
    code, _, _ = command("adapters", "export", run, "--format", "mlx", "--out", str(tmp_path / "out"))
    assert code == 0
    close(logits(str(tmp_path / "out")), logits(run))
    _, rows, _ = command("adapters", "list")
    assert [(row["name"], row["source"], row["rank"]) for row in rows[:-1]] == [(run, "run", 2)]


def test_an_adapter_that_cannot_be_used_is_listed_with_the_reason(
    command: Commands, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    command("adapters", "import", str(make("source")), "--name", "mine")
    path = paths.adapters() / "mine" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "gone\x1b[2J"}))
    code, rows, _ = command("adapters", "list")
    assert (code, rows[0]["name"]) == (0, "mine")
    assert "gone" in rows[0]["problem"]
    with pytest.raises(EngineError, match="gone"):
        resolve("mine")
    assert "mine" not in [item.model.name for item in local_models()]


def test_an_adapter_that_names_itself_is_refused(command: Commands, make: Make) -> None:
    command("adapters", "import", str(make("source")), "--name", "mine")
    path = paths.adapters() / "mine" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "mine"}))
    with pytest.raises(EngineError, match="not here"):
        resolve("mine")


BLEND = ["adapters", "blend"]
BAD: dict[str, tuple[list[str], int, str]] = {
    "no such adapter": (["adapters", "fuse", "none", "--name", "a"], 1, "no model 'none'"),
    "a whole model": (["adapters", "fuse", "tiny", "--name", "a"], 1, "is a whole model"),
    "no such folder": (["adapters", "import", "none", "--name", "a"], 1, "none is no folder"),
    "an empty folder": (["adapters", "import", "EMPTY", "--name", "a"], 1, "adapter_config.json is missing"),
    "no factors": (["adapters", "import", "BARE", "--name", "a"], 1, "adapter_model.safetensors"),
    "another model's": (["adapters", "import", "ONE", "--name", "a", "--base", "nano"], 1, "do not fit"),
    "a taken name": (["adapters", "import", "ONE", "--name", "tiny"], 1, "is there already"),
    "a built-in name": (["adapters", "import", "ONE", "--name", "nano"], 1, "built-in"),
    "a name with a path": (["adapters", "import", "ONE", "--name", "../up"], 2, "is no name"),
    "no name": (["adapters", "import", "ONE"], 2, "--name"),
    "no such format": (["adapters", "export", "ONE", "--format", "gguf", "--out", "o"], 2, "invalid choice: 'gguf'"),
    "a folder that is there": (["adapters", "export", "ONE", "--format", "mlx", "--out", "EMPTY"], 1, "there already"),
    "one adapter": ([*BLEND, "ONE", "--weights", "1", "--name", "a"], 2, "two adapters or more"),
    "too few weights": ([*BLEND, "ONE", "TWO", "--weights", "1", "--name", "a"], 2, "2 adapters and 1 weights"),
    "a weight that is no number": ([*BLEND, "ONE", "TWO", "--weights", "1", "x", "--name", "a"], 2, "'x'"),
    "an endless weight": ([*BLEND, "ONE", "TWO", "--weights", "1", "inf", "--name", "a"], 2, "finite"),
    "a negative rank": ([*BLEND, "ONE", "TWO", "--weights", "1", "1", "--rank", "-1", "--name", "a"], 2, "rank is -1"),
    "a rank for cat": (
        [*BLEND, "ONE", "TWO", "--weights", "1", "1", "--how", "cat", "--rank", "2", "--name", "a"], 2, "goes with svd"
    ),
    "other bases": ([*BLEND, "ONE", "OTHER", "--weights", "1", "1", "--name", "a"], 1, "of one model"),
    "DoRA": ([*BLEND, "ONE", "DORA", "--weights", "1", "1", "--name", "a"], 1, "DoRA"),
    "other ranks": ([*BLEND, "ONE", "TWO", "--weights", "1", "1", "--how", "linear", "--name", "a"], 1, "one rank"),
    "no such dtype": (["adapters", "fuse", "ONE", "--name", "a", "--dtype", "float16"], 2, "float16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(
    command: Commands, tiny: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    words, expected, reason = BAD[kind]
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(paths.models() / tiny, copy)
    (tmp_path / "empty").mkdir()
    places = {
        "ONE": make("one"), "TWO": make("two", rank=1), "DORA": make("dora", dora=True), "EMPTY": tmp_path / "empty",
        "OTHER": make("other", base=str(copy)), "BARE": make("bare"),
    }  # fmt: skip
    (places["BARE"] / "adapter_model.safetensors").unlink()
    code, rows, errors = command(*(str(places.get(word, word)) for word in words))
    assert code == expected
    assert errors.count("\n") == 1
    assert reason in errors
    assert len(errors) < 450
    if rows:
        assert (rows[-1]["kind"], rows[-1]["status"]) == ("end", "failed")
    assert [p.name for p in paths.models().iterdir()] == [tiny]
    assert not paths.adapters().exists() or not list(paths.adapters().iterdir())
    assert not (tmp_path / "o").exists()


def test_a_model_does_not_take_an_adapters_name(command: Commands, make: Make, corpus: Path) -> None:
    command("adapters", "import", str(make("source")), "--name", "mine")
    code, _, errors = command("models", "new", "mine", "--data", str(corpus))
    assert code == 1
    assert "is there already" in errors


def test_what_is_beside_an_adapter_for_mlx_lm_is_read_alike(tiny: str, make: Make, tmp_path: Path) -> None:
    from engines.adapters import read_adapter

    config = read_config(paths.models() / tiny)
    factors, lora = read_adapter(make("source"), config)
    write_adapter(tmp_path / "both", factors, lora, config, tiny)
    close(logits(str(tmp_path / "both")), logits(str(tmp_path / "both" / "mlx-lm")))
