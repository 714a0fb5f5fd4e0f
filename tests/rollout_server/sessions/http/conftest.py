"""A server of sessions for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rollout_server.sessions.http import call_response
from rollout_server.sessions.http.call_response import CallResponse
from tests.support.session_server import SessionServer


@pytest.fixture
def server() -> Iterator[SessionServer]:
    """It sends a comment each 0.2 s."""
    with SessionServer(keep_alive_s=0.2).serving() as serving:
        yield serving


@pytest.fixture(scope="module")
def shared_server() -> Iterator[SessionServer]:
    """One for all tests of a module that it refuses."""
    with SessionServer().serving() as serving:
        yield serving


@pytest.fixture
def late_policy(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of the server says nothing before a stream has had a comment."""
    server.policy.open.clear()
    send_part = CallResponse._send_part

    async def watched(response: CallResponse, send: Any, part: bytes) -> None:
        await send_part(response, send, part)
        if part == call_response._COMMENT:
            server.policy.open.set()

    monkeypatch.setattr(CallResponse, "_send_part", watched)
