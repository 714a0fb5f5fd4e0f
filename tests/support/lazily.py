"""Packages that a few tests use and that take long to import: imported at their first use.

    agents = lazily("agents", reason="needs openai-agents")

Every process of the tests collects all files, and runs some of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


class _Module:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        # pytest asks every value of a file for attributes like `__wrapped__`.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)


def lazily(name: str, *, reason: str = "") -> Any:
    """The module `name`, which is imported when it is first asked for a name without an underscore in front.

    `reason`: why the whole file is skipped if the package is not installed; empty: it always is.
    """
    if reason and importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(reason, allow_module_level=True)
    return _Module(name)
