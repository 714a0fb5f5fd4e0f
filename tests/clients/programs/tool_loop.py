"""Asks for the weather with a tool until the model says something else: one client each.

run("openai_chat" | "openai_responses" | "anthropic" | "agents" | ... (CLIENTS), "create" | "stream")

The clients are as they are by default: the base URLs and keys come from the environment.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable
from typing import Any

CITY = "Tokyo"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": PARAMETERS}
QUESTION: Any = [{"role": "user", "content": f"{CITY}?"}]


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def openai_chat(stream: bool) -> str:
    from openai import OpenAI

    messages = [*QUESTION]
    with OpenAI() as client:
        while True:
            options: Any = {"model": "policy", "messages": messages}
            options["tools"] = [{"type": "function", "function": FUNCTION}]
            if stream:
                with client.chat.completions.stream(**options) as events:
                    message: Any = events.get_final_completion().choices[0].message
            else:
                message = client.chat.completions.create(**options).choices[0].message
            if not message.tool_calls:
                return str(message.content)
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                content = get_weather(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


def openai_responses(stream: bool, *, refers: bool = False) -> str:
    from openai import OpenAI

    items, previous = [*QUESTION], None
    with OpenAI() as client:
        while True:
            options: Any = {"model": "policy", "input": items, "instructions": "Be short."}
            options |= {"tools": [{"type": "function", **FUNCTION}], "previous_response_id": previous}
            if stream:
                with client.responses.stream(**options) as events:
                    response: Any = events.get_final_response()
            else:
                response = client.responses.create(**options)
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                return str(response.output_text)
            outputs = [
                {
                    "type": "function_call_output",
                    "call_id": call.call_id,
                    "output": get_weather(**json.loads(call.arguments)),
                }
                for call in calls
            ]
            if refers:
                items, previous = outputs, response.id
            else:
                items += [*response.output, *outputs]


def anthropic(stream: bool) -> str:
    from anthropic import Anthropic, BadRequestError

    messages = [*QUESTION]
    tools = [{"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}]
    with Anthropic() as client:
        try:
            client.messages.create(
                model="policy", max_tokens=9, messages=[{"role": "user", "content": "x" * 40_000}]
            )
            raise AssertionError("no room for this prompt")
        except BadRequestError as error:
            assert "prompt is too long" in str(error), error
        while True:
            options: Any = {"model": "policy", "messages": messages, "tools": tools, "system": "Be short."}
            counted = client.messages.count_tokens(**options).input_tokens
            options["max_tokens"] = 256
            if stream:
                with client.messages.stream(**options) as events:
                    text = "".join(events.text_stream)
                    message = events.get_final_message()
            else:
                message = client.messages.create(**options)
                text = "".join(block.text for block in message.content if block.type == "text")
            assert counted == message.usage.input_tokens, (counted, message.usage)
            if message.stop_reason != "tool_use":
                assert message.stop_reason == "end_turn", message
                return text
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": get_weather(**block.input)}
                for block in message.content
                if block.type == "tool_use"
            ]
            messages.append({"role": "assistant", "content": message.content})
            messages.append({"role": "user", "content": results})


def agents(stream: bool) -> str:
    from agents import Agent, Runner, function_tool, set_tracing_disabled

    set_tracing_disabled(True)
    agent = Agent(name="Assistant", instructions="Be short.", tools=[function_tool(get_weather)])

    async def run() -> str:
        if not stream:
            return str((await Runner.run(agent, f"{CITY}?")).final_output)
        result = Runner.run_streamed(agent, f"{CITY}?")
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    return asyncio.run(run())


def pydantic(stream: bool, *, model: str) -> str:
    from pydantic_ai import Agent

    agent = Agent(model, instructions="Be short.", tools=[get_weather])

    async def read(_: Any, events: AsyncIterable[Any]) -> None:
        async for _event in events:
            pass

    # A handler makes it stream. `run_stream` takes text beside a call for the answer.
    handler = read if stream else None
    return str(asyncio.run(agent.run(f"{CITY}?", event_stream_handler=handler)).output)


def litellm_chat(stream: bool, *, model: str) -> str:
    import litellm

    messages = [*QUESTION]
    while True:
        options: Any = {"model": model, "messages": messages, "stream": stream}
        options["tools"] = [{"type": "function", "function": FUNCTION}]
        response: Any = litellm.completion(**options)
        if stream:
            response = litellm.stream_chunk_builder(list(response))
        message = response.choices[0].message
        if not message.tool_calls:
            return str(message.content)
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            content = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


def litellm_responses(stream: bool) -> str:
    import litellm

    items = [*QUESTION]
    while True:
        options: Any = {"model": "openai/policy", "input": items, "stream": stream}
        response: Any = litellm.responses(**options, tools=[{"type": "function", **FUNCTION}])
        if stream:
            *_, last = response
            response = last.response
        output = [item if isinstance(item, dict) else item.model_dump() for item in response.output]
        calls = [item for item in output if item["type"] == "function_call"]
        if not calls:
            return "".join(part["text"] for item in output for part in item["content"])
        items += output
        for call in calls:
            answer = get_weather(**json.loads(call["arguments"]))
            items.append({"type": "function_call_output", "call_id": call["call_id"], "output": answer})


CLIENTS = {
    "openai_chat": openai_chat,
    "openai_responses": openai_responses,
    "openai_previous": lambda stream: openai_responses(stream, refers=True),
    "anthropic": anthropic,
    "agents": agents,
    "pydantic_openai": lambda stream: pydantic(stream, model="openai:policy"),
    "pydantic_anthropic": lambda stream: pydantic(stream, model="anthropic:policy"),
    "litellm_openai": lambda stream: litellm_chat(stream, model="openai/policy"),
    "litellm_anthropic": lambda stream: litellm_chat(stream, model="anthropic/policy"),
    "litellm_responses": litellm_responses,
}


def run(client: str, mode: str) -> str:
    return CLIENTS[client](mode == "stream")
