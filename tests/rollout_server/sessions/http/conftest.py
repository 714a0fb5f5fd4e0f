"""A server of sessions for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.session_server import SessionServer


@pytest.fixture
def server() -> Iterator[SessionServer]:
    """It sends a comment each 0.2 s."""
    with SessionServer(keep_alive_s=0.2).serving() as serving:
        yield serving
