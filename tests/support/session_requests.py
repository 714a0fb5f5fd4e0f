"""Requests to a session without any client's package, and the events of a stream."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Mapping
from typing import Any

from rollout_server.conversation.turns import SampleRewards
from rollout_server.sessions.open_session import OpenSession
from tests.support.session_server import SessionServer

Events = list[tuple[str, dict[str, Any]]]
"""Names and contents of server-sent events."""


def posted(
    server: SessionServer,
    session: OpenSession,
    path: str,
    body: Any,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "POST",
) -> tuple[int, Any]:
    """Status, and the JSON of the response, or the events of a stream."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, f"/sessions/{session.id}/{path}", content, dict(headers or {}))
        response = connection.getresponse()
        answer = response.read()
        if response.headers["Content-Type"].startswith("text/event-stream"):
            return response.status, events_of(answer)
        return response.status, json.loads(answer)


def events_of(content: bytes) -> Events:
    """Each event has a name and one line of data; comments are left out."""
    events = []
    for block in content.decode().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            (name, data) = lines
            assert name.startswith("event: ") and data.startswith("data: ")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
            assert events[-1][0] == events[-1][1]["type"]
    return events


def segments_of(server: SessionServer, session: OpenSession) -> int:
    """Number of segments of the sample; all of its turns were delivered."""

    def finish() -> int:
        before = len(session.conversation.turns)
        session.finish()
        assert len(session.conversation.turns) == before
        return len(session.conversation.to_trajectory(SampleRewards()).segments) or 1

    return server.call(finish)
