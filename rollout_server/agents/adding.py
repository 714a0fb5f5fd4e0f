"""Adds numbers with an agent of the OpenAI Agents SDK: the SDK's quick start, with the session as the model.

It sets only the options that any client of a non-OpenAI server has to set: the base URL, the key, and no
tracing, because traces would be sent to OpenAI. It uses chat completions, or the SDK's default, the Responses
API. One HTTP client serves all sessions of a process, because creating one takes 25 ms.
"""

from __future__ import annotations

from agents import (
    Agent,
    AgentsException,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from rollout_server.agents.base import Session

set_tracing_disabled(True)

CLIENT = AsyncOpenAI(base_url="http://127.0.0.1", api_key="of the session")
"""Belongs to the event loop that uses it first."""


def _add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


_ADD = function_tool(_add, name_override="add")


async def add_up(terms: str, session: Session, *, uses_responses: bool = False) -> str:
    """Returns the agent's output for `37+85+12`; empty after a mistake that the SDK does not tolerate.

    Raises openai.APIError if the session refuses a request.
    """
    client = CLIENT.with_options(base_url=session.base_url, api_key=session.api_key)
    model = (
        OpenAIResponsesModel("policy", client)
        if uses_responses
        else OpenAIChatCompletionsModel("policy", client)
    )
    agent = Agent(name="Adder", tools=[_ADD], model=model)
    try:
        result = await Runner.run(agent, terms)
    except AgentsException:  # too many turns, a call of a tool that does not exist
        return ""
    return str(result.final_output)
