"""``models convert``: what is written, how well it reads, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS
from stand_in_hub import StandInHub

from engines import open_engine
from engines.checkpoints import as_bfloat16, as_float32, read_array, read_header
from gemma_tui import paths
from gemma_tui.cli import USAGE
from gemma_tui.runs.store import RunStore
from gemma_tui.studies import conversion, perplexity
from gemma_tui.studies.conversion import ConversionPlan
from gemma_tui.studies.perplexity import Perplexity
from gemma_tui.tokenizer import read_tokenizer

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXTS[:6]))
    return path


def test_a_model_is_quantised_and_then_writes(tiny: str, text: Path, command: Commands) -> None:
    code, rows, error = command("models", "convert", tiny, "--bits", "8", "--group-size", "32", "--text", str(text))
    assert code == 0, error
    end = rows[-1]
    assert end["model"] == "tiny-8bit"
    assert end["bytes_after"] < 0.4 * end["bytes_before"]
    assert end["perplexity_after"] != end["perplexity_before"]
    assert end["perplexity_after"] == pytest.approx(end["perplexity_before"], rel=0.02)
    listed = {row["name"]: row for row in command("models", "list")[1][:-1]}
    assert listed["tiny-8bit"]["dtype"] == "8-bit"
    told = command("generate", "tiny-8bit", "--engine", "mlx", "--prompt", "a", "--max-tokens", "3")
    assert told[0] == 0
    code, rows, error = command("generate", "tiny-8bit", "--engine", "torch", "--prompt", "a")
    assert code == 1
    assert "--engine mlx" in error


def test_the_perplexity_is_that_of_the_definition(
    tiny: str, text: Path, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "WINDOW", 16)
    code, rows, _ = command("models", "convert", tiny, "--dtype", "float32", "--text", str(text), "--engine", "torch")
    assert code == 0
    ids = read_tokenizer(paths.models() / tiny).encode(text.read_text(), bos=False)
    engine, total = open_engine("torch"), 0.0
    engine.load(paths.models() / tiny, "float32")
    for start in range(0, len(ids), 16):
        part = ids[start : start + 16]
        logits = engine.logits(np.array([[2, *part]], np.int32))[0, :-1].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= logs[np.arange(len(part)), part].sum()
    assert rows[-1]["tokens"] == len(ids)
    assert rows[-1]["perplexity_before"] == pytest.approx(math.exp(total / len(ids)), rel=1e-4)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_a_stop_at_any_time_leaves_nothing(tiny: str, text: Path, share: float) -> None:
    def progress(done: float, what: str) -> None:
        if done >= share:
            raise KeyboardInterrupt

    plan = ConversionPlan(tiny, dtype="bfloat16", text=str(text))
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(plan, lambda: open_engine("torch"), progress)
    assert [path.name for path in paths.models().iterdir()] == [tiny]


def test_of_a_long_text_only_the_beginning_is_tokenised(
    tiny: str, text: Path, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "TEXT_CHARACTERS", 40)
    code, rows, _ = command("models", "convert", tiny, "--dtype", "float32", "--text", str(text), "--engine", "torch")
    ids = read_tokenizer(paths.models() / tiny).encode(text.read_text()[:40], bos=False)
    assert (code, rows[-1]["tokens"]) == (0, len(ids))


def test_what_cannot_be_quantised_is_refused_before_the_text_is_read(
    tiny: str, text: Path, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    monkeypatch.setattr(conversion, "perplexity", lambda *given: read.append(given) or Perplexity(1.0, 1))
    assert command("models", "convert", tiny, "--bits", "4", "--group-size", "32")[0] == 0
    for model, options, said in (
        (tiny, ("--group-size", "32", "--engine", "torch"), "--engine mlx"),
        (tiny, ("--group-size", "128"), "--group-size 32"),
        ("tiny-4bit", ("--group-size", "32"), "4 bits already"),
    ):
        chosen = ("--bits", "4", "--name", "again", "--text", str(text), *options)
        code, _, error = command("models", "convert", model, *chosen)
        assert (code, said in error, read) == (1, True, []), error
    assert sorted(path.name for path in paths.models().iterdir()) == ["tiny", "tiny-4bit"]


def test_the_new_name_is_valid_and_free(tiny: str, hub: StandInHub, command: Commands, store: RunStore) -> None:
    assert command("models", "download", "org/gemma-3-tiny", "--revision", "v1")[0] == 0
    assert command("models", "convert", "org/gemma-3-tiny@v1", "--dtype", "bfloat16")[1][-1]["model"] == (
        "gemma-3-tiny-bfloat16"
    )
    run = store.create("mine", "train", "torch", {"model": tiny}, "gemma-tui train", 10)
    for name, said in (("gemma-3-270m", "built-in"), ("nano", "built-in"), (run.run_id, "there already")):
        code, _, error = command("models", "convert", tiny, "--dtype", "bfloat16", "--name", name)
        assert (code, said in error) == (1, True), error


def test_a_dtype_is_changed_by_rounding(tiny: str, command: Commands) -> None:
    assert command("models", "convert", tiny, "--dtype", "bfloat16", "--name", "half")[0] == 0
    before, after = (read_header(paths.models() / name / "model.safetensors") for name in (tiny, "half"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == "BF16"
        np.testing.assert_array_equal(read_array(tensor), as_bfloat16(as_float32(read_array(before[name]))))


def test_packed_weights_are_unpacked_for_torch(tiny: str, command: Commands) -> None:
    assert command("models", "convert", tiny, "--bits", "4", "--group-size", "32")[0] == 0
    assert command("models", "convert", "tiny-4bit", "--dtype", "float32", "--name", "plain")[0] == 0
    tokens = np.arange(2, 14, dtype=np.int32)[None]
    seen = []
    for name, engine in (("tiny-4bit", open_engine("mlx")), ("plain", open_engine("torch"))):
        engine.load(paths.models() / name, "float32")
        seen.append(engine.logits(tokens))
    np.testing.assert_allclose(seen[1], seen[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--bits 4, 6 or 8"),
        (("--bits", "5"), "bits is 5"),
        (("--bits", "4", "--group-size", "48"), "group_size is 48"),
        (("--dtype", "bfloat16", "--group-size", "32"), "no difference"),
        (("--dtype", "float16"), "float32 | bfloat16"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny: str, command: Commands, options: tuple[str, ...], said: str) -> None:
    code, _, error = command("models", "convert", tiny, *options)
    assert code == USAGE
    assert said in error


def test_a_name_that_is_taken_and_another_engine_are_refused(tiny: str, text: Path, command: Commands) -> None:
    code, _, error = command("models", "convert", tiny, "--dtype", "float32", "--name", "tiny")
    assert (code, "there already" in error) == (1, True)
    code, _, error = command("models", "convert", tiny, "--bits", "4", "--engine", "torch")
    assert (code, "--engine mlx" in error) == (1, True)
    assert sorted(path.name for path in paths.models().iterdir()) == ["tiny"]
    text.write_text("")
    code, _, error = command("models", "convert", tiny, "--dtype", "float32", "--text", str(text))
    assert (code, "empty" in error) == (USAGE, True)
