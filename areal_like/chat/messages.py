"""Messages in the form that chat templates expect, and the errors of those that cannot be rendered. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from areal_like.errors import ConfigError

_MAX_ERROR_CHARS = 300


def with_parsed_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as templates expect it: arguments of tool calls as objects, not as text.

    Calls whose arguments are not a JSON object, which some templates cannot render, become text.
    """
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    parsed, malformed = [], []
    for call in calls:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if isinstance(arguments, dict):
            parsed.append({**call, "function": {**function, "arguments": arguments}})
        else:
            malformed.append(f"{function['name']} {function['arguments']}".strip())
    message = {key: value for key, value in message.items() if key != "tool_calls"}
    if malformed:
        message["content"] = "\n".join([text for text in [message["content"]] if text] + malformed)
    return {**message, "tool_calls": parsed} if parsed else dict(message)


def parsed_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates expect them. Raises ConfigError for calls in another format."""
    try:
        return [with_parsed_arguments(message) for message in messages]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"tool_calls: want OpenAI's format ({error!r})") from error


def cannot_render(error: Exception) -> ConfigError:
    """The error for messages for which a chat template has raised this one."""
    reason = f"{type(error).__name__}: {str(error)[:_MAX_ERROR_CHARS]}"
    return ConfigError(f"the chat template cannot render these messages ({reason})")
