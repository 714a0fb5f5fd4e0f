"""benchmarks/outside_agent.py without its server."""

from __future__ import annotations

import asyncio

import pytest

from areal_like.client.areal_like_client import ClaimedSession, UnreachableError
from benchmarks import outside_agent
from tests.support.ports import held_port


def test_a_lost_server_is_no_mistake_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample gets no reward, not even if its server is back by then."""
    posted: list[float] = []
    monkeypatch.setattr(ClaimedSession, "reward", lambda self, value: posted.append(value))
    with held_port() as port:
        session = ClaimedSession(
            id="1",
            base_url=f"http://127.0.0.1:{port}/sessions/1/v1",
            api_key="k",
            example={"prompt": "1+1", "answer": "2"},
            group=1,
            sample=0,
            deadline_s=None,
            idle_timeout_s=60.0,
        )
        with pytest.raises(UnreachableError):
            asyncio.run(outside_agent.solve(session, api="messages"))
    assert not posted
