"""The OpenAI Agents SDK as it is by default: the Responses API, stateless or with `previous_response_id`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from rollout_server.sessions.open_session import OpenSession
from tests.support.lazily import lazily
from tests.support.session_requests import segments_of
from tests.support.session_server import SessionServer

openai = lazily("openai", reason="needs openai")
agents = lazily("agents", reason="needs openai-agents")
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Tokyo"}}</tool_call>'


@pytest.fixture
def server() -> Iterator[SessionServer]:
    with SessionServer().serving() as serving:
        yield serving


def get_weather(city: str) -> str:
    """Returns the weather of a city."""
    return f"sunny in {city}"


async def run(server: SessionServer, session: OpenSession, *, stream: bool, **options: Any) -> Any:
    """The result of a run in the session."""
    agents.set_tracing_disabled(True)
    async with openai.AsyncOpenAI(base_url=server.base_url(session), api_key=session.api_key) as client:
        provider = agents.OpenAIProvider(openai_client=client)
        agent = agents.Agent(
            name="Assistant", instructions="Be short.", tools=[agents.function_tool(get_weather)]
        )
        options["run_config"] = agents.RunConfig(model_provider=provider)
        if not stream:
            return await agents.Runner.run(agent, "Tokyo?", **options)
        result = agents.Runner.run_streamed(agent, "Tokyo?", **options)
        async for _ in result.stream_events():
            pass
        return result


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refers", [False, True])
def test_a_run_is_one_segment(server: SessionServer, refers: bool, stream: bool) -> None:
    session = server.add()
    server.policy.texts = [f"<think>hm</think>Let me see.{CALL}", CALL + CALL, "It is sunny."]
    result = asyncio.run(run(server, session, stream=stream, auto_previous_response_id=refers))
    assert result.final_output == "It is sunny."
    assert server.renderer.decode(server.policy.prompts[-1]).count("sunny in Tokyo") == 3
    assert segments_of(server, session) == 1 and len(session.conversation.turns) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_ends_the_run(server: SessionServer, stream: bool) -> None:
    session = server.add(max_new_tokens=4)
    server.policy.texts = ["too long"]
    with pytest.raises(agents.ModelBehaviorError, match="incomplete"):
        asyncio.run(run(server, session, stream=stream))
    assert segments_of(server, session) == 1
