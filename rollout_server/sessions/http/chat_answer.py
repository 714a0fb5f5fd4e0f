"""An answer in the format of /v1/chat/completions: one object, or the chunks of a stream. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from areal_like.trajectory import FinishReason
from rollout_server.conversation.turns import Answer
from rollout_server.sessions.http.answering import END_OF_STREAM, encode_event
from rollout_server.sessions.http.chat_request import ChatRequest

DecodeToken = Callable[[int], str]
_LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""


def chat_object(
    answer: Answer, request: ChatRequest, *, id: str, created_s: int, decode: DecodeToken
) -> bytes:
    """The answer as one object."""
    reply = answer.reply
    message: dict[str, Any] = {
        "role": "assistant",
        # As OpenAI: null where there are tool calls only.
        "content": None if reply.tool_calls and not reply.text else reply.text,
        "refusal": None,
    }
    for name in ("reasoning_content", "tool_calls"):
        if name in reply.message:
            message[name] = reply.message[name]
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(answer, decode) if request.logprobs else None,
        "finish_reason": finish_reason(answer),
    }
    body = {
        **_head("chat.completion", request, id=id, created_s=created_s),
        "choices": [choice],
        "usage": usage(answer),
    }
    if request.options.return_token_ids:
        body["prompt_token_ids"] = answer.prompt_ids.tolist()
        choice["token_ids"] = answer.token_ids.tolist()
    return json.dumps(body, separators=(",", ":")).encode()


def chat_events(
    answer: Answer, request: ChatRequest, *, id: str, created_s: int, decode: DecodeToken
) -> bytes:
    """The answer as all events of its stream."""
    reply = answer.reply
    head = _head("chat.completion.chunk", request, id=id, created_s=created_s)
    if request.options.include_usage:
        head["usage"] = None
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if reply.tool_calls else ""}]
    if reply.reasoning:
        deltas.append({"reasoning_content": reply.reasoning})
    if reply.text:
        deltas.append({"content": reply.text})
    for index, call in enumerate(reply.message.get("tool_calls", ())):
        deltas.append({"tool_calls": [{"index": index, **call}]})
    choices: list[dict[str, Any]] = [_delta(delta) for delta in deltas]
    last = _delta({}, reason=finish_reason(answer))
    # Tokens and texts do not begin and end at the same places: the first chunk has the tokens.
    if request.logprobs:
        choices[0]["logprobs"] = _logprobs(answer, decode)
    if request.options.return_token_ids:
        choices[0]["token_ids"] = answer.token_ids.tolist()
    events = [{**head, "choices": [choice]} for choice in (*choices, last)]
    if request.options.return_token_ids:
        events[0]["prompt_token_ids"] = answer.prompt_ids.tolist()
    if request.options.include_usage:
        events.append({**head, "choices": [], "usage": usage(answer)})
    return b"".join(map(encode_event, events)) + END_OF_STREAM


def finish_reason(answer: Answer) -> str:
    """`stop`, `length` or `tool_calls`."""
    if answer.reply.finish_reason is not FinishReason.STOP:
        return "length"
    return "tool_calls" if answer.reply.tool_calls else "stop"


def usage(answer: Answer) -> dict[str, int]:
    """Numbers of tokens."""
    prompt, completion = len(answer.prompt_ids), len(answer.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def finite(logprobs: Sequence[float]) -> list[float]:
    """As JSON can have them."""
    return [value if math.isfinite(value) else _LEAST_LOGPROB for value in logprobs]


def _logprobs(answer: Answer, decode: DecodeToken) -> dict[str, Any]:
    content = []
    for token, logprob in zip(answer.token_ids.tolist(), finite(answer.logprobs.tolist()), strict=True):
        text = decode(token)
        # A token may be a part of a character: then it has no text of its own.
        raw = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        content.append({"token": text, "logprob": logprob, "bytes": raw, "top_logprobs": []})
    return {"content": content, "refusal": None}


def _head(kind: str, request: ChatRequest, *, id: str, created_s: int) -> dict[str, Any]:
    return {"id": f"chatcmpl-{id}", "object": kind, "created": created_s, "model": request.options.model}


def _delta(delta: dict[str, Any], *, reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
