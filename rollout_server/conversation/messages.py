"""Brings messages into a canonical form, so that equivalent messages have the same digest. Pure.

A client sends the whole conversation with each request, and may have changed its form without changing its
meaning: content as null or as a list of text parts, tool arguments as an object, reasoning left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import msgpack

from areal_like.errors import EpisodeError
from rollout_server.environments.base import Message

_REASONING = "reasoning_content"
_OF_A_REPLY = ("role", "content", _REASONING)
"""Fields of an assistant message that are compared, besides its tool calls. SDKs add others, which say
nothing to the policy (`refusal`, `annotations`, `parsed`, `provider_specific_fields`)."""
_LARGEST_EXACT = 1 << 53


def canonical_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Returns copies in the canonical form. Raises EpisodeError for messages that no template can render."""
    if not messages:
        raise EpisodeError("there is no message: a conversation needs at least one")
    return [_canonical(message, f"message {index}") for index, message in enumerate(_copied(list(messages)))]


def canonical_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns copies of the schemas. Raises EpisodeError if they are not JSON objects."""
    copies = _copied(list(tools))
    if not all(isinstance(tool, dict) for tool in copies):
        raise EpisodeError(f"tools: want OpenAI function schemas, got {str(copies)[:200]}")
    return list(copies)


def comparable(messages: Sequence[Message]) -> list[Message]:
    """Returns canonical messages in a form in which equivalent messages are equal. For comparison only.

    SDKs rewrite tool calls: they change the whitespace and key order of arguments, replace ids, add fields,
    and add the tool's name to its result. Here ids are replaced by the number of the call, arguments by their
    parsed value, and an assistant message has no other fields than those that the policy wrote.
    """
    calls: dict[Any, tuple[int, str]] = {}
    forms = []
    num_calls = 0
    for message in messages:
        form = dict(message)
        if message["role"] == "assistant":
            form = {name: message[name] for name in _OF_A_REPLY if name in message}
        if "tool_calls" in message:
            form["tool_calls"] = []
            for call in message["tool_calls"]:
                function = call["function"]
                if isinstance(call.get("id"), str):
                    calls[call["id"]] = num_calls, function["name"]
                parsed = {"name": function["name"], "arguments": _parsed(function["arguments"])}
                form["tool_calls"].append({"id": num_calls, "function": parsed})
                num_calls += 1
        if message["role"] == "tool" and (id := message.get("tool_call_id")) in calls:
            form["tool_call_id"], name = calls[id]
            form.setdefault("name", name)
        forms.append(form)
    return forms


def with_ids_of(
    known: Sequence[Message], messages: Sequence[Message], new: Sequence[Message]
) -> list[Message]:
    """Returns the new messages with the tool call ids of `known`.

    `messages`: the client's version of the known messages, possibly with other ids.
    """
    ids = {
        theirs.get("id"): ours.get("id")
        for message, other in zip(known, messages, strict=True)
        for ours, theirs in zip(message.get("tool_calls", ()), other.get("tool_calls", ()), strict=True)
        if "id" in ours and "id" in theirs
    }
    return [
        {**message, "tool_call_id": ids.get(message["tool_call_id"], message["tool_call_id"])}
        if message["role"] == "tool" and isinstance(message.get("tool_call_id"), str)
        else message
        for message in new
    ]


def prefix_digests(forms: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Returns a digest for each message, over `tools` and all messages up to and including it, without
    reasoning.

    `forms`: the result of `comparable`.
    """
    digest = hashlib.sha256(msgpack.packb(tools)).digest()
    digests = []
    for form in forms:
        # Sorted, because the order of keys has no meaning.
        fields = sorted(_without_reasoning(form).items())
        digest = hashlib.sha256(digest + msgpack.packb(fields)).digest()
        digests.append(digest)
    return digests


def packed_bytes(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> int:
    """Returns the packed size of the messages and tools, in bytes."""
    return len(msgpack.packb(messages)) + len(msgpack.packb(tools))


def is_same(messages: Sequence[Message], known: Sequence[Message]) -> bool:
    """True if `messages` equal `known`; reasoning may be left out, but not changed.

    Both are results of `comparable`.
    """
    return len(messages) == len(known) and all(
        ours == theirs or (_REASONING not in ours and ours == _without_reasoning(theirs))
        for ours, theirs in zip(messages, known, strict=True)
    )


def _without_reasoning(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {key: value for key, value in message.items() if key != _REASONING}


def _parsed(arguments: str) -> str:
    """Returns the arguments of a call as normalized JSON text; none at all are those of `{}`."""
    try:
        value = json.loads(
            arguments.strip() or "{}",
            parse_float=_number,
            parse_int=_number,
            parse_constant=str,
        )
        return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> float | int | str:
    """Parses a number as JavaScript does, which writes 1.0 as 1 and knows no integers above 2^53. One that is
    not finite stays a text, as a client of Anthropic's API gets it."""
    value = float(text)
    if not math.isfinite(value):
        return text
    if value.is_integer() and abs(value) <= _LARGEST_EXACT:
        return int(value)
    return value


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
            raise EpisodeError(f"{where}: tool_calls is not a list")
        copy["tool_calls"] = [_canonical_call(call, where) for call in calls]
    return dict(copy)


def _canonical_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise EpisodeError(f"{where}: want tool calls with a function and its name, got {str(call)[:200]}")
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, default=repr)
    # Always in this order: clients use different ones, and the digests and some templates depend on it.
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
        # Ten times faster than JSON, with the same types and bytes, which the checks refuse.
        copies: list[Any] = msgpack.unpackb(msgpack.packb(values))
    except (TypeError, ValueError, OverflowError, UnicodeError) as error:
        raise EpisodeError(f"messages and tools: want the types of JSON ({error})") from error
    return copies
