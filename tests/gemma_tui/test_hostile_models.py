"""Whole folders of strangers through the commands: one line each, nothing run, nothing raw, and under 1 GB.

All of them go through one process, which tells its peak and everything it has opened, run or unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_weights import HOSTILE, hostile

from engines.checkpoints import MAX_HEADER_BYTES
from engines.gemma3 import MAX_CONFIG_BYTES
from gemma_tui.templates import MAX_CONFIG_BYTES as MAX_TOKENIZER_CONFIG_BYTES
from gemma_tui.tokenizer import MAX_BYTES as MAX_TOKENIZER_BYTES
from gemma_tui.tokenizer import MAX_OBJECTS, MAX_VALUES

PEAK_BYTES = 10**9
FRAMEWORK_BYTES = 350 << 20
"""What torch takes where weights are loaded; these commands do without it."""
ESCAPE = "\x1b]0;x\x07\x9b2J"

BOMBS: dict[str, Callable[[int], bytes]] = {
    "lists": lambda size: b'{"a":[' + b"[]," * (size // 3 - 4) + b"0]}",
    "objects": lambda size: b'{"a":[' + b"{}," * (size // 3 - 4) + b"0]}",
    "keys": lambda size: b"{" + b",".join(b'"%x":0' % i for i in range(size // 11)) + b"}",
    "texts": lambda size: b'{"a":[' + b'"ab",' * (size // 5 - 4) + b"0]}",
    "numbers": lambda size: b'{"a":[' + b"9e9," * (size // 4 - 4) + b"0]}",
    "nested lists": lambda size: b'{"a":' + b"[" * (size // 2 - 6) + b"]" * (size // 2 - 6) + b"}",
}


MODEL = b'{"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2%s},"merges":[%s]},"normalizer":%s}'
"""With as much in each part as the limits let through, or a little less."""

TOKENIZER_BOMBS = {
    "vocabulary": MODEL % (b"".join(b',"%x":%d' % (i + 3000, i + 3) for i in range(MAX_VALUES - 99)), b"", b"null"),
    "merges": MODEL % (b"", b'["a","b"],' * (MAX_VALUES // 3 - 99) + b'["a","b"]', b"null"),
    "lists": MODEL % (b"", b"[]," * (MAX_VALUES // 2 - 99) + b"[]", b"null"),
    "normalizers": MODEL % (
        b"", b"", b'{"type":"Sequence","normalizers":[%s{"type":"NFC"}]}' % (b'{"type":"NFC"},' * (MAX_OBJECTS - 99)),
    ),
    "too many merges": MODEL % (b"", b'["a","b"],' * (MAX_VALUES // 2) + b'["a","b"]', b"null"),
    "too many normalizers": MODEL % (
        b"", b"", b'{"type":"Sequence","normalizers":[%s{"type":"NFC"}]}' % (b'{"type":"NFC"},' * MAX_OBJECTS),
    ),
}  # fmt: skip


class Runs:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def header_bomb(folder: Path, kind: str) -> None:
    blob = BOMBS[kind](MAX_HEADER_BYTES)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(blob)) + blob)


def index_bomb(folder: Path, kind: str) -> None:
    blob = BOMBS[kind](MAX_HEADER_BYTES).replace(b'"a"', b'"weight_map"', 1)
    (folder / "model.safetensors.index.json").write_bytes(blob)


def config_bomb(folder: Path, kind: str) -> None:
    blob = BOMBS[kind](MAX_CONFIG_BYTES - 100).replace(b'"a"', b'"model_type"', 1)
    (folder / "config.json").write_bytes(blob)


def tokenizer_config_bomb(folder: Path, kind: str) -> None:
    blob = BOMBS[kind](MAX_TOKENIZER_CONFIG_BYTES - 100).replace(b'"a"', b'"chat_template"', 1)
    (folder / "tokenizer_config.json").write_bytes(blob)


def tokenizer_bomb(folder: Path, kind: str) -> None:
    (folder / "tokenizer.json").write_bytes(TOKENIZER_BOMBS[kind])


def changed(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def outside(folder: Path, place: str) -> None:
    where = {"model.norm.weight": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def only(folder: Path, name: str, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)


CASES: dict[str, Callable[[Path], object]] = {
    **{f"weights: {kind}": lambda f, kind=kind: hostile(f / "model.safetensors", kind) for kind in HOSTILE},
    **{f"header: {kind}": lambda f, kind=kind: header_bomb(f, kind) for kind in BOMBS},
    **{f"index: {kind}": lambda f, kind=kind: index_bomb(f, kind) for kind in BOMBS},
    **{f"config: {kind}": lambda f, kind=kind: config_bomb(f, kind) for kind in BOMBS},
    "a pickle alone": lambda f: only(f, "pytorch_model.bin", pickle.dumps(Runs())),
    "a pickle with a safe name": lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Runs())),
    "an escape sequence in a name": lambda f: only(f, f"{ESCAPE}.pkl", pickle.dumps(Runs())),
    "code": lambda f: changed(f, auto_map={"AutoModel": "modeling.Runs"}),
    "a file of code": lambda f: changed(f, model_file="modeling.py"),
    "another type": lambda f: changed(f, model_type=f"llama{ESCAPE}"),
    "an index to a parent": lambda f: outside(f, "../../model.safetensors"),
    "an index to anywhere": lambda f: outside(f, "/etc/passwd.safetensors"),
    "an index with an escape sequence": lambda f: outside(f, f"{ESCAPE}.safetensors"),
    "layers without an end": lambda f: changed(f, num_hidden_layers=10**9),
    "a width without an end": lambda f: changed(f, hidden_size=10**9),
    "no numbers": lambda f: changed(f, rms_norm_eps=float("nan")),
    "an archive": lambda f: only(f, "model.safetensors", tar_of(f)),
}

TOKENIZERS: dict[str, Callable[[Path], object]] = {
    **{kind: lambda f, kind=kind: tokenizer_bomb(f, kind) for kind in TOKENIZER_BOMBS},
    "too large": lambda f: os.truncate(f / "tokenizer.json", MAX_TOKENIZER_BYTES + 1),
    "no JSON": lambda f: (f / "tokenizer.json").write_bytes(b"\x1b[2J"),
}

WORKER = """
import contextlib, io, json, sys
from engines.memory import process_peak
from gemma_tui.cli import main

