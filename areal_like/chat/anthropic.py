"""Anthropic's Messages API: checks bodies, writes messages, the events of streams, and errors. Pure.

    body -> parse_message | parse_count -> MessageRequest, in OpenAI's chat format
    ChatReply -> message_body: one object, or the events of a stream

A message of the user is several messages here if it has results of tools: each is a message of role `tool`.

Source: Anthropic's API reference, "Messages", "Count tokens in a Message", "Streaming messages", "Errors".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from areal_like.chat.openai import (
    MAX_ERROR_CHARS,
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRules,
    RefusedFields,
    RequestOptions,
    parse_model,
    refuse_fields,
    stop_texts,
)
from areal_like.chat.reply import ChatReply
from areal_like.http.bodies import ParamError, flag, integer
from areal_like.http.streams import encode_event

_REFUSED: RefusedFields = {
    "container": ((), "there are no containers"),
    "mcp_servers": (([],), "connect them in the agent, and send their tools"),
}
_IGNORED = (
    "temperature", "top_p", "top_k", "output_config", "output_format", "context_management", "service_tier",
)  # fmt: skip
_SEPARATOR = "\n\n"
"""Between two blocks of text of the user or the system."""
_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n*", re.M)
"""A line that Claude Code writes into the system prompt, with a number that differs in each request: no
request would continue the conversation of the one before."""
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
_TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True, kw_only=True)
class MessageRequest:
    """A checked body of /v1/messages or /v1/messages/count_tokens."""

    options: RequestOptions
    messages: list[dict[str, Any]]
    """In the chat format, the system prompt first."""
    tools: list[dict[str, Any]]
    """In the chat format."""
    shows_thinking: bool
    """True if the response has the model's reasoning."""


def parse_message(body: Mapping[str, Any], rules: ChatRules) -> MessageRequest:
    """Checks a body of /v1/messages. Raises UserError for the first error."""
    request = parse_count(body, rules)
    if request.messages[-1]["role"] == "assistant":
        raise ParamError(
            f"messages must end with a message of the user: {rules.server} cannot continue a message of the "
            "assistant (prefill)",
            param="messages",
        )
    return request


def parse_count(body: Mapping[str, Any], rules: ChatRules) -> MessageRequest:
    """Checks a body of /v1/messages/count_tokens. Raises UserError for the first error."""
    refuse_fields(body, _REFUSED, server=rules.server)
    thinking = body.get("thinking") or {}
    if not isinstance(thinking, dict):
        raise ParamError("thinking must be an object", param="thinking")
    choice = body.get("tool_choice") or {}
    if not isinstance(choice, dict):
        raise ParamError("tool_choice must be an object", param="tool_choice")
    tools = _tools(body.get("tools"))
    return MessageRequest(
        options=RequestOptions(
            model=parse_model(body, rules),
            stop=stop_texts(body, "stop_sequences"),
            max_new_tokens=integer(body, "max_tokens", None, low=1, high=1 << 30),
            stream=flag(body, "stream"),
            include_usage=True,
            return_token_ids=False,
            ignored=tuple(name for name in _IGNORED if body.get(name) is not None),
        ),
        messages=[*_system(body.get("system")), *_messages(body.get("messages"))],
        tools=[] if choice.get("type") == "none" else tools,
        shows_thinking=thinking.get("type") in ("enabled", "adaptive"),
    )


def _system(raw: Any) -> list[dict[str, Any]]:
    text = _BILLING.sub("", _SEPARATOR.join(_texts(raw, "system")))
    return [{"role": "system", "content": text}] if text else []


