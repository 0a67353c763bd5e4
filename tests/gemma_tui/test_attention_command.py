"""``gemma-tui attention``: every view as rows, whole files, studies that go on, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TEXTS, write_rows

from engines import available_engines
from engines.base import Engine
from engines.checkpoints import write_arrays, write_json
from engines.gemma3 import parse_config
from engines.initialisation import gemma3_weights
from engines.training import TrainingSettings
from gemma_tui import paths
from gemma_tui.cli import main
from gemma_tui.errors import UsageError
from gemma_tui.exports import png
from gemma_tui.hub.identity import model_digest
from gemma_tui.hub.models import resolve
from gemma_tui.runs.store import RunStore
from gemma_tui.studies.attention import parity
from gemma_tui.studies.attention.heads import METRICS
from gemma_tui.studies.attention.plan import VIEWS
from gemma_tui.studies.attention.reading import read
from gemma_tui.studies.attention.survey import STUDY
from gemma_tui.studies.events import Control
from gemma_tui.tokenizer import Tokenizer

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]

TEXT = "The dogs sleep on and on."
OTHER = "The dogs on and on sleep."
"""As many tokens, in another order."""
NEEDS = {
    "ablation": ("--ablate", "L1.H0"),
    "patching": ("--other-text", OTHER, "--patch", "heads", "--token", "e", "--contrast", "o"),
    "differences": ("--other-text", OTHER),
    "types": ("--repeats", "2"),
}
WITH_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def kinds(rows: list[dict[str, Any]]) -> set[str]:
    return {row["kind"] for row in rows}


def figure(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["kind"] == "figure")


def badge(rows: list[dict[str, Any]]) -> str:
    return next(note for note in figure(rows)["notes"] if note.startswith("weights "))


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "check"])
def test_every_view_gives_rows_and_an_end(command: Commands, tiny: str, view: str) -> None:
    code, rows, err = command("attention", tiny, "--text", TEXT, "--view", view, *NEEDS.get(view, ()))
    assert (code, err) == (0, "")
    assert rows[0]["kind"] == "figure"
    assert "not checked" in badge(rows)
    assert len(rows) > 2
    assert rows[-1] == {"kind": "end", "status": "done", "view": view}


def test_a_person_sees_the_view_without_colour_in_a_pipe(
    tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["attention", tiny, "--text", TEXT, "--npz", str(tmp_path / "a.npz")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert all(words in shown for words in ("heads by entropy", "L1 G", "L0.H0", "not checked", "written: "))
    assert max(map(len, shown.splitlines())) <= 200


def test_stats_are_every_heads_metrics_and_the_engines_agree(command: Commands, tiny: str) -> None:
    found = {}
    for engine in available_engines():
        code, rows, err = command("attention", tiny, "--text", TEXT * 3, "--engine", engine, "--stats")
        assert (code, err) == (0, "")
        heads = {row["head"]: row for row in rows if row["kind"] == "head"}
        assert set(heads) == {"L0.H0", "L0.H1", "L1.H0", "L1.H1"}
        assert figure(rows)["facts"]["engine"] == engine
        found[engine] = np.array(
            [[heads[name][metric] for metric in METRICS] for name in sorted(heads)], dtype=np.float64
        )
    first = found["torch"]
    assert np.isfinite(first).sum() > 50
    for values in found.values():
        assert np.allclose(values, first, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("words", "view"),
    [
        (("--ablate", "L0.H1"), "ablation"),
        (("--ablate", "beyond"), "ablation"),
        (("--layer", "1"), "head"),
        (("--head", "1"), "head"),
        (("--queries", "2:5"), "head"),
        (("--head", "1", "--view", "attribution"), "attribution"),
        (("--where", "local"), "heads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_an_option_implies_its_view(command: Commands, tiny: str, words: tuple[str, ...], view: str) -> None:
    code, rows, _ = command("attention", tiny, "--text", TEXT, *words)
    assert code == 0
    assert rows[-1]["view"] == view


def test_files_are_whole_and_need_nothing_else(
    command: Commands, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "letters_drawn", lambda: True)
    names = {name: tmp_path / f"a.{name}" for name in ("html", "svg", "png", "npz", "csv")}
    files = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    code, rows, _ = command("attention", tiny, "--text", "<b>dogs & sleep", "--view", "sinks", *files)
    assert code == 0
    assert [row["path"] for row in rows if row["kind"] == "written"] == [str(path) for path in names.values()]
    page = names["html"].read_text()
    assert "weights not checked" in page
    assert "<b>dogs" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?http""", page)
    assert not re.search(r"<script[^>]+src", page)
    assert names["svg"].read_text().lstrip().startswith(("<svg", "<?xml"))
    with np.load(names["npz"], allow_pickle=False) as arrays:
        assert json.loads(str(arrays["facts"]))["model_sha256"] == model_digest(resolve(tiny).folder)
        assert arrays.files
    assert names["png"].read_bytes().startswith(b"\x89PNG")
    for kind in ("sink", "massive", "bos"):
        assert names["csv"].read_text("utf-8").count(f"\n{kind},") == sum(row["kind"] == kind for row in rows)
    assert {path for path in tmp_path.iterdir() if path.is_file()} == set(names.values())


