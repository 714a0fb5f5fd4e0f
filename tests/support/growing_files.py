"""Files that another process writes, renames or removes while a test reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def complete_lines(path: Path) -> list[str]:
    """The lines of a file that are written to their ends; none if there is no such file.

    A reader may see a part of a line, because a write is atomic only within a page of memory.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    return text[: text.rfind(b"\n") + 1].decode().split("\n")[:-1]


def log_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines, such as a daemon's log."""
    return [json.loads(line) for line in complete_lines(path)]


def sizes_of(*paths: Path) -> dict[Path, int]:
    """Sizes in bytes of these files, and of those in these folders, as far as they exist when asked."""
    sizes: dict[Path, int] = {}
    for path in paths:
        try:
            found = list(path.iterdir()) if path.is_dir() else [path]
        except FileNotFoundError:
            continue
        for file in found:
            try:
                sizes[file] = file.stat().st_size
            except FileNotFoundError:
                continue
    return sizes
