"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from gemma_tui import VERSION

PACKAGES = ("torch", "mlx", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory (bytes), system, and the versions of what computes."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "gemma_tui": VERSION,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def in_words(facts: dict[str, Any]) -> str:
    """The same in a line."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    memory = facts["memory"] / 1e9
    return f"{facts['processor']}, {facts['cores']} cores, {memory:.0f} GB, {facts['system']}; {packages}"


def processor() -> str:
    """The processor's own name, or its architecture where it has none to tell."""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
