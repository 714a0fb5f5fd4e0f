"""An AssistantAgent of autogen-agentchat with the OpenAI client of autogen-ext.

run("completion" | "agent" | "reflection")

The client wants to be told what a model can do if it does not know its name.
"""

from __future__ import annotations

import asyncio
from typing import Any


async def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def run(mode: str) -> str:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelInfo
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info = ModelInfo(
        vision=False, function_calling=True, json_output=False, family="unknown", structured_output=False
    )
    options: dict[str, Any] = {
        "completion": {},
        "agent": {"tools": [get_weather], "max_tool_iterations": 10},
        "reflection": {"tools": [get_weather], "reflect_on_tool_use": True},
    }

    async def ask() -> str:
        client = OpenAIChatCompletionClient(model="policy", model_info=info)
        agent = AssistantAgent("assistant", client, **options[mode])
        result = await agent.run(task="Tokyo?")
        await client.close()
        return str(result.messages[-1].content)

    return asyncio.run(ask())
