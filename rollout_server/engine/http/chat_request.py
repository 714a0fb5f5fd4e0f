"""Checks the body of /v1/chat/completions, in OpenAI's format, and translates it to a /generate body.

Fields that cannot change the answer (`user`, `metadata`, `store`) are ignored. A field that the engine does
not support (tools, penalties, formats of the answer) is refused by name unless it has no effect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import UserError
from rollout_server.engine.http.bodies import flag, number, text

MAX_MESSAGES = 4096
MAX_CHOICES = 128
MAX_BYTES_PER_TOKEN = 64
"""A body of more bytes for each token of the context (and `FREE_BYTES`) is refused: rendering and tokenizing
it would take the processor from the job's own samples, only to find that it is too long."""
FREE_BYTES = 1 << 16
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
STREAM_INTERVAL = 8
"""Tokens between two looks at the text, for stop texts and streams."""

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,),
    "presence_penalty": (0,), "repetition_penalty": (1,), "min_tokens": (0,), "audio": (),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
"""Fields that are accepted only as null or with one of these values, which have no effect."""
_NO_SETTINGS = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of transformers' `apply_chat_template`. With a template of its own a client could keep the
engine's process busy for ever."""
_SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "n", "ignore_eos", "stop_token_ids")


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked body, apart from what the engine checks (`sampling_params`)."""

    model: str
    """The answer repeats it."""
    messages: list[dict[str, Any]]
    """`content` is a text."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """`chat_template_kwargs`."""
    sampling_params: dict[str, Any]
    """As /generate takes them. Without `max_new_tokens`: as many as fit."""
    stops: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    stream: bool = False
    include_usage: bool = False
    """The stream has a last chunk with the numbers of tokens."""

    @property
    def reads_text(self) -> bool:
        """True if the text matters before the answer is complete."""
        return self.stream or bool(self.stops)


def check_size(num_bytes: int, *, context_length: int) -> None:
    """Raises UserError for a body that cannot fit into the context."""
    most = FREE_BYTES + MAX_BYTES_PER_TOKEN * context_length
    if num_bytes > most:
        raise UserError(
            f"the body has {num_bytes} bytes; at most {most} are read with a context of {context_length}"
        )


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Checks a body. Raises UserError for the first error."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise UserError("the body has half of a surrogate pair, or is nested too deeply") from None
    for name, values in _UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in values:
            raise UserError(f"{name} is not supported by the embedded engine")
    options = body.get("stream_options") or {}
    kwargs = body.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping) or not isinstance(kwargs, Mapping):
        raise UserError("stream_options and chat_template_kwargs must be objects")
    if refused := sorted(_NO_SETTINGS & set(kwargs)):
        raise UserError(f"chat_template_kwargs: {', '.join(refused)} are not settings of a template")
    number(body, "n", 1, low=1, high=MAX_CHOICES, integer=True)
    return ChatRequest(
        model=text(body, "model", "default"),
        messages=_messages(body.get("messages")),
        template_kwargs=kwargs,
        sampling_params=_sampling_params(body),
        stops=_stops(body.get("stop")),
        stream=flag(body, "stream"),
        include_usage=flag(options, "include_usage"),
    )


def _messages(raw: Any) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not 0 < len(raw) <= MAX_MESSAGES:
        raise UserError(f"messages must be a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    for place, message in enumerate(raw):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"messages[{place}] must be an object with a role")
        if message.get("tool_calls"):
            raise UserError(f"messages[{place}].tool_calls is not supported by the embedded engine")
        content = _content(message.get("content"), place)
        messages.append({**message, "content": content})
    return messages


def _content(raw: Any, place: int) -> str:
    """The text of a message: a string, or a list of parts that are texts."""
    texts: list[str] = []
    for part in raw if isinstance(raw, list) else [raw]:
        content = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(content, str):
            raise UserError(f"messages[{place}].content must be a text, or a list of parts of type text")
        texts.append(content)
    return "".join(texts)


def _sampling_params(body: Mapping[str, Any]) -> dict[str, Any]:
    params = {name: body[name] for name in _SAME_NAME if body.get(name) is not None}
    if not isinstance(params.get("stop_token_ids", []), list):
        raise UserError("stop_token_ids must be a list of token ids")
    length = body.get("max_completion_tokens")
    length = body.get("max_tokens") if length is None else length
    if length is not None:
        params["max_new_tokens"] = int(
            number({"max_tokens": length}, "max_tokens", 1, low=1, high=1 << 30, integer=True)
        )
    if body.get("seed") is not None:
        params["sampling_seed"] = int(
            number(body, "seed", 0, low=-(1 << 63), high=(1 << 64) - 1, integer=True)
        )
    return params


def _stops(raw: Any) -> tuple[str, ...]:
    stops: Sequence[Any] = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in stops)
    ):
        raise UserError(f"stop must be a text, or a list of at most {MAX_STOPS} texts, none of them empty")
    return tuple(stops)
