"""Answers in the formats of /v1/completions and /inference/v1/generate. Pure."""

from __future__ import annotations

import json
from typing import Any

from areal_like.trajectory import FinishReason
from rollout_server.conversation.turns import Answer
from rollout_server.sessions.http.answering import END_OF_STREAM, encode_event
from rollout_server.sessions.http.chat_answer import DecodeToken, finite, usage
from rollout_server.sessions.http.token_requests import CompletionRequest


def completion_object(
    answer: Answer, request: CompletionRequest, *, id: str, created_s: int, text: str, decode: DecodeToken
) -> bytes:
    """The answer as one object. `text`: of the sampled tokens."""
    body = _completion(answer, request, id=id, created_s=created_s, text=text, decode=decode)
    return json.dumps({**body, "usage": usage(answer)}, separators=(",", ":")).encode()


def completion_events(
    answer: Answer, request: CompletionRequest, *, id: str, created_s: int, text: str, decode: DecodeToken
) -> bytes:
    """The answer as all events of its stream."""
    body = _completion(answer, request, id=id, created_s=created_s, text=text, decode=decode)
    events = [body]
    if request.options.include_usage:
        body["usage"] = None
        events.append({**body, "choices": [], "usage": usage(answer)})
    return b"".join(map(encode_event, events)) + END_OF_STREAM


def generate_object(answer: Answer, *, id: str) -> bytes:
    """The answer as vLLM and the train client of verifiers have it."""
    tokens = answer.token_ids.tolist()
    logprobs: list[dict[str, Any]] = [
        {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
        for token, logprob in zip(tokens, finite(answer.logprobs.tolist()), strict=True)
    ]
    choice = {
        "index": 0,
        "token_ids": tokens,
        "logprobs": {"content": logprobs},
        "finish_reason": _finish_reason(answer),
    }
    body = {"request_id": f"gen-{id}", "choices": [choice], "usage": usage(answer)}
    return json.dumps(body, separators=(",", ":")).encode()


def _completion(
    answer: Answer, request: CompletionRequest, *, id: str, created_s: int, text: str, decode: DecodeToken
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0,
        "text": text,
        "logprobs": _logprobs(answer, decode) if request.logprobs else None,
        "finish_reason": _finish_reason(answer),
    }
    if request.options.return_token_ids:
        # vLLM has both in the choice, as a request may have several prompts.
        choice["prompt_token_ids"] = answer.prompt_ids.tolist()
        choice["token_ids"] = answer.token_ids.tolist()
    return {
        "id": f"cmpl-{id}",
        "object": "text_completion",
        "created": created_s,
        "model": request.options.model,
        "choices": [choice],
    }


def _logprobs(answer: Answer, decode: DecodeToken) -> dict[str, Any]:
    """OpenAI's older format. Only the sampled tokens have log-probs, whatever number the client asks for."""
    texts = [decode(token) for token in answer.token_ids.tolist()]
    logprobs = finite(answer.logprobs.tolist())
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


def _finish_reason(answer: Answer) -> str:
    return "stop" if answer.reply.finish_reason is FinishReason.STOP else "length"
