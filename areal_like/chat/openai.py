"""OpenAI's format of requests to a model: checks bodies, writes responses and the chunks of streams. Pure.

    body -> parse_chat(body, rules) -> ChatRequest
    completion -> chat_head + chat_choice (one object) or chat_delta (the chunks of a stream) + usage

Two servers use it; `ChatRules` states what each of them accepts. The embedded engine refuses tools and every
field that would change the completion and that it does not support. A session takes tools and ignores
sampling parameters, because the sampling is the job's. The sessions' other endpoints for the model have the
same options (`parse_options`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_like.http.bodies import ParamError, flag, integer

MAX_MESSAGES = 4096
MAX_TOOLS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_BYTES_PER_TOKEN = 64
"""A body of more bytes for each token of the context (and `FREE_BYTES`) is refused: rendering and tokenizing
it would take CPU time from the job's own samples, only to find that it is too long."""
FREE_BYTES = 1 << 16
_LEAST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON does not have."""
MAX_ERROR_CHARS = 2000
"""Limit of an error message, which may quote a body."""
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_EMPTY_FIELDS = ("refusal", "annotations", "audio", "function_call")
"""Fields that SDKs add to an assistant message and that mean nothing here."""

RefusedFields = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field -> accepted values, which have no effect, and what to do instead (or empty)."""


@dataclass(frozen=True, kw_only=True)
class ChatRules:
    """The requests that one server accepts."""

    server: str
    """Its name in errors."""
    default_model: str
    """The model of a request that names none."""
    takes_tools: bool
    refused: RefusedFields
    ignored: tuple[str, ...] = ()
    """Fields without effect that change the response elsewhere."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options that all requests to the model share."""

    model: str
    """The response repeats it."""
    stop: tuple[str, ...]
    """Texts that end the response."""
    max_new_tokens: int | None
    """None: as many as fit."""
    stream: bool
    include_usage: bool
    """The stream has a last chunk with the numbers of tokens."""
    return_token_ids: bool
    """vLLM's extension: `prompt_token_ids` and `token_ids`."""
    ignored: tuple[str, ...]
    """Fields of `ChatRules.ignored` in the body."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked body of /v1/chat/completions."""

    options: RequestOptions
    messages: list[dict[str, Any]]
    """`content` is a text, or null."""
    tools: list[dict[str, Any]]
    logprobs: bool


def most_bytes(*, context_length: int) -> int:
    """The largest body that may fit into a context."""
    return FREE_BYTES + MAX_BYTES_PER_TOKEN * context_length


