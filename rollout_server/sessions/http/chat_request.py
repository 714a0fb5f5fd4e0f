"""Checks the body of /v1/chat/completions and brings it into the form in which a conversation knows messages.

The sampling is the job's, else the log-probs would not be those of the policy that is trained: temperature
and the like are accepted without effect, and so are formats of the answer and demands for a certain tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from areal_like.errors import UserError
from rollout_server.engine.http.bodies import flag, number
from rollout_server.engine.http.chat_request import MAX_MESSAGES, MAX_STOP_CHARS, MAX_STOPS
from rollout_server.sessions.http.errors import ParamError

MAX_TOOLS = 1024
FORCED = (
    "temperature", "top_p", "top_k", "min_p", "n", "best_of", "seed", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logit_bias", "response_format", "parallel_tool_calls",
    "reasoning_effort", "prediction", "min_tokens", "ignore_eos", "stop_token_ids", "top_logprobs",
    "chat_template_kwargs", "verbosity",
)  # fmt: skip
"""Fields without effect that change the answer elsewhere."""
_REFUSED = {
    "functions": "use tools",
    "function_call": "use tools and tool_choice",
    "audio": "the policy writes text",
    "web_search_options": "the policy has the tools of the request only",
}
_EMPTY_FIELDS = ("refusal", "annotations", "audio", "function_call")
"""Of an assistant message: what an SDK adds to it without a meaning."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What all requests to the model have in common."""

    model: str
    stop: tuple[str, ...]
    """Texts that end the answer."""
    max_new_tokens: int | None
    stream: bool
    include_usage: bool
    """The stream has a last chunk with the numbers of tokens."""
    return_token_ids: bool
    """vLLM's extension: `prompt_token_ids` and `token_ids`."""
    ignored: tuple[str, ...]
    """Fields of `FORCED` in the body."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked body."""

    options: RequestOptions
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    logprobs: bool


def parse_options(body: Mapping[str, Any], *, default_model: str) -> RequestOptions:
    """Checks the common fields. Raises UserError for the first error."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ParamError("model must be a text", param="model")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, Mapping):
        raise ParamError("stream_options must be an object", param="stream_options")
    limits = [
        int(number(body, name, 0, low=1, high=1 << 30, integer=True))
        for name in ("max_tokens", "max_completion_tokens")
        if body.get(name) is not None
    ]
    return RequestOptions(
        model=model or default_model,
        stop=_stops(body.get("stop")),
        max_new_tokens=min(limits, default=None),
        stream=flag(body, "stream"),
        include_usage=flag(stream_options, "include_usage"),
        return_token_ids=flag(body, "return_token_ids"),
        ignored=tuple(name for name in FORCED if body.get(name) is not None),
    )


def parse_chat(body: Mapping[str, Any], *, default_model: str) -> ChatRequest:
    """Checks a body. Raises UserError for the first error."""
    for name, instead in _REFUSED.items():
        if body.get(name):
            raise ParamError(f"{name} is not supported: {instead}", param=name)
    if body.get("modalities") not in (None, [], ["text"]):
        raise ParamError("modalities: the policy writes text only", param="modalities")
    return ChatRequest(
        options=parse_options(body, default_model=default_model),
        messages=_messages(body.get("messages")),
        tools=_tools(body),
        logprobs=flag(body, "logprobs"),
    )


def _messages(raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not 0 < len(raw) <= MAX_MESSAGES:
        raise ParamError(f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    return [_message(one, f"messages[{place}]") for place, one in enumerate(raw)]


def _message(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str) or not raw["role"]:
        raise ParamError(f"{where} must be an object with a role", param=where)
    message = {**raw, "role": "system" if raw["role"] == "developer" else raw["role"]}
    for name in _EMPTY_FIELDS:
        if not message.get(name, True):
            del message[name]
    content = message.get("content")
    for place, part in enumerate(content if isinstance(content, list) else []):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ParamError(
                f"{where}.content[{place}] must be a part of type text; images, sounds and files are not "
                "supported",
                param=f"{where}.content",
            )
    if not (content is None or isinstance(content, (str, list))):
        raise ParamError(f"{where}.content must be a text, or a list of parts of type text", param=where)
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
            raise ParamError(f"{where}.tool_calls must be a list of at most {MAX_TOOLS} calls", param=where)
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in calls]
    return message


def _tool_call(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ParamError(f"{where} must be objects with a function that has a name", param=where)
    # What a client has put together from a stream has the index of each call, too.
    return {name: value for name, value in raw.items() if name != "index"}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    raw = body.get("tools") or []
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise ParamError(f"tools must be a list of at most {MAX_TOOLS} tools", param="tools")
    for place, tool in enumerate(raw):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ParamError(
                f'tools[{place}] must be {{"type": "function", "function": {{"name": ...}}}}',
                param=f"tools[{place}]",
            )
    return [] if body.get("tool_choice") == "none" else raw


def _stops(raw: Any) -> tuple[str, ...]:
    stops = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in stops)
    ):
        raise UserError(f"stop must be a text, or a list of at most {MAX_STOPS} texts, none of them empty")
    return tuple(stops)
