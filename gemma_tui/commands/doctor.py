"""``gemma-tui doctor``."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sqlite3
from importlib import metadata

import psutil

from engines import ENGINES, INSTALL, available_engines, open_engine
from gemma_tui import VERSION, paths
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.models import NANO, resolve, summary
from gemma_tui.output import Output, bytes_text
from gemma_tui.runs.store import RunStore

PACKAGES = ("torch", "mlx", "textual", "rich", "plotext", "tokenizers", "numpy", "huggingface_hub")
WAL_RESET_FIXED = (3, 51, 3)


def doctor(args: argparse.Namespace, output: Output) -> int:
    """Look at everything the program needs; 1 if something is missing."""
    checks = [*_machine(), *_engines(), *_files()]
    for name, state, text in checks:
        output.row("check", name=name, state=state, text=text)
    output.table(("", "", "what was found"), [(state, name, text) for name, state, text in checks])
    failed = [name for name, state, _ in checks if state == "failed"]
    output.row("end", status="failed" if failed else "done", failed=failed)
    return 1 if failed else 0


Check = tuple[str, str, str]
"""Name, ``ok`` | ``note`` | ``failed``, and what was found."""


def _machine() -> list[Check]:
    memory = psutil.virtual_memory()
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES if _installed(name)]
    return [
        ("program", "ok", f"gemma-tui {VERSION}, Python {platform.python_version()}, {platform.platform()}"),
        ("cores", "ok", f"{os.cpu_count()} {platform.machine()}"),
        ("memory", "ok", f"{bytes_text(memory.total)}, {bytes_text(memory.available)} available"),
        ("packages", "ok", ", ".join(found)),
    ]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _engines() -> list[Check]:
    checks: list[Check] = []
    for name in ENGINES:
        if name not in available_engines():
            checks.append((name, "note", f"not installed: {INSTALL[name]}"))
            continue
        try:
            device = open_engine(name).device()
        except (ImportError, OSError, RuntimeError) as error:
            checks.append((name, "failed", f"does not start ({error}): {INSTALL[name]}"))
            continue
        memory = bytes_text(device.memory_total)
        checks.append((name, "ok", f"{device.version} on {device.device}, {' or '.join(device.dtypes)}, {memory}"))
    if all(state != "ok" for _, state, _ in checks):
        checks.append(("engines", "failed", "none starts, so nothing can be computed"))
    return checks


def _files() -> list[Check]:
    checks: list[Check] = []
    nano = summary(resolve(NANO))
    checks.append(("nano model", "failed" if nano.problem else "ok", nano.problem or str(nano.model.folder)))
    try:
        store = RunStore()
        verdict = store.check()
        state = "ok" if verdict == "ok" else "failed"
        checks.append(("run store", state, f"{verdict}, {len(store.runs())} runs in {paths.runs()}"))
        store.close()
        checks.append(("disk", "ok", f"{bytes_text(shutil.disk_usage(paths.home()).free)} free in {paths.home()}"))
    except GemmaTuiError as error:
        checks.append(("run store", "failed", str(error)))
    version = sqlite3.sqlite_version_info
    fixed = version >= WAL_RESET_FIXED or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    note = "" if fixed else ", older than the fix of a rare fault with several writers (3.51.3)"
    checks.append(("sqlite", "ok" if fixed else "note", f"{sqlite3.sqlite_version}{note}"))
    return checks
