"""Messages in one form, so that those that mean the same have the same digest. Pure.

Clients of a conversation send the whole list each time, and may have changed what means the same: a content
of null, a list of text parts, arguments of a tool call as an object, the reasoning left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

import msgpack

from areal_like.errors import EpisodeError
from rollout_server.environments.base import Message

_REASONING = "reasoning_content"


def canonical_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages in one form, as copies. Raises EpisodeError for what no template can render."""
    if not messages:
        raise EpisodeError("there is no message: a conversation needs at least one")
    return [_canonical(message, f"message {index}") for index, message in enumerate(_copied(list(messages)))]


def canonical_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The schemas as copies. Raises EpisodeError if they are no JSON objects."""
    copies = _copied(list(tools))
    if not all(isinstance(tool, dict) for tool in copies):
        raise EpisodeError(f"tools: want OpenAI function schemas, got {str(copies)[:200]}")
    return list(copies)


def prefix_digests(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """One digest for each message, of `tools` and the messages up to and with it, reasoning left out."""
    digest = hashlib.sha256(msgpack.packb(tools)).digest()
    digests = []
    for message in messages:
        # Sorted, as the order of the keys means nothing. Where it differs deeper inside, two messages that
        # mean the same have two digests, and the conversation begins a new segment.
        fields = sorted(_without_reasoning(message).items())
        digest = hashlib.sha256(digest + msgpack.packb(fields)).digest()
        digests.append(digest)
    return digests


def packed_bytes(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> int:
    """Size of all of it."""
    return len(msgpack.packb(messages)) + len(msgpack.packb(tools))


def is_same(messages: Sequence[Message], known: Sequence[Message]) -> bool:
    """True if the messages are the known ones; reasoning may be left out, but not changed."""
    return len(messages) == len(known) and all(
        ours == theirs or (_REASONING not in ours and ours == _without_reasoning(theirs))
        for ours, theirs in zip(messages, known, strict=True)
    )


def _without_reasoning(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {key: value for key, value in message.items() if key != _REASONING}


def _canonical(copy: Any, where: str) -> Message:
    if not isinstance(copy, dict) or not isinstance(copy.get("role"), str):
        raise EpisodeError(f"{where}: want an object with `role` and `content`, got {str(copy)[:200]}")
    copy = {key: value for key, value in copy.items() if value is not None}
    copy["content"] = _text(copy.get("content", ""), where)
    reasoning = _text(copy.pop("reasoning", copy.pop(_REASONING, "")), where)
    if reasoning:
        copy[_REASONING] = reasoning
    calls = copy.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            raise EpisodeError(f"{where}: tool_calls is no list")
        copy["tool_calls"] = [_canonical_call(call, where) for call in calls]
    return dict(copy)


def _canonical_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise EpisodeError(f"{where}: want tool calls with a function and its name, got {str(call)[:200]}")
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, default=repr)
    # Always in this order: clients have others, and the digests and some templates depend on it.
    named = {"name": function["name"], "arguments": arguments}
    return {
        "type": "function",
        **_others(call, ("function",)),
        "function": {**named, **_others(function, named)},
    }


def _others(fields: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    return {
        key: fields[key] for key in sorted(fields, key=str) if key not in known and fields[key] is not None
    }


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise EpisodeError(f"{where}: want text as content, got {str(content)[:200]}")


def _copied(values: list[Any]) -> list[Any]:
    try:
        # A tenth of the time of JSON; these are the types of JSON, and bytes, which no check lets pass.
        copies: list[Any] = msgpack.unpackb(msgpack.packb(values))
    except (TypeError, ValueError, OverflowError, UnicodeError) as error:
        raise EpisodeError(f"messages and tools: want the types of JSON ({error})") from error
    return copies