def _messages(raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not 0 < len(raw) <= MAX_MESSAGES:
        raise ParamError(f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    found = []
    for place, message in enumerate(raw):
        where = f"messages[{place}]"
        role = message.get("role") if isinstance(message, dict) else None
        match role:
            case "user":
                found += _of_user(message.get("content"), f"{where}.content")
            case "assistant":
                found.append(_of_assistant(message.get("content"), f"{where}.content"))
            case "system":
                text = _SEPARATOR.join(_texts(message.get("content"), f"{where}.content"))
                found.append({"role": "system", "content": text})
            case _:
                raise ParamError(f"{where} must be an object of role user or assistant", param=where)
    return found


def _of_user(raw: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a user's content: one for each result of a tool, and one for the texts between."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    for kind, block, at in _blocks(raw, where):
        match kind:
            case "text":
                texts.append(_string(block, "text", at))
            case "tool_result":
                if texts:
                    found.append({"role": "user", "content": _SEPARATOR.join(texts)})
                    texts = []
                content = _SEPARATOR.join(_texts(block.get("content"), f"{at}.content"))
                id = _string(block, "tool_use_id", at)
                found.append({"role": "tool", "tool_call_id": id, "content": content})
            case _:
                raise _unusable(kind, at, "text and tool_result")
    if texts or not found:
        found.append({"role": "user", "content": _SEPARATOR.join(texts)})
    return found


def _of_assistant(raw: Any, where: str) -> dict[str, Any]:
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for kind, block, at in _blocks(raw, where):
        match kind:
            case "text":
                texts.append(_string(block, "text", at))
            case "thinking":
                reasoning.append(_string(block, "thinking", at))
            case "redacted_thinking":
                pass
            case "tool_use":
                if not isinstance(block.get("input"), dict):
                    raise ParamError(f"{at}.input must be an object", param=f"{at}.input")
                function = {
                    "name": _string(block, "name", at),
                    "arguments": json.dumps(block["input"], ensure_ascii=False),
                }
                calls.append({"id": _string(block, "id", at), "type": "function", "function": function})
            case _:
                raise _unusable(kind, at, "text, thinking and tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _blocks(raw: Any, where: str) -> list[tuple[Any, dict[str, Any], str]]:
    """The blocks of a content with their types and places; a text is one block."""
    blocks = [{"type": "text", "text": raw}] if isinstance(raw, str) else raw
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ParamError(f"{where} must be a text, or a list of blocks", param=where)
    return [(block.get("type"), block, f"{where}[{place}]") for place, block in enumerate(blocks)]


def _texts(raw: Any, where: str) -> list[str]:
    """The texts of a content that has no other blocks; empty for null."""
    if raw is None:
        return []
    found = []
    for kind, block, at in _blocks(raw, where):
        if kind != "text":
            raise _unusable(kind, at, "text")
        found.append(_string(block, "text", at))
    return found


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise ParamError(f"{where}.{name} must be a text", param=f"{where}.{name}")
    return value


def _unusable(kind: Any, where: str, usable: str) -> ParamError:
    return ParamError(
        f"{where} has the type {kind!r:.60}, which is not supported here: send blocks of type {usable}",
        param=where,
    )


def _tools(raw: Any) -> list[dict[str, Any]]:
    raw = raw or []
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise ParamError(f"tools must be a list of at most {MAX_TOOLS} tools", param="tools")
    tools = []
    for place, tool in enumerate(raw):
        where = f"tools[{place}]"
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            raise ParamError(
                f"{where} must be a tool with an input_schema: there are no tools of a provider", param=where
            )
        schema = tool.get("input_schema")
        if not isinstance(schema, dict):
            raise ParamError(f"{where}.input_schema must be an object", param=f"{where}.input_schema")
        function: dict[str, Any] = {"name": _string(tool, "name", where)}
        if tool.get("description") is not None:
            function["description"] = _string(tool, "description", where)
        tools.append({"type": "function", "function": {**function, "parameters": schema}})
    return tools


# Responses


def message_body(reply: ChatReply, request: MessageRequest, *, id: str) -> bytes:
    """One object, or all events of a stream. `id`: the message's id, without its prefix."""
    blocks = _content(reply, id=id, shows_thinking=request.shows_thinking)
    end = {"stop_reason": _stop_reason(reply), "stop_sequence": reply.stop_text or None}
    usage = {
        "input_tokens": reply.num_prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": reply.num_sampled_tokens,
    }
    message = {
        "id": f"msg_{id}",
        "type": "message",
        "role": "assistant",
        "model": request.options.model,
        "content": blocks,
        **end,
        "usage": usage,
    }
    if not request.options.stream:
        return json.dumps(message, separators=(",", ":")).encode()
    started = {
        **message,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage, "output_tokens": 0},
    }
    events = _event("message_start", message=started) + _event("ping")
    for index, block in enumerate(blocks):
        events += _block_events(block, index)
    return events + _event("message_delta", delta=end, usage=usage) + _event("message_stop")


def _stop_reason(reply: ChatReply) -> str:
    if reply.is_cut:
        return "max_tokens"
    if reply.tool_calls:
        return "tool_use"
    return "stop_sequence" if reply.stop_text else "end_turn"


def _content(reply: ChatReply, *, id: str, shows_thinking: bool) -> list[dict[str, Any]]:
    """The blocks of a reply. There is at least one, because clients read the first one's text."""
    blocks: list[dict[str, Any]] = []
    if reply.reasoning and shows_thinking:
        # A client that keeps thinking sends it back only with a signature.
        blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": id})
    if reply.text or not reply.tool_calls:
        blocks.append({"type": "text", "text": reply.text})
    for call in reply.tool_calls:
        function = call["function"]
        blocks.append(
            {
                "type": "tool_use",
                "id": call["id"],
                "name": function["name"],
                "input": _input(function["arguments"]),
            }
        )
    return blocks


def _input(arguments: str) -> Any:
    """Parses the arguments of a call; numbers that JSON does not have become texts."""

    def number(text: str) -> float | str:
        value = float(text)
        return value if math.isfinite(value) else text

    return json.loads(arguments, parse_constant=str, parse_float=number)


def _block_events(block: Mapping[str, Any], index: int) -> bytes:
    empty: dict[str, Any]
    deltas: list[dict[str, Any]]
    match block["type"]:
        case "thinking":
            empty = {"thinking": "", "signature": ""}
            deltas = [
                {"type": "thinking_delta", "thinking": block["thinking"]},
                {"type": "signature_delta", "signature": block["signature"]},
            ]
        case "tool_use":
            empty = {"input": {}}
            deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        case _:
            empty = {"text": ""}
            deltas = [{"type": "text_delta", "text": block["text"]}] if block["text"] else []
    events = [_event("content_block_start", index=index, content_block={**block, **empty})]
    events += [_event("content_block_delta", index=index, delta=delta) for delta in deltas]
    return b"".join([*events, _event("content_block_stop", index=index)])


def _event(kind: str, **fields: Any) -> bytes:
    return encode_event({"type": kind, **fields}, name=kind)


def anthropic_error(status: int, message: str, *, code: str | None = None) -> dict[str, Any]:
    """An error. `code`: as in OpenAI's format; clients recognize a full context by its message."""
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if code == _TOO_LONG:
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": kind, "message": message[:MAX_ERROR_CHARS]}}
