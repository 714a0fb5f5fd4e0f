"""The conversation of an agent in each API of a session, without a client's package. Pure.

    conversation = CONVERSATIONS["messages"]("37+85", tools=[ADD])
    response = post(f"{base_url}/{conversation.route}", conversation.body())
    reply = conversation.take(response)           # from here on a part of the conversation
    conversation.say("and 12?")                   # or, for each call: conversation.give(call, "122")

Each request has the whole conversation. The formats are those that the packages `openai` and `anthropic` send
(tests/benchmarks/test_conversations.py).
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

_MODEL = "policy"
_MAX_TOKENS = 1024
"""Messages needs a limit; that of the job is smaller."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model said in one turn."""

    id: str
    """Of the completion."""
    text: str
    calls: Sequence[Call]


class Conversation(ABC):
    """The messages of one conversation, in the format of one API."""

    title: ClassVar[str]
    """The API, for tables."""
    route: ClassVar[str]
    """Of the API, relative to a session's base URL for OpenAI's clients."""

    def __init__(self, prompt: str, *, tools: Sequence[Tool] = ()) -> None:
        self._items: list[dict[str, Any]] = []
        self._tools = [self._described(tool) for tool in tools]
        self.say(prompt)

    def body(self) -> dict[str, Any]:
        """The body of the next request."""
        return self._body() | ({"tools": self._tools} if self._tools else {})

    def say(self, text: str) -> None:
        """Adds a message of the user."""
        self._items.append({"role": "user", "content": text})

    @abstractmethod
    def take(self, response: Mapping[str, Any]) -> Reply:
        """Adds the response to the conversation."""

    @abstractmethod
    def give(self, call: Call, result: str) -> None:
        """Adds the result of a call. All calls of a reply need one before the next request."""

    @abstractmethod
    def _body(self) -> dict[str, Any]:
        """The body without tools."""

    @abstractmethod
    def _described(self, tool: Tool) -> dict[str, Any]:
        """A tool in the API's format."""


class ChatConversation(Conversation):
    """OpenAI's chat completions."""

    title = "chat completions"
    route = "chat/completions"

    def take(self, response: Mapping[str, Any]) -> Reply:
        message = response["choices"][0]["message"]
        self._items.append(message)
        calls = [
            Call(
                id=call["id"],
                name=call["function"]["name"],
                arguments=json.loads(call["function"]["arguments"]),
            )
            for call in message.get("tool_calls", ())
        ]
        return Reply(id=response["id"], text=message["content"] or "", calls=calls)

    def give(self, call: Call, result: str) -> None:
        self._items.append({"role": "tool", "tool_call_id": call.id, "content": result})

    def _body(self) -> dict[str, Any]:
        return {"model": _MODEL, "messages": self._items}

    def _described(self, tool: Tool) -> dict[str, Any]:
        return {"type": "function", "function": vars(tool)}


class ResponsesConversation(Conversation):
    """OpenAI's Responses API, without references to stored responses."""

    title = "Responses"
    route = "responses"

    def take(self, response: Mapping[str, Any]) -> Reply:
        output = response["output"]
        self._items += output
        texts = [
            part["text"]
            for item in output
            if item["type"] == "message"
            for part in item["content"]
            if part["type"] == "output_text"
        ]
        calls = [
            Call(id=item["call_id"], name=item["name"], arguments=json.loads(item["arguments"]))
            for item in output
            if item["type"] == "function_call"
        ]
        return Reply(id=response["id"], text="".join(texts), calls=calls)

    def give(self, call: Call, result: str) -> None:
        self._items.append({"type": "function_call_output", "call_id": call.id, "output": result})

    def _body(self) -> dict[str, Any]:
        return {"model": _MODEL, "input": self._items}

    def _described(self, tool: Tool) -> dict[str, Any]:
        return {"type": "function", **vars(tool)}


class MessagesConversation(Conversation):
    """Anthropic's Messages."""

    title = "Messages"
    route = "messages"

    def take(self, response: Mapping[str, Any]) -> Reply:
        blocks = response["content"]
        self._items.append({"role": "assistant", "content": blocks})
        calls = [
            Call(id=block["id"], name=block["name"], arguments=block["input"])
            for block in blocks
            if block["type"] == "tool_use"
        ]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        return Reply(id=response["id"], text=text, calls=calls)

    def give(self, call: Call, result: str) -> None:
        block = {"type": "tool_result", "tool_use_id": call.id, "content": result}
        if self._items[-1]["role"] == "user":  # the results of a reply are one message
            self._items[-1]["content"].append(block)
        else:
            self._items.append({"role": "user", "content": [block]})

    def _body(self) -> dict[str, Any]:
        return {"model": _MODEL, "max_tokens": _MAX_TOKENS, "messages": self._items}

    def _described(self, tool: Tool) -> dict[str, Any]:
        return {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}


CONVERSATIONS: Mapping[str, type[Conversation]] = {
    "chat": ChatConversation,
    "responses": ResponsesConversation,
    "messages": MessagesConversation,
}
"""The APIs by the names that the benchmarks give them."""
ADD = Tool(
    name="add",
    description="Adds two whole numbers.",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
)
"""The calculator of the tool job."""


def added(call: Call) -> str:
    """The result of a call of ADD. Raises ValueError for another tool, or arguments that ADD does not
    accept."""
    a, b = call.arguments.get("a"), call.arguments.get("b")
    if call.name != ADD.name or len(call.arguments) != 2 or type(a) is not int or type(b) is not int:
        raise ValueError(f"{call.name}({dict(call.arguments)}) has no result")
    return str(a + b)


def apis_of(text: str) -> list[str]:
    """Parses `chat,responses,messages`, an option. Raises ArgumentTypeError for another name."""
    apis = text.split(",")
    if unknown := [api for api in apis if api not in CONVERSATIONS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: the APIs are {', '.join(CONVERSATIONS)}")
    return apis
