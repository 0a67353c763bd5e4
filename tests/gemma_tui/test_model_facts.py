"""Model cards as plain text, what is known of a model's folder, and a model of the hub before it is fetched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from samples import GEMMA3_TEMPLATE
from stand_in_hub import COMMIT, Repo, StandInHub

from engines.base import DeviceInfo
from engines.official import OFFICIAL, official_config
from gemma_tui import paths
from gemma_tui.commands import models
from gemma_tui.hub import cache, fit
from gemma_tui.hub.cards import MAX_BYTES, MAX_LINES, plain_text, read_card
from gemma_tui.hub.models import Model, resolve, summary
from gemma_tui.studies.fitting import Need, main_needs, use_of
from gemma_tui.text import without_tokens

TINY = "org/gemma-3-tiny"

Commands = Callable[..., tuple[int, list[dict[str, Any]], str]]

CARD = """---
license: gemma
tags: [a, b]
---
# Gemma

A **bold** [model](https://x.y/z "title") with ![a picture](https://x.y/p.png) and <img src=x onerror=y>HTML</img>.

> quoted `code`
"""


def test_a_card_is_told_without_markup(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    licence, text = read_card(tmp_path)
    assert licence == "gemma"
    assert text == "Gemma\n\nA bold model with a picture and HTML.\n\nquoted code"


BOMBS = {
    "aliases": "---\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)) + "\n---\nx",
    "python in the front matter": "---\nx: !!python/object/apply:os.system ['true']\n---\nx",
    "front matter without an end": "---\n" + "a: b\n" * 100_000,
    "brackets": "[" * 300_000,
    "links": "[a](" * 100_000,
    "pictures": "![" * 100_000 + "](",
    "tags": "<a " * 100_000,
    "emphasis": "*" * 300_000 + "_" * 300_000,
    "a table": ("|" + "x|" * 500 + "\n") * 500,
    "one line": "x" * 5_000_000,
    "many lines": "x\n" * 1_000_000,
    "escape sequences": "\x1b]52;c;eA==\x07\x9b2J\u202e" * 1000,
    "bytes": "\udcff",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_hostile_card_is_short_and_clean(tmp_path: Path, kind: str) -> None:
    (tmp_path / "README.md").write_bytes(BOMBS[kind].encode("utf-8", "surrogateescape"))
    _, text = read_card(tmp_path)
    assert len(text) <= MAX_BYTES
    assert text.count("\n") <= MAX_LINES
    assert text.replace("\n", "").replace("\t", "").isprintable()


def test_control_characters_of_a_card_are_made_visible() -> None:
    assert plain_text("a\x1b[2Jb") == "a\u241b[2Jb"


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "a" * 34, "Authorization: Bearer abc.def", "https://x/y?token=abc&z=1", "hf_oauth_" + "a" * 34,
        "hf_jwt_" + "a" * 20 + "." + "a" * 20 + ".abc-abc_abc",
    ],
)  # fmt: skip
def test_tokens_are_taken_out_of_text(text: str) -> None:
    said = without_tokens(f"before {text} after")
    assert "a" * 20 not in said
    assert "abc" not in said
    assert said.startswith("before ")
    assert said.endswith(" after")


def test_info_tells_the_template_by_its_hash_and_its_difference(tiny: str, command: Commands) -> None:
    folder = paths.models() / tiny
    code, rows, _ = command("models", "info", tiny)
    assert (code, rows[0]["template"], rows[0]["difference"], rows[0]["commit"]) == (0, "", "", "")
    (folder / "chat_template.jinja").write_text(GEMMA3_TEMPLATE)
    row = command("models", "info", tiny)[1][0]
    assert row["template"] == hashlib.sha256(GEMMA3_TEMPLATE.encode()).hexdigest()
    assert row["difference"] == ""
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "writes" in command("models", "info", tiny)[1][0]["difference"]


def test_info_names_code_and_pickles_that_lie_beside(tiny: str, command: Commands) -> None:
    for name in ("modeling.py", "model.bin", "\x1b[2J.pt"):
        (paths.models() / tiny / name).write_bytes(b"x")
    row = command("models", "info", tiny)[1][0]
    assert row["left_alone"] == ["model.bin", "modeling.py", "␛[2J.pt"]


def test_info_shows_the_card_on_demand(tiny: str, spoken: Callable[..., tuple[int, str, str]]) -> None:
    (paths.models() / tiny / "README.md").write_text(CARD)
    assert "A bold model" not in spoken("models", "info", tiny)[1]
    code, said, _ = spoken("models", "info", tiny, "--card")
    assert code == 0
    assert "A bold model with a picture" in said


def test_a_quantised_model_is_counted_by_what_it_takes(tiny: str, command: Commands, monkeypatch: Any) -> None:
    assert command("models", "convert", tiny, "--bits", "4", "--group-size", "32")[0] == 0
    plain, packed = (command("models", "info", name)[1][0] for name in (tiny, "tiny-4bit"))
    full = next(use for use in plain["memory"] if use.startswith("full training of 1 x "))
    assert full not in packed["memory"]
    assert len(packed["memory"]) == len(plain["memory"]) - 1
    item = summary(Model("tiny-4bit", paths.models() / "tiny-4bit", "data folder"))
    asked: list[int] = []
    monkeypatch.setattr(fit, "here", lambda needed: asked.append(needed) or "fits")
    assert fit.state(item) == "fits"
    assert asked == [item.nbytes]


@pytest.mark.parametrize("name", ["gemma-3-270m", "nano"])
def test_info_and_fit_tell_the_same_needs(name: str, command: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceInfo("torch", "cpu", "", ("float32",), psutil.virtual_memory().total)
    monkeypatch.setattr(models, "devices", lambda: [device])
    config = official_config(name) if name in OFFICIAL else resolve(name).config()
    told = {use_of(need): need.nbytes for need in main_needs(config)}
    assert len(told) == 3
    _, rows, _ = command("models", "fit", name)
    needs = [Need(**{k: v for k, v in row.items() if k != "kind"}) for row in rows if row["kind"] == "need"]
    assert told.items() <= {use_of(need): need.nbytes for need in needs}.items()
    if name == "nano":
        assert command("models", "info", name)[1][0]["memory"] == told


def test_info_of_a_model_on_the_hub_tells_what_it_would_need(hub: StandInHub, command: Commands) -> None:
    hub.repos[TINY].files["model.bin"] = b"x"
    hub.repos[TINY].info = {"safetensors": {"parameters": {"BF16": 7}, "total": 7}, "tags": ["license:gemma"]}
    code, rows, _ = command("models", "info", TINY)
    assert code == 0
    row = rows[0]
    shape = json.loads(hub.repos[TINY].files["config.json"])
    assert (row["kind"], row["commit"], row["licence"], row["left_out"]) == ("remote", COMMIT, "gemma", ["model.bin"])
    assert row["bytes"] == sum(len(v) for k, v in hub.repos[TINY].files.items() if k != "model.bin")
    assert row["config"]["hidden_size"] == shape["hidden_size"]
    assert set(row["fits"]) == set(row["memory"])
    # What the headers say, not what is said of them.
    assert row["dtypes"] == {"F32": row["parameters"]}
    assert not cache.repo_folder(TINY).exists()


def test_fit_and_tree_of_a_model_on_the_hub_come_before_it(hub: StandInHub, command: Commands) -> None:
    code, rows, _ = command("models", "fit", TINY)
    needs = [row for row in rows if row["kind"] == "need"]
    assert (code, {row["engine"] for row in needs}) == (0, {"torch", "mlx"})
    assert {row["use"] for row in needs} >= {"inference", "lora", "relora", "rank1", "full"}
    assert command("models", "tree", TINY)[0] == 0
    assert not cache.repo_folder(TINY).exists()
    hub.repos["org/quants"] = Repo({"tiny-Q8_0.gguf": b"GGUF"})
    code, _, said = command("models", "fit", "org/quants")
    assert (code, "has GGUF" in said) == (2, True)


def test_info_of_gguf_on_the_hub_lists_its_files(hub: StandInHub, command: Commands) -> None:
    names = ("tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "mmproj-tiny.gguf")
    hub.repos["org/quants"] = Repo({name: b"GGUF" * len(name) for name in names})
    code, rows, _ = command("models", "info", "org/quants")
    assert (code, [f["path"] for f in rows[0]["choice"]]) == (0, ["tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"])
    assert rows[0]["choice"][0]["bytes"] == 4 * len(names[0])
