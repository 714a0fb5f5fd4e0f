"""Real sessions whose servers are killed: buffer, rollout servers and the agent's client, over sockets."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from areal_like.client.areal_like_client import ClaimedSession, SessionOverError, claim
from tests.support.agent_job import running_agent_job, sessions_url
from tests.support.rollout_harness import ServerProcess
from tests.support.waiting import HANG_LIMIT_S

REPLIES = ("one", "two", "three", "four")
"""Of one turn before each kill."""


def asked(session: ClaimedSession, messages: list[dict[str, Any]], *, is_again: bool = False) -> str:
    """One request to the model; the text of the reply. Raises HTTPError, or OSError without a response."""
    headers = {"Authorization": f"Bearer {session.api_key}", "Content-Type": "application/json"}
    headers |= {"x-stainless-retry-count": "1"} if is_again else {}
    body = json.dumps({"model": "policy", "messages": messages}).encode()
    request = urllib.request.Request(f"{session.base_url}/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=HANG_LIMIT_S) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def status_of(session: ClaimedSession, url: str, *, key: str = "") -> int:
    """The status of a heartbeat at another server."""
    path = session.base_url[session.base_url.index("/sessions/") :]
    headers = {"Authorization": f"Bearer {key or session.api_key}"}
    request = urllib.request.Request(f"{url}{path}/heartbeat", b"{}", headers)
    try:
        with urllib.request.urlopen(request, timeout=HANG_LIMIT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.long
def test_a_session_survives_kills_of_its_server(tmp_path: Path) -> None:
    """Starts two servers, and four more in place of those that it kills."""
    with running_agent_job(tmp_path, max_episodes=8) as job, contextlib.ExitStack() as stack:
        servers: dict[str, ServerProcess] = {"rollout-0": job.server}

        def start(name: str) -> None:
            servers[name] = ServerProcess(job.config, name=name)
            stack.callback(servers[name].close)

        start("rollout-1")
        urls = {name: sessions_url(server, name) for name, server in servers.items()}
        session = claim(job.url, wait_s=HANG_LIMIT_S)
        other = claim(urls["rollout-1"], wait_s=HANG_LIMIT_S)
        assert session is not None and other is not None
        assert status_of(session, urls["rollout-1"]) == 421, "its key is valid there, and it is elsewhere"
        assert status_of(session, urls["rollout-1"], key=other.api_key) == 401
        messages = [{"role": "user", "content": "go"}]
        texts: list[str] = []
        for turn, reply in enumerate(REPLIES):
            job.policy.texts = [reply]
            texts.append(asked(session, messages))
            holder = next(name for name, url in urls.items() if session.base_url.startswith(url))
            servers[holder].process.kill()
            servers[holder].process.wait()
            start(holder)
            urls[holder] = sessions_url(servers[holder], holder)
            found = session.find(list(urls.values()), wait_s=HANG_LIMIT_S)
            assert (found.id, found.api_key) == (session.id, session.api_key)
            session = found
            job.policy.texts = ["another reply"]
            assert asked(session, messages, is_again=True) == texts[-1], "the recorded turn"
            messages += [
                {"role": "assistant", "content": texts[-1]},
                {"role": "user", "content": f"tool {turn}"},
            ]
        assert texts == list(REPLIES)
        session.reward(0.25)
        assert session.end()
        trajectory = job.fetch(session.group)
        assert trajectory.num_turns == len(REPLIES) and not trajectory.segments and trajectory.reward == 0.25
        with pytest.raises(SessionOverError):
            session.find(list(urls.values()))
