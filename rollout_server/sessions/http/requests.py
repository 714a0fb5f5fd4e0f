"""Parses requests to the model in a session: chats, and prompts as text or token ids. Pure.

Sampling parameters are the job's, because otherwise the log-probs would not be those of the trained policy:
temperature and the like are accepted without effect, and so are response formats and a forced choice of tool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_like.chat.openai import ChatRules, RequestOptions, parse_options
from areal_like.http.bodies import ParamError, flag, integer

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
