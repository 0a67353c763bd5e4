"""Writers of checkpoints that are stopped at every call to the file system, and at any moment: ``python crashing.py``.

It imports little and forks a writer for each place, in one process without threads. Each line of its output is the
JSON of one writer's end.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

from engines import disk
from gemma_tui.errors import GemmaTuiError
from gemma_tui.runs import checkpoints

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "piece")
SIZE = 200_000


def fill(step: int, folder: Path) -> None:
    with (folder / "parameters.bin").open("wb", buffering=0) as file:
        for start in range(0, SIZE, SIZE // 4):
            sys.audit("piece")
            file.write(content(step)[start : start + SIZE // 4])
    (folder / "place.json").write_text(f'{{"step": {step}}}')


def content(step: int) -> bytes:
    return bytes([step % 251]) * SIZE


def write(folder: Path, step: int) -> None:
    checkpoints.write(folder, step, lambda partial: fill(step, partial), {"step": step})


def facts(folder: Path) -> dict[str, Any]:
    """What a reader finds; ``whole`` are the steps that could be gone on from, ``problems`` those of the others."""
    found = checkpoints.latest(folder)
    newest = found.checkpoint
    right = newest is not None and (newest.path / "parameters.bin").read_bytes() == content(newest.step)
    damages = {int(path.name[5:]): checkpoints.damage(path) for path in sorted(folder.glob("step-*"))}
    return {
        "step": newest.step if newest else None,
        "right": right and newest is not None and newest.state == {"step": newest.step},
        "problems": [problem for problem in damages.values() if problem is not None],
        "whole": [step for step, problem in damages.items() if problem is None],
        "partial": sorted(path.name for path in folder.glob(".tmp-*")),
    }


def stop_at(place: int, how: str) -> list[str]:
    """From now on, kill this process at its call number ``place``, or let that call find the disk full.

    Returns:
        The calls so far, as they come.
    """
    seen: list[str] = []

    def hook(event: str, arguments: object) -> None:
        if event not in CALLS:
            return
        seen.append(event)
        if len(seen) == place and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(seen) == place and how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)
    return seen


def forked(place: int, how: str, folder: Path) -> int:
    """A writer of step 3 in its own process: 0 when it wrote, 3 when it said that it could not, -9 when killed.

    4 when it was done before it came to the place.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        seen = stop_at(place, how)
        write(folder, 3)
        code = 0 if len(seen) >= place else 4
    except GemmaTuiError:
        code = 3
    finally:
        os._exit(code)


def everywhere(how: str, home: Path) -> None:
    first = home / "first"
    for step in (1, 2):
        write(first, step)
    for place in count(1):
        folder = home / f"{how}-{place}"
        shutil.copytree(first, folder)
        code = forked(place, how, folder)
        row = {"code": code, **facts(folder)}
        checkpoints.sweep(folder)
        write(folder, 4)
        print(json.dumps({**row, "after": facts(folder)}))
        shutil.rmtree(folder)
        if code == 4:
            return


def anytime(home: Path, rounds: int) -> None:
    """One run that is killed again and again and goes on from what it finds."""
    folder, last = home / "run", 0
    generator = random.Random(7)
    for _ in range(rounds):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            for step in count(last + 1):
                write(folder, step)
                os.write(writer, f"{step}\n".encode())
        os.close(writer)
        time.sleep(generator.uniform(0.003, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader) as lines:
            told = [int(line) for line in lines]
        folder.mkdir(exist_ok=True)
        row = facts(folder)
        swept = checkpoints.sweep(folder)
        print(json.dumps({**row, "told": max(told, default=last), "swept": swept}))
        last = row["step"] or 0


if __name__ == "__main__":
    # What was written outlives the process whether it is on the disk or not.
    checkpoints.sync = disk.sync = lambda descriptor: None
    if sys.argv[1] == "anytime":
        anytime(Path(sys.argv[2]), 25)
    else:
        everywhere(sys.argv[1], Path(sys.argv[2]))
