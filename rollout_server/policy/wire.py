"""Encodes the bodies of `POST /generate`, and parses the events of its response (areal_like/http/streams.py).

A batch request streams the events of all its sequences, each with the `index` of its sequence in the batch.
Events before the last one of a sequence repeat what the last one contains, so only the last one is parsed.
SGLang reports an error of one sequence (a prompt that is too long) as an event without an index, after
status 200, and ends the stream.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EngineError, PromptRefusedError
from areal_like.http.streams import EVENTS, FRAMES, pack_tokens, unpack_logprobs, unpack_tokens
from areal_like.trajectory import FinishReason
from rollout_server.policy.types import Generation, parse_weight_version

MAX_ERROR_CHARS = 500
"""An engine's error message is cut to this length."""
_PROMPT_STATUSES = (400, 413, 422)
_FINISH_REASONS = {reason.value: reason for reason in FinishReason if reason is not FinishReason.TIMEOUT}
"""Finish reasons that an engine reports; it does not know our time limit."""


def encode_request(
    rids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    sampling_params: Sequence[Mapping[str, Any]],
    *,
    keeps_prefix: Sequence[bool],
    cache_salts: Sequence[str],
    is_packed: bool,
) -> tuple[bytes, dict[str, str]]:
    """Returns the body and headers of a streaming batch request. Each argument has one entry per prompt."""
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
