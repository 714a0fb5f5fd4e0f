"""Sampling parameters of one sequence, the bodies of `POST /generate`, and the completion in its response.

A batch request streams the events of all its sequences (areal_like/http/streams.py), each with the `index`
of its sequence in the batch. Events before the last one of a sequence repeat what the last one contains, so
only the last one is parsed. SGLang reports an error of one sequence (a prompt that is too long) as an event
without an index, after status 200, and ends the stream.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EngineError, PromptRefusedError
from areal_like.http.streams import EVENTS, FRAMES, pack_tokens, unpack_logprobs, unpack_tokens
from areal_like.trajectory import FinishReason
from areal_like.wire.routes import Routes

MAX_ERROR_CHARS = 500
"""An engine's error message is cut to this length."""
_PROMPT_STATUSES = (400, 413, 422)
_FINISH_REASONS = {reason.value: reason for reason in FinishReason if reason is not FinishReason.TIMEOUT}
"""Finish reasons that an engine reports; it does not know our time limit."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of one sequence.

    The defaults sample from the policy's own distribution. The filters (top_p, top_k, min_p) are for
    evaluation only: with them the recorded log-prob is not a probability under the policy.
    """

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence; it is the last token of the output."""
    ignore_eos: bool = False
    """Do not stop at the model's own end-of-sequence tokens. SGLang then ignores `stop_token_ids` too."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    min_p: float = 0.0
    sampling_seed: int | None = None
    """Used by the embedded engine; SGLang ignores it unless started with deterministic inference."""
    stop: tuple[str, ...] = ()
    """Texts that end the sequence; the token that completes one of them is kept. The client searches for
    them, with the tokenizer in `EngineClient.stop_texts`."""
    num_resumed: int = 0
    """Number of tokens at the end of the prompt that belong to the same turn, which was aborted and is
    continued. A stop text may start in them."""
    keeps_prefix: bool = False
    """True if another request may continue this sequence (the next turn of a conversation), so the embedded
    engine keeps its KV. SGLang keeps the KV of every sequence."""
    returns_routes: bool = False
    """True if the generation needs the routes of its tokens (`model.router_replay`)."""

    def to_dict(self) -> dict[str, Any]:
        """Returns SGLang's `sampling_params`, without fields at their default and those used only by the
        client."""
        params: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        if self.stop_token_ids:
            params["stop_token_ids"] = list(self.stop_token_ids)
        for name, default in (
            ("ignore_eos", False),
            ("top_p", 1.0),
            ("top_k", -1),
            ("min_p", 0.0),
            ("sampling_seed", None),
        ):
            if getattr(self, name) != default:
                params[name] = getattr(self, name)
        return params


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """Tokens sampled for one request, finished or aborted. All arrays have the same length T (0 or more)."""

    output_ids: NDArray[np.int32]
    """[T] sampled tokens, including a stop token."""
    logprobs: NDArray[np.float32]
    """[T] log-prob of each token under temperature-scaled logits, as recorded by the engine."""
    versions: NDArray[np.int32]
    """[T] version of the weights that sampled each token, as reported by the engine."""
    finish_reason: FinishReason
    matched: int | str | None = None
    """The stop token or stop text if `finish_reason` is STOP."""
    message: str = ""
    """The engine's reason if `finish_reason` is ABORT."""
    num_prompt_tokens: int = 0
    """Number of prompt tokens; 0 if the engine does not report it."""
    num_cached_tokens: int = 0
    """Number of prompt tokens whose KV was in the engine's prefix cache."""
    routes: Routes | None = None
    """Routes of the prompt and the output but for its last token, if they were requested and T is above 0."""


def encode_request(
    rids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    sampling_params: Sequence[Mapping[str, Any]],
    *,
    keeps_prefix: Sequence[bool],
    cache_salts: Sequence[str],
    lora_paths: Sequence[str] = (),
    returns_routes: bool = False,
    is_packed: bool,
) -> tuple[bytes, dict[str, str]]:
    """Returns the body and headers of a streaming batch request. Each argument has one entry per prompt.

    `lora_paths`: names of adapters, empty for the base model; or nothing at all.
    `returns_routes`: for all prompts, because SGLang takes no list here.
    """
    body: dict[str, Any] = {
        "rid": rids,
        "input_ids": [_prompt(prompt, is_packed=is_packed) for prompt in prompts],
        "sampling_params": sampling_params,
        "return_logprob": True,
        "stream": True,
    }
    if any(keeps_prefix):
        body["keep_prefix"] = keeps_prefix
    if any(cache_salts):
        body["cache_salt"] = cache_salts
    if any(lora_paths):
        body["lora_path"] = [name or None for name in lora_paths]
    if returns_routes:
        body["return_routed_experts"] = True
    content = msgpack.packb(body) if is_packed else json.dumps(body).encode()
    headers = {
        "Accept": f"{FRAMES}, {EVENTS}",
        "Content-Type": FRAMES if is_packed else "application/json",
    }
    return content, headers


