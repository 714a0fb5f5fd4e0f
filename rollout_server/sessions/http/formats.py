"""The formats of requests to the model in a session, and of their responses. Pure.

Requests are chats, and prompts as text or token ids. Sampling parameters are the job's, because otherwise the
log-probs would not be those of the trained policy: temperature and the like are accepted without effect, and
so are response formats and a forced choice of tool.

A turn of the policy becomes one object, or all events of a stream: for /v1/chat/completions, /v1/completions,
and vLLM's /inference/v1/generate in the form that verifiers' train client reads. `areal_like.chat` has the
formats of OpenAI's Responses and Anthropic's Messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_like.chat.anthropic import MessageRequest, anthropic_error, message_body
from areal_like.chat.openai import (
    ChatRequest,
    ChatRules,
    RequestOptions,
    chat_choice,
    chat_delta,
    chat_head,
    chat_logprobs,
    error_object,
    finite,
    parse_options,
    usage,
)
from areal_like.chat.reply import ChatReply
from areal_like.chat.responses import ResponsesRequest, failed_events, response_body
from areal_like.http.bodies import ParamError, flag, integer
from areal_like.http.streams import END_OF_EVENTS, encode_event
from areal_like.trajectory import FinishReason
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.turns import SampledTurn

DecodeToken = Callable[[int], str]
_NOTHING: tuple[Any, ...] = ([], {}, "", False)
_IGNORED = (
    "temperature", "top_p", "top_k", "min_p", "n", "best_of", "seed", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logit_bias", "response_format", "parallel_tool_calls",
    "reasoning_effort", "prediction", "min_tokens", "ignore_eos", "stop_token_ids", "top_logprobs",
    "chat_template_kwargs", "verbosity",
)  # fmt: skip
_MAX_LOGPROBS = 1 << 20
_LARGEST_ID = (1 << 31) - 1
_IMAGES = ("features", "content_parts")
"""Fields of /inference/v1/generate for multimodal models."""


def session_rules(model: str) -> ChatRules:
    """Returns the rules for requests in sessions. `model`: name of the policy in responses."""
    return ChatRules(
        server="sessions",
        default_model=model,
        takes_tools=True,
        refused={
            "functions": (_NOTHING, "use tools"),
            "function_call": (_NOTHING, "use tools and tool_choice"),
            "audio": (_NOTHING, "the policy writes text"),
            "web_search_options": (_NOTHING, "the policy has the tools of the request only"),
            "modalities": (([], ["text"]), "the policy writes text only"),
        },
        ignored=_IGNORED,
    )


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked body of /v1/completions or /inference/v1/generate."""

    options: RequestOptions
    prompt: str | list[int]
    """Text, or token ids."""
    add_special_tokens: bool = False
    """True if the tokenizer prepends its BOS to a text, as in vLLM."""
    logprobs: bool = True


def parse_completion(body: Mapping[str, Any], rules: ChatRules) -> CompletionRequest:
    """Checks a body. Raises UserError for the first error."""
    if flag(body, "echo"):
        raise ParamError("echo is not supported: the client has the prompt", param="echo")
    if body.get("suffix"):
        raise ParamError("suffix is not supported: the policy writes what follows", param="suffix")
    logprobs = body.get("logprobs")
    if isinstance(logprobs, bool):  # as vLLM takes it
        logprobs = 1 if logprobs else None
    else:
        integer(body, "logprobs", 0, low=0, high=_MAX_LOGPROBS)
    return CompletionRequest(
        options=parse_options(body, rules),
        prompt=_prompt(body.get("prompt")),
        add_special_tokens=body.get("add_special_tokens") is None or flag(body, "add_special_tokens"),
        logprobs=logprobs is not None,
    )


def parse_tokens(body: Mapping[str, Any], rules: ChatRules) -> CompletionRequest:
    """Checks a body of /inference/v1/generate. Raises UserError for the first error."""
    params = body.get("sampling_params")
    if params is None:
        params = {}
    if not isinstance(params, Mapping):
        raise ParamError("sampling_params must be an object", param="sampling_params")
    for name in _IMAGES:
        if body.get(name):
            raise ParamError(f"{name} is not supported: the policy reads text only", param=name)
    if flag(body, "stream"):
        raise ParamError("stream is not supported here: the response is one object", param="stream")
    fields = {**params, "model": body.get("model"), "stream": False}
    return CompletionRequest(
        options=parse_options(fields, rules), prompt=_token_ids(body.get("token_ids"), "token_ids")
    )


def _prompt(raw: Any) -> str | list[int]:
    # Some clients always send a list of prompts.
    if isinstance(raw, list) and raw and isinstance(raw[0], (str, list)):
        if len(raw) > 1:
            raise ParamError(
                f"prompt has {len(raw)} prompts: send one request for each, as each is a turn",
                param="prompt",
            )
        raw = raw[0]
    if isinstance(raw, str) and raw:
        return raw
    return _token_ids(raw, "prompt", kind="a text or ")


def _token_ids(raw: Any, name: str, *, kind: str = "") -> list[int]:
    if not isinstance(raw, list) or not raw or not _are_ids(raw):
        raise ParamError(f"{name} must be {kind}a list of token ids, and not empty", param=name)
    return raw


def _are_ids(raw: Sequence[Any]) -> bool:
    return all(type(token) is int and 0 <= token <= _LARGEST_ID for token in raw)


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


def responses_body(
    turn: SampledTurn, request: ResponsesRequest, *, id: str, created_s: int, conversation: Conversation
) -> bytes:
    logprobs: list[dict[str, Any]] = []
    if request.logprobs:
        logprobs = chat_logprobs(turn.token_ids.tolist(), turn.logprobs.tolist(), conversation.decode)
    return response_body(_reply(turn, logprobs=logprobs), request, id=id, created_s=created_s)


def messages_body(
    turn: SampledTurn, request: MessageRequest, *, id: str, created_s: int, conversation: Conversation
) -> bytes:
    return message_body(_reply(turn, stop=request.options.stop), request, id=id)


def _reply(
    turn: SampledTurn, *, stop: Sequence[str] = (), logprobs: Sequence[Mapping[str, Any]] = ()
) -> ChatReply:
    reply = turn.reply
    is_cut = reply.finish_reason is not FinishReason.STOP
    # A turn ends as soon as a stop text is complete.
    ended = [] if is_cut else [one for one in stop if one in reply.raw_text]
    return ChatReply(
        text=reply.text,
        reasoning=reply.reasoning,
        tool_calls=reply.message.get("tool_calls", ()),
        is_cut=is_cut,
        stop_text=ended[0] if ended else "",
        num_prompt_tokens=len(turn.prompt_ids),
        num_sampled_tokens=len(turn.token_ids),
        logprobs=logprobs,
    )


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


# The last event of a stream that has failed; `error` are the results of `errors.described`.


def openai_failure(request: Any, *, id: str, created_s: int, error: Mapping[str, Any]) -> bytes:
    return encode_event(error_object(**error))


def responses_failure(
    request: ResponsesRequest, *, id: str, created_s: int, error: Mapping[str, Any]
) -> bytes:
    status, message, code = error["status"], error["message"], error.get("code", "")
    return failed_events(request, id=id, created_s=created_s, status=status, message=message, code=code)


def messages_failure(request: MessageRequest, *, id: str, created_s: int, error: Mapping[str, Any]) -> bytes:
    return encode_event(
        anthropic_error(error["status"], error["message"], code=error.get("code")), name="error"
    )
