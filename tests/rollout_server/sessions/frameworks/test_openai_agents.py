"""The OpenAI Agents SDK against sessions: its documentation's examples, with the base URL and the key set.

Chat completions in place of the Responses API, and no tracing, are what the documentation says for servers
other than OpenAI's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import BaseModel

from tests.support.engine_harness import Engine
from tests.support.framework_sessions import FrameworkSession, framework_session
from tests.support.lazily import lazily
from tests.support.scripted_policy import tool_call

agents = lazily("agents", reason="needs openai-agents")
openai, responses, shared = lazily("openai"), lazily("openai.types.responses"), lazily("openai.types.shared")


@pytest.fixture(scope="module", autouse=True)
def without_tracing() -> None:
    agents.set_tracing_disabled(True)


@asynccontextmanager
async def sampling(engine: Engine, *replies: str) -> AsyncIterator[tuple[FrameworkSession, Any]]:
    """A session, and the SDK's model for it."""
    async with (
        framework_session(engine, *replies) as session,
        openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client,
    ):
        yield session, agents.OpenAIChatCompletionsModel(model="policy", openai_client=client)


@pytest.fixture
def weather() -> Any:
    def get_weather(city: str) -> str:
        """Returns the weather of a city."""
        return f"The weather in {city} is sunny."

    return agents.function_tool(get_weather)


def test_an_agent_without_tools(engine: Engine, reference: Any) -> None:
    async def scenario() -> None:
        async with sampling(engine, "Code within the code,") as (session, model):
            agent = agents.Agent(name="Assistant", instructions="You are a helpful assistant", model=model)
            result = await agents.Runner.run(agent, "Write a haiku about recursion in programming.")
            assert result.final_output == "Code within the code,"
            session.check_segments([0], reference=reference)

    asyncio.run(scenario())


def test_a_tool_is_called_and_answered(engine: Engine, reference: Any, weather: Any) -> None:
    async def scenario() -> None:
        async with sampling(engine, tool_call("get_weather", city="Tokyo"), "It is sunny.") as (
            session,
            model,
        ):
            agent = agents.Agent(
                name="Hello world",
                instructions="You are a helpful agent.",
                tools=[weather],
                model=model,
            )
            result = await agents.Runner.run(agent, input="What's the weather in Tokyo?")
            assert result.final_output == "It is sunny."
            assert "The weather in Tokyo is sunny." in session.prompts[1]
            session.check_segments([0, 1], reference=reference)

    asyncio.run(scenario())


def test_a_run_is_streamed(engine: Engine, reference: Any, weather: Any) -> None:
    async def scenario() -> None:
        replies = ("Let me see." + tool_call("get_weather", city="Tokyo"), "It is sunny.")
        async with sampling(engine, *replies) as (session, model):
            agent = agents.Agent(name="Hello world", tools=[weather], model=model)
            result = agents.Runner.run_streamed(agent, input="What's the weather in Tokyo?")
            said, items = "", []
            async for event in result.stream_events():
                if event.type == "raw_response_event" and isinstance(
                    event.data, responses.ResponseTextDeltaEvent
                ):
                    said += event.data.delta
                elif event.type == "run_item_stream_event":
                    items.append(event.item.type)
            assert said == "Let me see.It is sunny." and result.final_output == "It is sunny."
            assert items == [
                "message_output_item",
                "tool_call_item",
                "tool_call_output_item",
                "message_output_item",
            ]
            session.check_segments([0, 1], reference=reference)

    asyncio.run(scenario())


def test_tools_are_called_in_parallel(engine: Engine, reference: Any, weather: Any) -> None:
    async def scenario() -> None:
        both = tool_call("get_weather", city="Tokyo") + tool_call("get_weather", city="Lima")
        async with sampling(engine, both, "Sunny in both.") as (session, model):
            agent = agents.Agent(
                name="Hello world",
                tools=[weather],
                model=model,
                model_settings=agents.ModelSettings(
                    parallel_tool_calls=True, tool_choice="required", temperature=0.3, top_p=0.5, store=True,
                    reasoning=shared.Reasoning(effort="low"), max_tokens=200, include_usage=True,
                ),
            )  # fmt: skip
            result = await agents.Runner.run(agent, input="Tokyo or Lima?")
            assert result.final_output == "Sunny in both."
            assert "in Tokyo is sunny" in session.prompts[1] and "in Lima is sunny" in session.prompts[1]
            session.check_segments([0, 1], reference=reference)

    asyncio.run(scenario())


