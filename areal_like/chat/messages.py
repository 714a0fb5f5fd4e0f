"""Messages in the form that chat templates expect. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


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