def test_a_part_of_a_heads_map_with_two_tokens(command: Commands, tiny: str, tmp_path: Path) -> None:
    words = (
        "attention",
        tiny,
        "--text",
        TEXT,
        "--layer",
        "1",
        "--head",
        "1",
        "--position",
        "-1",
        "--key-position",
        "2",
    )
    maps = {}
    for part in ((), ("--queries", "4:9", "--keys", "2:6")):
        path = tmp_path / f"{len(part)}.npz"
        code, rows, err = command(*words, *part, "--npz", str(path))
        assert (code, err) == (0, "")
        length = figure(rows)["facts"]["tokens"]
        assert {row["query"] for row in rows if row["kind"] == "key"} == {length - 1}
        assert {row["key"] for row in rows if row["kind"] == "reader"} == {2}
        with np.load(path) as arrays:
            maps[part] = arrays["weights"]
    assert figure(rows)["title"] == "L1.H1, global, queries 4-8, keys 2-5"
    assert all(4 <= row["query"] < 9 and 2 <= row["key"] < 6 for row in rows if row["kind"] == "edge")
    whole, shown = maps.values()
    np.testing.assert_array_equal(shown, whole[4:9, 2:6])


@pytest.fixture
def study(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "texts.jsonl", TEXTS[:4]))


def test_a_study_that_was_stopped_goes_on(
    command: Commands, tiny: str, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunStore.record

    def stopping(self: RunStore, run_id: str, kind: str, *rest: Any) -> None:
        real(self, run_id, kind, *rest)
        if kind == STUDY:
            self.request(run_id, "stop")

    words = ("attention", tiny, "--study", study, "--rows", "4", "--length", "24")
    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "record", stopping)
        patched.setattr("gemma_tui.studies.recording.REQUEST_SECONDS", -1.0)
        code, rows, err = command(*words)
    assert (code, err, rows[-1]["status"], rows[-1]["texts"]) == (130, "", "stopped", 1)
    run = rows[-1]["run"]
    code, shown, _ = command("runs", "show", run)
    assert (code, shown[0]["state"]) == (0, "stopped")
    assert [row for row in shown if row["kind"] == "head"] == [row for row in rows if row["kind"] == "head"]
    code, rows, err = command("runs", "resume", run)
    assert (code, err, rows[-1]["status"], rows[-1]["texts"]) == (0, "", "done", 4)
    resumed = {row["head"]: row["entropy"] for row in rows if row["kind"] == "head"}
    code, rows, _ = command(*words, "--name", "whole")
    whole = {row["head"]: row["entropy"] for row in rows if row["kind"] == "head"}
    assert code == 0
    assert resumed == pytest.approx(whole)