wrong = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect")
seen = []
sys.addaudithook(lambda event, given: seen.append(event) if event.startswith(wrong) else None)
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as left:
            code = left.code
    said = {"out": out.getvalue(), "err": err.getvalue()}
    print(json.dumps({**said, "code": code, "peak": process_peak(), "seen": seen}))
"""


def tar_of(folder: Path) -> bytes:
    path = folder / "x.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("../../executed"))
    return path.read_bytes()


def run(commands: list[list[str]], place: Path) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER], input=json.dumps(commands), capture_output=True, text=True, cwd=place,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(found: dict[str, object], name: str, beside: int = 0) -> None:
    said = str(found["out"]) + str(found["err"])
    assert found["code"] == 1, name
    assert len(str(found["err"]).splitlines()) == 1, name
    assert said.replace("\n", "").isprintable(), name
    assert found["seen"] == [], name
    assert int(str(found["peak"])) + beside < PEAK_BYTES, name


def folders(tmp_path: Path, model: Path, cases: dict[str, Callable[[Path], object]]) -> list[Path]:
    made = []
    for number, change in enumerate(cases.values()):
        folder = tmp_path / str(number)
        shutil.copytree(model, folder)
        change(folder)
        made.append(folder)
    return made


def test_a_folder_of_a_stranger_is_refused_in_one_line(prepared_model: Path, tmp_path: Path) -> None:
    places = folders(tmp_path, prepared_model, CASES)
    commands = [["models", "adopt", str(place)] for place in places]
    for name, found in zip(CASES, run(commands, tmp_path), strict=True):
        refused(found, name, FRAMEWORK_BYTES)
    assert not list(tmp_path.rglob("executed"))


def test_a_tokenizer_of_a_stranger_is_refused_in_one_line(prepared_model: Path, tmp_path: Path, corpus: Path) -> None:
    places = folders(tmp_path, prepared_model, TOKENIZERS)
    commands = [["data", str(place), "--data", str(corpus)] for place in places]
    for name, found in zip(TOKENIZERS, run(commands, tmp_path), strict=True):
        refused(found, name)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_tokenizers_config_of_a_stranger_is_told(prepared_model: Path, tmp_path: Path, kind: str) -> None:
    (place,) = folders(tmp_path, prepared_model, {kind: lambda f: tokenizer_config_bomb(f, kind)})
    (found,) = run([["models", "info", str(place)]], tmp_path)
    assert found["code"] == 0
    assert "cannot be used" in str(found["out"])
    assert int(str(found["peak"])) < PEAK_BYTES
