"""Running two sides in turn, each in a process of its own, and printing medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

import psutil

Numbers = dict[str, float]


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def report(numbers: Numbers, loaded: int | None = None) -> None:
    """Called by a side: print its numbers, with the peak memory of its process in bytes.

    Args:
        loaded: ``resident()`` when the weights were there; what the peak has above it is told as well.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    above = {} if loaded is None else {"memory_above_weights": peak - loaded}
    print(json.dumps(numbers | above | {"peak_memory": peak}))


def side(module: str, name: str, *arguments: str) -> Numbers:
    """Run one side of a benchmark module; its last line of output is its numbers."""
    command = [sys.executable, "-m", module, name, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command[1:])} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(title: str, module: str, ours: str, theirs: str, rounds: int, arguments: Sequence[str] = ()) -> None:
    """Run both sides in turn and print the medians of each number and the median of the ratios ours / theirs."""
    pairs = [(side(module, ours, *arguments), side(module, theirs, *arguments)) for _ in range(rounds)]
    print(f"{title}\n  {machine()}, {rounds} rounds in turn")
    for key in pairs[0][0]:
        if key not in pairs[0][1]:
            continue
        a, b = ([p[i][key] for p in pairs] for i in (0, 1))
        ratios = [x / y for x, y in zip(a, b, strict=True) if y]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        middle = statistics.median
        print(f"  {key}: {ours} {middle(a):,.4g}, {theirs} {middle(b):,.4g}, ratio {middle(ratios):.2f} ({spread})")


def machine() -> str:
    """What it ran on."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
