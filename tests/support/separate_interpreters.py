"""Interpreters of packages whose requirements differ from ours (`make verifiers` and the like)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def interpreter_with(name: str) -> str:
    """Python of the environment that `make NAME` builds; skips the test if there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = cache / "areal_like" / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with {name}: make {name}")
    return str(python)


def mark_below(directory: Path, items: list[pytest.Item], mark: pytest.MarkDecorator) -> None:
    """Marks the tests of a directory; for `pytest_collection_modifyitems`."""
    for item in items:
        if directory in item.path.parents:
            item.add_marker(mark)
