"""The data exchanged between the server and an environment's process, and the checks of what comes back.

The process runs a task's code on text that the policy wrote, so nothing that it sends is trusted: messages
may contain only JSON types, numbers must be finite, and sizes are bounded. Pure.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Awaitable, Sequence
from typing import Any

from areal_like.errors import EpisodeError
from areal_like.trajectory import LARGEST_METRIC, LARGEST_REWARD, FinishReason
from areal_like.wire.records import MAX_LABEL_CHARS
from rollout_server.environments.base import Message, Reply, Step, ToolCall

MAX_RESULT_BYTES = 4 << 20
"""Maximum size of a result from an environment. Far more than any context holds, and unpacked within
milliseconds."""
_MAX_DEPTH = 32
_MAX_METRICS = 64
_MAX_NAME_CHARS = 64


def reply_fields(reply: Reply) -> list[Any]:
    """Returns a reply as the values of one frame."""
    calls = [[call.id, call.name, call.arguments] for call in reply.tool_calls]
    return [reply.text, reply.raw_text, reply.reasoning, calls, reply.finish_reason.value, reply.num_tokens]


def reply_of(fields: Sequence[Any]) -> Reply:
    """Builds a reply from the output of `reply_fields`."""
    text, raw_text, reasoning, calls, finish_reason, num_tokens = fields
    return Reply(
        text=text,
        raw_text=raw_text,
        reasoning=reasoning,
        tool_calls=tuple(
            ToolCall(id=call, name=name, arguments=arguments) for call, name, arguments in calls
        ),
        finish_reason=FinishReason(finish_reason),
        num_tokens=num_tokens,
    )


def awaitable(returned: Any, *, call: str) -> Awaitable[Any]:
    """Returns `returned`, a method's result. Raises EpisodeError if the method is not `async def`."""
    if not isinstance(returned, Awaitable):
        raise EpisodeError(f"{call}() returned {type(returned).__name__}: write it as `async def {call}`")
    return returned


def step_fields(step: Any) -> list[Any]:
    """Returns a step as the values of one frame. Raises EpisodeError if it is not a Step."""
    if not isinstance(step, Step):
        raise EpisodeError(f"step() returned {type(step).__name__}: return a Step")
    metrics = {str(name): _number(value, name=name) for name, value in step.metrics.items()}
    return [list(step.messages), _number(step.reward, name="reward"), bool(step.done), metrics]


def checked_start(value: Any) -> tuple[list[Message], list[dict[str, Any]]]:
    """Returns the first messages and the tools. Raises EpisodeError, with advice, if they are invalid."""
    messages, tools = value if _is_list(value, length=2) else (None, None)
    if not messages:
        raise EpisodeError("reset() returned no messages: return those that the policy reads first")
    _check_messages(messages, call="reset()")
    if not isinstance(tools, list):
        raise EpisodeError("the environment's tools must be a list of OpenAI function schemas")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise EpisodeError(
                f"the tool {tool!r:.100} is not an OpenAI function schema: "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
        _check_json(tool, name="a tool")
    return messages, tools


def checked_label(label: Any) -> str:
    """Returns the label of the example. Raises EpisodeError if it is invalid."""
    if not isinstance(label, str) or len(label) > MAX_LABEL_CHARS or not label.isprintable():
        raise EpisodeError("the environment's process sent no valid label")
    return label


def checked_step(value: Any) -> Step:
    """Returns the environment's response to a turn. Raises EpisodeError, with advice, if it is invalid."""
    messages, reward, done, metrics = value if _is_list(value, length=4) else (None, None, None, None)
    if not isinstance(done, bool) or not isinstance(metrics, dict):
        raise EpisodeError("the environment's process sent no valid step")
    if messages:
        _check_messages(messages, call="step()")
    elif not done:
        raise EpisodeError(
            "step() returned done=False without messages: "
            "return the messages that the policy reads before its next turn, or done=True"
        )
    checked = {
        name: _bounded(number, name=f"the metric {name!r:.100}", largest=LARGEST_METRIC)
        for name, number in metrics.items()
    }
    if len(checked) > _MAX_METRICS or any(len(name) > _MAX_NAME_CHARS for name in checked):
        raise EpisodeError(
            f"step() returned {len(checked)} metrics: "
            f"return at most {_MAX_METRICS}, with names of at most {_MAX_NAME_CHARS} characters"
        )
    return Step(
        messages=messages or [],
        reward=_bounded(reward, name="the reward", largest=LARGEST_REWARD),
        done=done,
        metrics=checked,
    )


def _check_messages(messages: Any, *, call: str) -> None:
    if not isinstance(messages, list):
        raise EpisodeError(f"{call} returned no list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise EpisodeError(
                f"{call} returned the message {message!r:.100}: "
                'a message is {"role": "user" or "tool" or ..., "content": ...}'
            )
        content = message.get("content")
        if not (isinstance(content, str | list) or (content is None and "tool_calls" in message)):
            raise EpisodeError(f"{call} returned a message whose content is {content!r:.100}: use a text")
        for name, part in message.items():
            if not isinstance(part, str):
                _check_json(part, name=f"{call} returned a message whose {name!r:.100}")


def _check_json(value: Any, *, name: str, depth: int = 0) -> None:
    """Refuses bytes, numbers that are not finite, and deep nesting. (Keys are strings: see `unpack`.)"""
    if isinstance(value, dict):
        parts: Sequence[Any] = [*value, *value.values()]
    elif isinstance(value, list):
        parts = value
    elif value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return
    else:
        raise EpisodeError(f"{name} holds {value!r:.100}: use JSON values")
    if depth == _MAX_DEPTH:
        raise EpisodeError(f"{name} is nested more than {_MAX_DEPTH} deep")
    for part in parts:
        _check_json(part, name=name, depth=depth + 1)


def _number(value: Any, *, name: str) -> float:
    if callable(item := getattr(value, "item", None)):
        value = item()  # numpy and torch scalars
    if not isinstance(value, numbers.Real):
        raise EpisodeError(f"step() returned {name}={value!r:.100}: return a number")
    return float(value)


def _bounded(value: Any, *, name: str, largest: float) -> float:
    if not isinstance(value, int | float) or not abs(value) <= largest:  # also if it is NaN
        raise EpisodeError(
            f"step() returned {name} {value!r:.100}: return a finite number of at most {largest:.4g} in size"
        )
    return float(value)


def _is_list(value: Any, *, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
