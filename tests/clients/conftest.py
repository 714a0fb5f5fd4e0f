"""The interpreter that has the clients; every test of this directory is marked `clients`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.session_server import SessionServer

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this directory."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def interpreter() -> str:
    """Python of the environment that `make clients` builds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = cache / "areal_like" / "clients" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with clients: make clients")
    return str(python)


@pytest.fixture
def server() -> Iterator[SessionServer]:
    with SessionServer().serving() as serving:
        yield serving