def test_a_run_hits_its_maximum_of_turns(engine: Engine, reference: Any, weather: Any) -> None:
    async def scenario() -> None:
        async with sampling(engine, *3 * [tool_call("get_weather", city="Tokyo")]) as (session, model):
            agent = agents.Agent(name="Hello world", tools=[weather], model=model)
            with pytest.raises(agents.MaxTurnsExceeded):
                await agents.Runner.run(agent, input="Again and again.", max_turns=3)
            session.check_segments([0, 1, 2], reference=reference)

    asyncio.run(scenario())


def test_a_handoff_has_other_instructions_and_a_new_segment(engine: Engine, reference: Any) -> None:
    async def scenario() -> None:
        async with sampling(engine, tool_call("transfer_to_spanish_agent"), "Hola.", "De nada.") as (
            session,
            model,
        ):
            spanish = agents.Agent(name="Spanish agent", instructions="You only speak Spanish.", model=model)
            triage = agents.Agent(
                name="Triage agent",
                instructions="Handoff to the appropriate agent based on the language of the request.",
                handoffs=[spanish],
                model=model,
            )
            result = await agents.Runner.run(triage, input="Hola!")
            assert result.final_output == "Hola." and result.last_agent is spanish
            again = [*result.to_input_list(), {"role": "user", "content": "Gracias!"}]
            result = await agents.Runner.run(spanish, again)
            assert result.final_output == "De nada."
            session.check_segments([0], [1, 2], reference=reference)

    asyncio.run(scenario())


def test_an_agent_as_a_tool_is_a_segment_of_its_own(engine: Engine, reference: Any) -> None:
    async def scenario() -> None:
        replies = (tool_call("translate_to_spanish", input="Hello"), "Hola", "In Spanish it is Hola.")
        async with sampling(engine, *replies) as (session, model):
            spanish = agents.Agent(
                name="Spanish agent",
                instructions="You translate the user's message to Spanish",
                model=model,
            )
            orchestrator = agents.Agent(
                name="orchestrator_agent",
                instructions="You are a translation agent. You use the tools given to you to translate.",
                tools=[
                    spanish.as_tool(
                        tool_name="translate_to_spanish",
                        tool_description="Translate the user's message to Spanish",
                    )
                ],
                model=model,
            )
            result = await agents.Runner.run(orchestrator, input="Say 'Hello' in Spanish.")
            assert result.final_output == "In Spanish it is Hola."
            session.check_segments([1], [0, 2], reference=reference)

    asyncio.run(scenario())


def test_output_of_a_type_is_parsed(engine: Engine, reference: Any) -> None:
    class CalendarEvent(BaseModel):
        name: str
        participants: list[str]

    async def scenario() -> None:
        async with sampling(engine, '{"name": "tea", "participants": ["Ada"]}', "no JSON at all") as (
            session,
            model,
        ):
            agent = agents.Agent(
                name="Calendar extractor",
                instructions="Extract calendar events from text",
                output_type=CalendarEvent,
                model=model,
            )
            result = await agents.Runner.run(agent, "Tea with Ada.")
            assert result.final_output == CalendarEvent(name="tea", participants=["Ada"])
            # The format is not enforced: the log-probs of a constrained answer are not the policy's.
            with pytest.raises(agents.ModelBehaviorError):
                await agents.Runner.run(agent, "Tea with Bob.")
            session.check_segments([0], [1], reference=reference)

    asyncio.run(scenario())


def test_a_session_of_the_sdk_remembers_earlier_runs(engine: Engine, reference: Any) -> None:
    async def scenario() -> None:
        async with sampling(engine, "San Francisco", "California") as (session, model):
            agent = agents.Agent(name="Assistant", instructions="Reply concisely.", model=model)
            memory = agents.SQLiteSession("conversation_123")
            try:
                for question, answer in (
                    ("In which city is the bridge?", "San Francisco"),
                    ("And the state?", "California"),
                ):
                    result = await agents.Runner.run(agent, question, session=memory)
                    assert result.final_output == answer
            finally:
                memory.close()
            session.check_segments([0, 1], reference=reference)

    asyncio.run(scenario())


def test_a_run_is_told_that_its_sample_is_not_wanted(engine: Engine) -> None:
    async def scenario() -> None:
        async with sampling(engine, "never said") as (session, model):
            agent = agents.Agent(name="Assistant", model=model)
            session.session.close("the server is draining")
            with pytest.raises(openai.APIStatusError, match="the server is draining") as caught:
                await agents.Runner.run(agent, "Hello")
            assert caught.value.status_code == 410 and session.policy.num_requests == 0

    asyncio.run(scenario())
