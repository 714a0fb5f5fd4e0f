"""Clients and frameworks as they are by default, each in a session of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.programs.tool_loop import CLIENTS
from tests.support.session_requests import segments_of
from tests.support.session_server import SessionServer
from tests.support.waiting import HANG_LIMIT_S

PROGRAM = Path(__file__).parent / "programs" / "tool_loop.py"
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Tokyo"}}</tool_call>'


@pytest.mark.parametrize("mode", ["create", "stream"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_tool_loop_is_one_segment(
    interpreter: str, server: SessionServer, tmp_path: Path, client: str, mode: str
) -> None:
    session = server.add()
    server.policy.texts = [f"<think>hm</think>{CALL}", CALL + CALL, "It is sunny."]
    base_url = server.base_url(session)
    variables = {
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_BASE": base_url,
        "OPENAI_API_KEY": session.api_key,
        "ANTHROPIC_BASE_URL": base_url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": session.api_key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "no_proxy": "127.0.0.1",
    }
    run = subprocess.run(
        [interpreter, PROGRAM, client, mode],
        env=variables,
        capture_output=True,
        text=True,
        timeout=HANG_LIMIT_S,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == "It is sunny."
    assert server.renderer.decode(server.policy.prompts[-1]).count("sunny in Tokyo") == 3
    assert segments_of(server, session) == 1 and len(session.conversation.turns) == 3
    assert not server.book.num_refused.keys() - {400}
