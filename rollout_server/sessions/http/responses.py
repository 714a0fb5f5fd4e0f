"""Formats a turn of the policy as a response body: one object, or all events of a stream. Pure.

For /v1/chat/completions, /v1/completions, and vLLM's /inference/v1/generate in the form that verifiers' train
client reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from areal_like.chat.openai import (
    ChatRequest,
    chat_choice,
    chat_delta,
    chat_head,
    chat_logprobs,
    finite,
    usage,
)
from areal_like.http.streams import END_OF_EVENTS, encode_event
from areal_like.trajectory import FinishReason
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.turns import SampledTurn
from rollout_server.sessions.http.requests import CompletionRequest

DecodeToken = Callable[[int], str]


def chat_body(
    turn: SampledTurn, request: ChatRequest, *, id: str, created_s: int, conversation: Conversation
) -> bytes:
    head = chat_head(id=id, created_s=created_s, model=request.options.model, is_chunk=request.options.stream)
    logprobs = None
    if request.logprobs:
        content = chat_logprobs(turn.token_ids.tolist(), turn.logprobs.tolist(), conversation.decode)
        logprobs = {"content": content, "refusal": None}
    write = _chat_events if request.options.stream else _chat_object
    return write(turn, request, head, logprobs)


def _chat_object(
    turn: SampledTurn, request: ChatRequest, head: dict[str, Any], logprobs: dict[str, Any] | None
) -> bytes:
    reply = turn.reply
    message: dict[str, Any] = {
        "role": "assistant",
        # Like OpenAI: null if there are only tool calls.
        "content": None if reply.tool_calls and not reply.text else reply.text,
        "refusal": None,
    }
    for name in ("reasoning_content", "tool_calls"):
        if name in reply.message:
            message[name] = reply.message[name]
    choice = chat_choice(0, message, reason=_chat_reason(turn), logprobs=logprobs)
    body = {**head, "choices": [choice], "usage": _usage(turn)}
    if request.options.return_token_ids:
        body["prompt_token_ids"] = turn.prompt_ids.tolist()
        choice["token_ids"] = turn.token_ids.tolist()
    return _json(body)


def _chat_events(
    turn: SampledTurn, request: ChatRequest, head: dict[str, Any], logprobs: dict[str, Any] | None
) -> bytes:
    reply = turn.reply
    if request.options.include_usage:
        head["usage"] = None
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if reply.tool_calls else ""}]
    if reply.reasoning:
        deltas.append({"reasoning_content": reply.reasoning})
    if reply.text:
        deltas.append({"content": reply.text})
    for index, call in enumerate(reply.message.get("tool_calls", ())):
        deltas.append({"tool_calls": [{"index": index, **call}]})
    choices = [chat_delta(0, delta) for delta in deltas]
    last = chat_delta(0, {}, reason=_chat_reason(turn))
    # Tokens and text pieces have different boundaries, so the first chunk has all tokens.
    choices[0]["logprobs"] = logprobs
    if request.options.return_token_ids:
        choices[0]["token_ids"] = turn.token_ids.tolist()
    events = [{**head, "choices": [choice]} for choice in (*choices, last)]
    if request.options.return_token_ids:
        events[0]["prompt_token_ids"] = turn.prompt_ids.tolist()
    if request.options.include_usage:
        events.append({**head, "choices": [], "usage": _usage(turn)})
    return b"".join(map(encode_event, events)) + END_OF_EVENTS


def completion_body(
    turn: SampledTurn, request: CompletionRequest, *, id: str, created_s: int, conversation: Conversation
) -> bytes:
    options, decode = request.options, conversation.decode
    choice: dict[str, Any] = {
        "index": 0,
        "text": conversation.renderer.decode(turn.token_ids.tolist(), skip_special_tokens=True),
        "logprobs": _completion_logprobs(turn, decode) if request.logprobs else None,
        "finish_reason": _reason(turn),
    }
    if options.return_token_ids:
        # vLLM puts both in the choice, because a request may have several prompts.
        choice["prompt_token_ids"] = turn.prompt_ids.tolist()
        choice["token_ids"] = turn.token_ids.tolist()
    head = {"id": f"cmpl-{id}", "object": "text_completion", "created": created_s, "model": options.model}
    body = {**head, "choices": [choice]}
    if not options.stream:
        return _json({**body, "usage": _usage(turn)})
    events = [body]
    if options.include_usage:
        events = [{**body, "usage": None}, {**head, "choices": [], "usage": _usage(turn)}]
    return b"".join(map(encode_event, events)) + END_OF_EVENTS


def tokens_body(
    turn: SampledTurn, request: CompletionRequest, *, id: str, created_s: int, conversation: Conversation
) -> bytes:
    tokens = turn.token_ids.tolist()
    logprobs: list[dict[str, Any]] = [
        {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
        for token, logprob in zip(tokens, finite(turn.logprobs.tolist()), strict=True)
    ]
    choice = {
        "index": 0,
        "token_ids": tokens,
        "logprobs": {"content": logprobs},
        "finish_reason": _reason(turn),
    }
    return _json({"request_id": f"gen-{id}", "choices": [choice], "usage": _usage(turn)})


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _reason(turn: SampledTurn) -> str:
    return "stop" if turn.reply.finish_reason is FinishReason.STOP else "length"


def _chat_reason(turn: SampledTurn) -> str:
    reason = _reason(turn)
    return "tool_calls" if reason == "stop" and turn.reply.tool_calls else reason


def _usage(turn: SampledTurn) -> dict[str, int]:
    return usage(prompt=len(turn.prompt_ids), completion=len(turn.token_ids))


def _completion_logprobs(turn: SampledTurn, decode: DecodeToken) -> dict[str, Any]:
    """Returns log-probs in OpenAI's older format: only of the sampled tokens, whatever number is
    requested."""
    texts = [decode(token) for token in turn.token_ids.tolist()]
    logprobs = finite(turn.logprobs.tolist())
    offsets, offset = [], 0
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": [{text: logprob} for text, logprob in zip(texts, logprobs, strict=True)],
        "text_offset": offsets,
    }
