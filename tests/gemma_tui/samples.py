"""What tests take by name rather than as a fixture: a few texts, and rows of them."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS = [f"The {n}th fox jumps over {n + 1} lazy dogs,\nand the dogs of {n * 7} towns sleep on." for n in range(24)]


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
