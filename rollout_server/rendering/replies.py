"""Splits the text of a reply into reasoning, text and tool calls.

    [<think> reasoning </think>] text [<tool_call> body </tool_call> text]*

The default body is that of Hermes and Qwen: `{"name": "add", "arguments": {"a": 1}}`. No text raises an
exception: a malformed call keeps its raw text, so that an environment can tell the policy what is wrong with
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from rollout_server.environments.base import ToolCall
from rollout_server.rendering.base import ParsedReply

_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')


ParseCall = Callable[[str], tuple[str, str]]
"""Parses the text between a call's markers into name and arguments."""


@dataclass(frozen=True, kw_only=True)
class Markers:
    """The markers around the parts of a reply."""

    reasoning_begin: str = "<think>"
    reasoning_end: str = "</think>"
    call_begin: str = "<tool_call>"
    call_end: str = "</tool_call>"

    @property
    def all(self) -> tuple[str, ...]:
        return self.reasoning_begin, self.reasoning_end, self.call_begin, self.call_end


def parse_json_call(body: str) -> tuple[str, str]:
    """Parses a call that is a JSON object with `name` and `arguments`; returns them, the latter as JSON text.

    For any other body, returns the name if it can be read, else an empty one, and the body as arguments.
    """
    try:
        call = json.loads(body)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = _NAME.search(body)
        return found.group(1) if found else "", body
    if not isinstance(name, str):
        return "", body
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def split_reply(
    text: str,
    *,
    markers: Markers,
    parse_call: ParseCall | None = parse_json_call,
    starts_in_reasoning: bool = False,
) -> ParsedReply:
    """Splits a reply, given without its end-of-turn token.

    `parse_call`: None leaves calls in the text. `starts_in_reasoning`: the prompt ended with the marker that
    starts the reasoning. If the reasoning does not end, the text is empty; a call that does not end is
    malformed.
    """
    reasoning = ""
    begin = text.lstrip()
    if starts_in_reasoning or begin.startswith(markers.reasoning_begin):
        inside = begin.removeprefix(markers.reasoning_begin)
        reasoning, _, text = inside.partition(markers.reasoning_end)
        reasoning, text = reasoning.strip("\n"), text.lstrip("\n")
    if parse_call is None:
        return ParsedReply(text=text, reasoning=reasoning)
    text, *rest = text.split(markers.call_begin)
    calls = []
    for part in rest:
        body, end, after = part.partition(markers.call_end)
        name, arguments = parse_call(body.strip()) if end else ("", body)
        calls.append(ToolCall(id="", name=name, arguments=arguments))
        text += after
    return ParsedReply(text=text.strip() if calls else text, reasoning=reasoning, tool_calls=tuple(calls))