def test_a_study_that_was_stopped_before_its_first_text_goes_on(
    command: Commands, tiny: str, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("gemma_tui.studies.attention.survey.wait_while_paused", stop_at_once)
        code, rows, err = command("attention", tiny, "--study", study, "--rows", "2")
    assert (code, err, rows[-1]["status"], rows[-1]["texts"]) == (130, "", "stopped", 0)
    run = rows[-1]["run"]
    code, rows, _ = command("runs", "show", run)
    assert (code, rows[0]["run"], rows[-1]["status"]) == (0, run, "done")
    assert "has looked at no text yet" in next(row["text"] for row in rows if row["kind"] == "warning")
    assert command("runs", "show", run, "--csv", "heads.csv")[0] == 1
    code, rows, err = command("runs", "resume", run)
    assert (code, err, rows[-1]["status"], rows[-1]["texts"]) == (0, "", "done", 2)


def stop_at_once(control: Control, step: int) -> tuple[()]:
    control.stop.set()
    return ()


def test_a_study_is_coloured_by_a_metric(command: Commands, tiny: str, study: str, tmp_path: Path) -> None:
    page = tmp_path / "study.html"
    code, rows, _ = command(
        "attention", tiny, "--study", study, "--rows", "2", "--metric", "sink", "--html", str(page)
    )  # fmt: skip
    assert code == 0
    assert {"sink", "± 95 %"} <= set(next(row for row in rows if row["kind"] == "head"))
    assert page.is_file()


def test_a_long_text_on_a_larger_context(command: Commands, tokenizer: Tokenizer, tmp_path: Path, tiny: str) -> None:
    small = json.loads((paths.models() / tiny / "config.json").read_text())
    config = parse_config({**small, "max_position_embeddings": 4096, "sliding_window": 64})
    folder = tmp_path / "long"
    folder.mkdir()
    write_arrays(folder / "model.safetensors", dict(gemma3_weights(config, seed=1)))
    write_json(folder / "config.json", config.to_dict())
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    text = tmp_path / "long.txt"
    text.write_text("\n".join(TEXTS * 4))
    code, rows, err = command("attention", str(folder), "--text-file", str(text), "--view", "local-global")
    assert (code, err) == (0, "")
    assert figure(rows)["facts"]["tokens"] > 2000
    assert not any("WINDOW IDLE" in note for note in figure(rows)["notes"])


MISTAKES = {
    "empty text": (("--text", ""), "the text is empty"),
    "text beyond the context": (("--text", "dogs " * 600), "256"),
    "token not in the text": (("--text", TEXT, "--view", "lens", "--position", "7x"), "7x"),
    "position not in the text": (("--text", TEXT, "--view", "lens", "--position", "999"), "999"),
    "no such layer": (("--layer", "9"), "9"),
    "a key that is not seen": (
        ("--view", "neurons", "--key-position", "3", "--position", "2"),
        "position 2 does not see position 3",
    ),
    "no such head": (("--head", "9"), "9"),
    "ablation of nothing": (("--view", "ablation", "--ablate", ""), "name what is taken away"),
    "ablation of nothing alone": (("--ablate", ""), "name what is taken away"),
    "ablation of no one": (("--ablate", ","), "cannot be read"),
    "ablation of a head that is not there": (("--ablate", "L0.H7"), "7"),
    "ablation with control bytes": (("--ablate", "L0\x1b[2J\nL1"), "cannot be read"),
    "no file": (("--text-file", "nowhere.txt"), "nowhere.txt cannot be read"),
    "a folder": (("--text-file", "."), "cannot be read"),
    "not UTF-8": (("--text-file", "latin.txt"), "is not UTF-8"),
    "empty file": (("--text-file", "empty.txt"), "the text is empty"),
    "two texts": (("--text", "a", "--text-file", "empty.txt"), "not both"),
    "unknown metric": (("--metric", "beauty"), "metric 'beauty' is not there"),
    "unknown view": (("--view", "sky"), "view is 'sky'"),
    "filter": (("--where", "sink >"), "cannot be read"),
    "no folder": (("--html", "none/a.html"), "folder none is not there"),
    "no folder of a picture": (("--png", "none/a.png"), "folder none is not there"),
    "no ending": (("--csv", "a"), "a has no ending that tells its format"),
    "half a pair": (("--text", "a\ud800"), "not valid Unicode"),
    "patching without a text": (("--view", "patching"), "second text"),
    "no other side": (("--view", "differences"), "another side"),
    "an option of another view": (("--view", "sinks", "--gamma", "0.5"), "--gamma makes no difference"),
    "statistics and a view": (("--stats", "--view", "lens"), "--stats"),
    "statistics and an ablation": (("--stats", "--ablate", "L0"), "--ablate makes no difference"),
    "queries that are not there": (("--text", TEXT, "--queries", "3:999"), "queries: 3:999 is not there"),
    "keys that are no span": (("--text", TEXT, "--keys", "7"), "keys: '7' cannot be read"),
    "a span with control bytes": (("--text", TEXT, "--keys", "0:\x1b[2J\n5"), "cannot be read"),
    "a part of another view": (("--view", "sinks", "--keys", "0:4"), "--keys makes no difference"),
    "readers of no token of the text": (("--text", TEXT, "--key-position", "999"), "999"),
    "rows without a study": (("--rows", "3"), "without --study"),
    "a view of a study": (("--study", "texts.jsonl", "--view", "lens"), "with --study"),
    "a dtype of a study": (("--study", "texts.jsonl", "--dtype", "bfloat16"), "with --study"),
    "no texts": (("--study", "nowhere.jsonl"), "nowhere.jsonl"),
    "no texts in the file": (("--study", "empty.txt"), "empty.txt"),
    "unknown metric of a study": (("--study", "texts.jsonl", "--metric", "beauty"), "beauty"),
    "no such run": (("--study", "texts.jsonl", "--over", "lora-9"), "lora-9"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    command: Commands, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    write_rows(tmp_path / "texts.jsonl", TEXTS[:2])
    code, rows, err = command("attention", tiny, *words)
    assert code in (1, 2)
    assert err.count("\n") == 1
    assert said in err
    assert "Traceback" not in err
    assert rows[-1]["kind"] == "end"
    assert rows[-1]["status"] == "failed"
    assert not {"figure", "written"} & kinds(rows)
    assert not (tmp_path / "none").exists()


def test_tokens_of_bytes_are_told_by_their_names(command: Commands, tiny: str) -> None:
    for view in ("head", "lens", "sinks"):
        code, rows, _ = command("attention", tiny, "--text", "\x1b[2J\x07 漢\u202e é", "--view", view)
        assert code == 0
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", json.dumps(rows, ensure_ascii=False))


def check(command: Commands, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    return command("attention", *words, "--view", "check", "--text", TEXT * 2)


@WITH_TRANSFORMERS
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_a_check_is_remembered_for_what_was_checked(command: Commands, tiny: str, home: Path, engine: str) -> None:
    if engine not in available_engines():
        pytest.skip(f"{engine} is not installed")
    words = (tiny, "--engine", engine)
    code, rows, err = check(command, *words)
    assert (code, err) == (0, "")
    (found,) = [row for row in rows if row["kind"] == "check"]
    assert found["largest difference"] < (1e-6 if engine == "torch" else 1e-4)
    assert found["tokens"] > 8 + 1
    assert f"max |Δ| {found['largest difference']:.1e} on T = {found['tokens']}" in badge(rows)
    after = command("attention", *words, "--text", TEXT, "--view", "sinks")[1]
    assert badge(after) == badge(rows)
    assert "not checked" in badge(command("attention", *words, "--text", TEXT, "--dtype", "bfloat16")[1])
    weights = paths.models() / tiny / "model.safetensors"
    touched = time.time() + 5
    os.utime(weights, (touched, touched))
    assert "not checked" in badge(command("attention", *words, "--text", TEXT)[1])


BROKEN = ("", "{", "[1]", '{"a": 1}', "null", "\xff", '{"a": {"worst": 0, "tokens": Infinity}}', "[" * 100_000)


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:12] or "empty")
def test_a_broken_memory_of_checks_is_ignored(command: Commands, tiny: str, home: Path, content: str) -> None:
    (home / "checked.json").write_text(content, encoding="latin-1")
    code, rows, _ = command("attention", tiny, "--text", TEXT)
    assert code == 0
    assert "not checked" in badge(rows)


def test_without_transformers_the_check_says_what_it_needs(
    command: Commands, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else real(name, *rest)
    )
    code, rows, err = check(command, tiny)
    assert (code, err.count("\n")) == (1, 1)
    assert "pip install 'gemma-tui[check]'" in err
    assert rows[-1]["status"] == "failed"


@WITH_TRANSFORMERS
def test_with_an_adapter_nothing_counts_as_checked(command: Commands, tiny: str, corpus: Path) -> None:
    assert check(command, tiny)[0] == 0
    size = ("--sequence-length", "16", "--batch-size", "2", "--rank", "2")
    code, rows, _ = command(
        "train", "--model", tiny, "--data", str(corpus), "--method", "lora", "--steps", "1", "--engine", "torch", *size
    )  # fmt: skip
    assert code == 0
    run = rows[-1]["run"]
    assert "an adapter is on the model" in badge(command("attention", run, "--text", TEXT)[1])
    code, rows, err = check(command, run)
    assert (code, err.count("\n")) == (2, 1)
    assert "fuse the adapter first" in err


@WITH_TRANSFORMERS
def test_a_check_that_cannot_be_kept_says_so(
    command: Commands, tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = np.zeros((2, 16, 16), np.float32)
    monkeypatch.setattr(parity, "BEYOND", 8)
    monkeypatch.setattr(parity, "eager_attention", lambda folder, tokens: iter([nothing, nothing]))
    (home / "checked.part").mkdir()
    code, _, err = check(command, tiny)
    assert (code, err.count("\n")) == (1, 1)
    assert "the check is not kept" in err


def test_a_model_in_training_is_not_what_its_folder_holds(
    tiny: str, tokenizer: Tokenizer, torch_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_engine.load(paths.models() / tiny)
    torch_engine.start_training(TrainingSettings(None))
    reading = read(torch_engine, tokenizer, TEXT)
    assert "trained since it was loaded" in parity.badge(reading.facts)
    with pytest.raises(UsageError, match="load it again"):
        next(parity.parity(reading))


@WITH_TRANSFORMERS
def test_a_wrong_weight_is_found_by_the_check(
    command: Commands, tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = parity.eager_attention
    wrong = tmp_path / "wrong"
    shutil.copytree(paths.models() / tiny, wrong)
    config = parse_config(json.loads((wrong / "config.json").read_text()))
    write_arrays(wrong / "model.safetensors", dict(gemma3_weights(config, seed=2)))
    monkeypatch.setattr(parity, "eager_attention", lambda folder, tokens: real(wrong, tokens))
    code, rows, _ = check(command, tiny)
    assert code == 0
    assert next(row for row in rows if row["kind"] == "check")["largest difference"] > 1e-3
