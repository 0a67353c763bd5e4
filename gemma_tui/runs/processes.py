"""Processes of ours: whether one still lives, and starting one that outlives this one and its terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from gemma_tui import paths
from gemma_tui.errors import GemmaTuiError

LOOK_SECONDS = 0.05
INSTALLED = ("site-packages", "dist-packages")


def alive(pid: int, started: float) -> bool:
    """Whether the very process that began at ``started`` is there: pids are used again."""
    if pid == os.getpid():
        return started == own_start()
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2
    except psutil.Error:
        return False


@cache
def own_start() -> float:
    """When this process began; asked once, since the answer moves when the machine's clock is set."""
    return psutil.Process().create_time()


def start_of(pid: int) -> float:
    """When a process began; 0 if it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def began_before(pid: int, moment: float) -> bool:
    """Whether a process with this pid lives that was there at ``moment``, seconds since 1970; a second is let pass."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < moment + 1
    except psutil.Error:
        return False


@dataclass
class Detached:
    """A command of ours in a process of its own.

    Attributes:
        log: what it says, as JSON lines.
        sign: the kind of the line that tells that it has begun.
    """

    process: subprocess.Popen[bytes]
    log: Path
    sign: str

    def look(self) -> Mapping[str, Any] | None:
        """The line that tells that it has begun, or None before that.

        Raises:
            GemmaTuiError: it ended without having begun; the reason is its own.
        """
        code = self.process.poll()  # asked first: what it said before its end is then in the log
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        # A library's warning may stand before it.
        first = next((line for line in lines if line.startswith(f'{{"kind": "{self.sign}"')), None)
        if first is not None:
            return dict(json.loads(first))
        if code is None:
            return None
        said = next((line for line in lines if line.startswith("gemma-tui: ")), "")
        if not said:
            raise GemmaTuiError(f"the process ended at once ({code}): see {self.log}")
        self.log.unlink()
        raise GemmaTuiError(said.removeprefix("gemma-tui: "))

    def wait(self, seconds: float) -> Mapping[str, Any]:
        """The line that tells that it has begun.

        Raises:
            GemmaTuiError: it ended without having begun, or did not begin in time.
        """
        deadline = time.monotonic() + seconds
        while (row := self.look()) is None:
            if time.monotonic() > deadline:
                raise GemmaTuiError(f"the process did not begin within {seconds:.0f} s: see {self.log}")
            time.sleep(LOOK_SECONDS)
        return row

    def move_log(self, folder: Path) -> None:
        """Keep the log with the run it belongs to; the process writes on into it."""
        with suppress(OSError):  # it stays beside the run's folder
            self.log = self.log.rename(folder / "log.jsonl")


def start(arguments: Sequence[str], sign: str, folder: str = "") -> Detached:
    """Run one of our commands in a session of its own, so that no signal of this terminal reaches it.

    Args:
        arguments: the command's words, without the program's name; ``--json`` is added.
        sign: the kind of the line that tells that it has begun.
        folder: where it works; here if empty.

    Raises:
        GemmaTuiError: the folder is gone, or there is no space for the log.
    """
    try:
        paths.runs().mkdir(parents=True, exist_ok=True)
        log = paths.runs() / f"{arguments[0]}-{time.time_ns()}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                # -P: a folder where it works could hold modules of the same names.
                [sys.executable, "-P", "-m", "gemma_tui", *arguments, "--json"],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=folder or None, env=environment(),
            )  # fmt: skip
    except OSError as error:
        raise GemmaTuiError(f"{error.filename or folder}: {error.strerror}, so no process was started") from None
    # Someone has to wait for it, or it stays a zombie for as long as this process lives.
    threading.Thread(target=process.wait, daemon=True).start()
    return Detached(process, log, sign)


def environment() -> dict[str, str]:
    """Ours, such that it means the same in another folder."""
    environment = dict(os.environ)
    if "GEMMA_TUI_HOME" in environment:
        environment["GEMMA_TUI_HOME"] = str(paths.home().absolute())
    if paths.PACKAGE.parent.name not in INSTALLED:  # a checkout, which Python finds only by its path
        known = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(paths.PACKAGE.parent), known)))
    return environment
