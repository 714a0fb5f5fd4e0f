"""The interpreter that has Harbor; every test of this directory is marked `harbor`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chat_engine import anyio_backend, engine, model
from tests.support.separate_interpreters import interpreter_with, mark_below

__all__ = ["anyio_backend", "engine", "model"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this directory."""
    mark_below(Path(__file__).parent, items, pytest.mark.harbor)


@pytest.fixture(scope="session")
def interpreter() -> str:
    return interpreter_with("harbor")