def parse_model(body: Mapping[str, Any], rules: ChatRules) -> str:
    """The model's name, which a response repeats. Raises ParamError."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ParamError("model must be a text", param="model")
    return model or rules.default_model


def parse_options(body: Mapping[str, Any], rules: ChatRules) -> RequestOptions:
    """Checks the common fields. Raises UserError for the first error."""
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, Mapping):
        raise ParamError("stream_options must be an object", param="stream_options")
    limits = [
        integer(body, name, 0, low=1, high=1 << 30)
        for name in ("max_tokens", "max_completion_tokens")
        if body.get(name) is not None
    ]
    return RequestOptions(
        model=parse_model(body, rules),
        stop=stop_texts(body, "stop"),
        max_new_tokens=min(limits, default=None),
        stream=flag(body, "stream"),
        include_usage=flag(stream_options, "include_usage"),
        return_token_ids=flag(body, "return_token_ids"),
        ignored=tuple(name for name in rules.ignored if body.get(name) is not None),
    )


def refuse_fields(body: Mapping[str, Any], refused: RefusedFields, *, server: str) -> None:
    """Raises ParamError for a field that `server` does not support."""
    for name, (neutral, instead) in refused.items():
        if body.get(name) is not None and body[name] not in neutral:
            message = f"{name} is not supported by {server}"
            raise ParamError(f"{message}: {instead}" if instead else message, param=name)


def parse_chat(body: Mapping[str, Any], rules: ChatRules) -> ChatRequest:
    """Checks a body. Raises UserError for the first error."""
    refuse_fields(body, rules.refused, server=rules.server)
    return ChatRequest(
        options=parse_options(body, rules),
        messages=_messages(body.get("messages"), rules),
        tools=_tools(body) if rules.takes_tools else [],
        logprobs=flag(body, "logprobs"),
    )


def _messages(raw: Any, rules: ChatRules) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not 0 < len(raw) <= MAX_MESSAGES:
        raise ParamError(f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    return [_message(one, f"messages[{place}]", rules) for place, one in enumerate(raw)]


def _message(raw: Any, where: str, rules: ChatRules) -> dict[str, Any]:
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str) or not raw["role"]:
        raise ParamError(f"{where} must be an object with a role", param=where)
    message = {name: value for name, value in raw.items() if name not in _EMPTY_FIELDS or value}
    if message["role"] == "developer":
        message["role"] = "system"
    if "content" in message:
        message["content"] = _content(message["content"], where, may_be_null=rules.takes_tools)
    elif not rules.takes_tools:
        raise ParamError(f"{where}.content must be a text", param=where)
    calls = message.get("tool_calls")
    if calls and not rules.takes_tools:
        raise ParamError(f"{where}.tool_calls is not supported by {rules.server}", param=where)
    if calls is not None:
        if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
            raise ParamError(f"{where}.tool_calls must be a list of at most {MAX_TOOLS} calls", param=where)
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in calls]
    return message


def _content(raw: Any, where: str, *, may_be_null: bool) -> str | None:
    """The text of a message: a string, or a list of parts that are texts."""
    if isinstance(raw, str) or (raw is None and may_be_null):
        return raw
    if not isinstance(raw, list):
        raise ParamError(f"{where}.content must be a text, or a list of parts of type text", param=where)
    texts = []
    for place, part in enumerate(raw):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise ParamError(
                f"{where}.content[{place}] must be a text or a part of type text; images, sounds and files "
                "are not supported",
                param=f"{where}.content",
            )
        texts.append(text)
    return "".join(texts)


def _tool_call(raw: Any, where: str) -> dict[str, Any]:
    if not _has_named_function(raw):
        raise ParamError(f"{where} must be objects with a function that has a name", param=where)
    # A call that a client assembled from a stream also has its index.
    return {name: value for name, value in raw.items() if name != "index"}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    raw = body.get("tools") or []
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise ParamError(f"tools must be a list of at most {MAX_TOOLS} tools", param="tools")
    for place, tool in enumerate(raw):
        if not _has_named_function(tool):
            raise ParamError(
                f'tools[{place}] must be {{"type": "function", "function": {{"name": ...}}}}',
                param=f"tools[{place}]",
            )
    return [] if body.get("tool_choice") == "none" else raw


def _has_named_function(raw: Any) -> bool:
    function = raw.get("function") if isinstance(raw, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def stop_texts(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The texts that end a response: one, a list, or none. Raises ParamError."""
    raw = body.get(name)
    stops = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in stops)
    ):
        raise ParamError(
            f"{name} must be a text, or a list of at most {MAX_STOPS} texts, none of them empty", param=name
        )
    return tuple(stops)


# Responses


def chat_head(*, id: str, created_s: int, model: str, is_chunk: bool) -> dict[str, Any]:
    """The common head of a response, or of each chunk of a stream."""
    kind = "chat.completion.chunk" if is_chunk else "chat.completion"
    return {"id": f"chatcmpl-{id}", "object": kind, "created": created_s, "model": model}


def chat_choice(
    index: int, message: Mapping[str, Any], *, reason: str, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One completion as a whole."""
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def chat_delta(index: int, delta: Mapping[str, Any], *, reason: str | None = None) -> dict[str, Any]:
    """A chunk's addition to one completion. `reason`: the finish reason, in its last chunk."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def usage(*, prompt: int, completion: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def finite(logprobs: Sequence[float]) -> list[float]:
    """Log-probs without the infinities that JSON does not have."""
    return [value if math.isfinite(value) else _LEAST_LOGPROB for value in logprobs]


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[float], decode: Callable[[int], str]
) -> list[dict[str, Any]]:
    """The sampled tokens with their log-probs. `decode`: text of one token."""
    content = []
    for token, logprob in zip(tokens, finite(logprobs), strict=True):
        text = decode(token)
        # A token may be part of a character and then has no text of its own.
        raw = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        content.append({"token": text, "logprob": logprob, "bytes": raw, "top_logprobs": []})
    return content


def model_object(name: str, *, max_context: int) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "areal-like",
        "max_model_len": max_context,
    }


def error_object(
    status: int, message: str, *, code: str | int | None = None, param: str | None = None
) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message[:MAX_ERROR_CHARS], "type": kind, "param": param, "code": code}}