def _prompt(prompt: Sequence[int], *, is_packed: bool) -> bytes | list[int]:
    if is_packed:
        with contextlib.suppress(OverflowError):  # the engine reports what is wrong with such a token
            return pack_tokens(prompt)
    return list(map(int, prompt))


def checked(event: Any) -> dict[str, Any]:
    """Returns the event of a stream if it does not report an error.

    Raises ValueError if it is not an object, and EngineError or PromptRefusedError with the engine's message
    if it reports an error.
    """
    if not isinstance(event, dict):
        raise ValueError("event is not an object")
    if "error" in event:
        raise _error_of(event["error"])
    return event


def refusal(status: int, message: str) -> EngineError:
    """Returns the exception for an engine's error with this HTTP status."""
    kind = PromptRefusedError if status in _PROMPT_STATUSES else EngineError
    return kind(message[:MAX_ERROR_CHARS])


def _error_of(error: Any) -> EngineError:
    fields = error if isinstance(error, dict) else {"message": error}
    code = fields.get("code")
    # SGLang sends no code: it uses these events for requests that it considers invalid.
    return refusal(code if isinstance(code, int) else 400, str(fields.get("message", error)))


def is_last(event: dict[str, Any]) -> bool:
    """True if this event ends its sequence. Raises KeyError or TypeError for a malformed event."""
    return event["meta_info"]["finish_reason"] is not None


def output_tokens(event: dict[str, Any]) -> NDArray[np.int32]:
    """Returns the tokens of an event. Raises as `parse_generation` does."""
    tokens = event["output_ids"]
    return unpack_tokens(tokens) if isinstance(tokens, bytes) else np.asarray(tokens, dtype=np.int32)


def _logprobs(entries: Any) -> NDArray[np.float32]:
    if isinstance(entries, bytes):
        return unpack_logprobs(entries)
    return np.asarray([entry[0] for entry in entries], dtype=np.float32)


def parse_generation(event: dict[str, Any]) -> Generation:
    """Parses the generation in the last event of a sequence.

    Raises EngineError or PromptRefusedError if the engine aborted the request because of an error, ValueError
    if lengths disagree, a token has no version or the finish reason is unknown, and KeyError, TypeError or
    AttributeError for a malformed event.
    """
    meta = event["meta_info"]
    reason = meta["finish_reason"]
    output_ids, logprobs = output_tokens(event), _logprobs(meta["output_token_logprobs"])
    if logprobs.shape != output_ids.shape:
        raise ValueError(f"{len(output_ids)} tokens but {len(logprobs)} log-probs")
    whole_output = {"version": meta.get("weight_version"), "start": 0, "end": len(output_ids)}
    versions = np.full(output_ids.shape, -1, dtype=np.int32)
    for span in meta.get("weight_versions") or [whole_output]:
        versions[int(span["start"]) : int(span["end"])] = parse_weight_version(span["version"])
    if versions.size and versions.min() < 0:
        raise ValueError("weight_versions do not cover the output")
    kind = str(reason["type"])
    matched = reason.get("matched")
    status = int(reason.get("status_code") or 200)
    if kind == FinishReason.ABORT.value and status >= 400:
        raise refusal(status, f"the engine aborted a request with an error: {reason.get('message')}")
    if kind not in _FINISH_REASONS:
        raise ValueError(f"unknown finish reason {kind[:MAX_ERROR_CHARS]!r}")
    return Generation(
        output_ids=output_ids,
        logprobs=logprobs,
        versions=versions,
        finish_reason=_FINISH_REASONS[kind],
        matched=matched if isinstance(matched, int) else None,
        message=str(reason.get("message") or ""),
        num_prompt_tokens=int(meta.get("prompt_tokens") or 0),
        num_cached_tokens=int(meta.get("cached_tokens") or 0),
    )


def parse_weight_version(raw: Any) -> int:
    """Parses the engine's weight version. Raises EngineError if it is not a number, like SGLang's default."""
    try:
        return int(raw)
    except (TypeError, ValueError):
        raise EngineError(
            f"the engine's weight version {raw!r} is not a number: start it with --weight-version 0"
        ) from None


def parse_scores(response: Any, *, num_scored: int) -> tuple[list[float], int]:
    """Parses the response to a /generate without new tokens: returns log-probs of the prompt's last
    `num_scored` tokens, and the weight version that computed them. Raises EngineError.
    """
    try:
        meta = response["meta_info"]
        # The range starts with the token before the first scored one, which has no log-prob.
        logprobs = [float(entry[0]) for entry in meta["input_token_logprobs"][1:]]
        version = parse_weight_version(meta["weight_version"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise EngineError(f"malformed response of the engine ({type(error).__name__}: {error})") from None
    if len(logprobs) != num_scored:
        raise EngineError(f"{num_scored} tokens were to be scored, and {len(logprobs)} were")
    return logprobs, version
