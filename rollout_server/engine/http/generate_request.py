"""Checks a /generate body in SGLang's format and makes the engine's sequences from it.

Everything is checked here, so the engine may assume that token ids are in the vocabulary and that a sequence
fits its row. As in SGLang, unknown fields of a body are ignored and unknown sampling parameters are refused.
A parameter that SGLang supports and this engine does not (penalties, grammars) is refused by name: ignoring
it would sample from a different distribution than the client asked for. In the packed form
(areal_like/http/streams.py) a prompt may be bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import UserError
from areal_like.http.bodies import flag, integer, number
from areal_like.http.streams import unpack_tokens
from rollout_server.engine.scheduler import SamplingParams, Sequence

MAX_SEQUENCES = 4096
"""Maximum number of sequences in one request."""
DEFAULT_NEW_TOKENS = 128
MAX_STOP_TOKENS = 64
GREEDY_BELOW = 1e-6
"""A lower temperature is 0, as in SGLang: logits divided by it may be infinite."""
MAX_SCORED = 256
"""Maximum number of tokens scored in one request: each takes one decode step, in which no sequence
advances."""

_SUPPORTED = {
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos",
    "sampling_seed", "n", "stream_interval",
}  # fmt: skip
_NEUTRAL = {
    "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_new_tokens": 0,
    "stop": None, "stop_regex": None, "json_schema": None, "regex": None, "ebnf": None,
    "structural_tag": None, "logit_bias": None, "custom_params": None, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "no_stop_trim": False,
}  # fmt: skip
"""SGLang's parameters that the embedded engine accepts only at this value, which has no effect."""
_TEXT_ONLY = {"skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim"}
"""Keys of `_NEUTRAL` that affect only text. This engine returns no text, so any value is accepted."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The engine's limits that every request is checked against."""

    vocab_size: int
    context_length: int
    """Longest sequence (prompt and output), in tokens."""
    eos_token_ids: tuple[int, ...]
    stream_interval: int
    """Tokens between the chunks of a stream; 0: one chunk, at the end of each sequence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerateRequest:
    """A checked /generate body."""

    sequences: list[Sequence]
    """The samples of one prompt are adjacent."""
    single: bool
    """One prompt and one sample: the response is an object, otherwise a list."""
    stream: bool


def parse_generate(body: Mapping[str, Any], limits: RequestLimits) -> GenerateRequest:
    """Checks a /generate body. Raises UserError for the first error."""
    input_ids = body.get("input_ids")
    if input_ids is None:
        raise UserError("input_ids is missing: this engine takes token ids, not text")
    if not isinstance(input_ids, list) or not input_ids:
        raise UserError("input_ids must be a non-empty list of token ids, or a list of such lists")
    batched = isinstance(input_ids[0], (list, bytes))
    prompts = [_tokens(prompt, limits) for prompt in input_ids] if batched else [input_ids]
    raw_params = body.get("sampling_params")
    params = raw_params if isinstance(raw_params, list) else [raw_params] * len(prompts)
    if len(params) != len(prompts):
        raise UserError(f"sampling_params: {len(params)} entries for {len(prompts)} prompts")
    checked = [_sampling_params(p, prompt, limits) for p, prompt in zip(params, prompts, strict=True)]
    if sum(n for _, n in checked) > MAX_SEQUENCES:
        raise UserError(f"more than {MAX_SEQUENCES} sequences in one request: send several")
    stream = flag(body, "stream")
    logprob_flags = _flags(body, "return_logprob", len(prompts))
    keep_flags = _flags(body, "keep_prefix", len(prompts))
    routes_flags = _flags(body, "return_routed_experts", len(prompts))
    rids = _rids(body.get("rid"), len(prompts))
    sequences = [
        Sequence(
            seq_id=rid if n == 1 else f"{rid}_{index}",
            rid=body["rid"] if isinstance(body.get("rid"), str) else rid,
            prompt=tuple(prompt),
            params=sampling,
            keeps_prefix=keeps_prefix,
            stream_interval=(sampling.stream_interval or limits.stream_interval) if stream else 0,
            sample_index=index,
            return_logprob=return_logprob,
            return_routes=return_routes,
        )
        for rid, prompt, (sampling, n), keeps_prefix, return_logprob, return_routes in zip(
            rids, prompts, checked, keep_flags, logprob_flags, routes_flags, strict=True
        )
        for index in range(n)
    ]
    if len({sequence.seq_id for sequence in sequences}) < len(sequences):
        raise UserError("rid: every prompt of a request needs a different id")
    return GenerateRequest(
        sequences=sequences,
        single=not batched and len(sequences) == 1,
        stream=stream,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """A checked /generate body that requests no new tokens, only the log-probs of `tokens` from index `first`
    on."""

    tokens: list[int]
    first: int

    def response(self, scores: NDArray[np.float32], *, version: str) -> dict[str, Any]:
        """Returns SGLang's response. `scores`: [len(tokens) - first]. The token at `first - 1` has no
        log-prob."""
        start = self.first - 1
        pairs = zip([None, *map(float, scores)], self.tokens[start:], strict=True)
        meta = {
            "prompt_tokens": len(self.tokens),
            "completion_tokens": 0,
            "finish_reason": {"type": "length", "length": 0},
            "weight_version": version,
            "input_token_logprobs": [(logprob, token, None) for logprob, token in pairs],
            "output_token_logprobs": [],
        }
        return {"text": "", "output_ids": [], "meta_info": meta, "index": 0}


def parse_score(body: Mapping[str, Any], limits: RequestLimits) -> ScoreRequest | None:
    """Returns the request in a /generate body; None if the body does not ask for log-probs of the prompt.

    Raises UserError.
    """
    if body.get("logprob_start_len") in (None, -1):
        return None
    tokens, params = body.get("input_ids"), body.get("sampling_params")
    if not isinstance(tokens, list) or not tokens or isinstance(tokens[0], (list, bytes)):
        raise UserError("logprob_start_len: give one prompt of token ids in input_ids")
    check_tokens(tokens, limits, name="input_ids")
    start = integer(body, "logprob_start_len", 0, low=0)
    if (
        not isinstance(params, dict)
        or params.get("max_new_tokens") != 0
        or body.get("return_logprob") is not True
    ):
        raise UserError(
            "logprob_start_len: this engine scores a prompt without new tokens; set return_logprob to true "
            "and max_new_tokens to 0"
        )
    if not start + 1 < len(tokens) <= limits.context_length or len(tokens) - start - 1 > MAX_SCORED:
        raise UserError(
            f"logprob_start_len={start}: want 1 to {MAX_SCORED} tokens after it, and input_ids of at most "
            f"{limits.context_length} tokens"
        )
    return ScoreRequest(tokens=tokens, first=start + 1)


def _tokens(prompt: Any, limits: RequestLimits) -> Any:
    """Converts a prompt given as bytes to a list; other prompts are checked later."""
    if not isinstance(prompt, bytes):
        return prompt
    _check_room(len(prompt) // 4, limits)
    try:
        return unpack_tokens(prompt).tolist()
    except ValueError:
        raise UserError(f"input_ids: {len(prompt)} bytes are not tokens of four bytes each") from None


def _flags(body: Mapping[str, Any], name: str, num_prompts: int) -> list[bool]:
    """Returns one flag per prompt: the given list, or the given flag for all; null is false."""
    value = body.get(name)
    flags = value if isinstance(value, list) else [False if value is None else value] * num_prompts
    if len(flags) != num_prompts or not all(isinstance(one, bool) for one in flags):
        raise UserError(f"{name} must be true or false, or a list with one of these per prompt")
    return flags


def _rids(rid: Any, num_prompts: int) -> list[str]:
    """Returns one request id per prompt: the given list, the given string with numbers appended, or random
    ids."""
    if rid is None:
        return [uuid.uuid4().hex for _ in range(num_prompts)]
    if isinstance(rid, str):
        return [rid] if num_prompts == 1 else [f"{rid}_{i}" for i in range(num_prompts)]
    if isinstance(rid, list) and len(rid) == num_prompts and all(isinstance(one, str) and one for one in rid):
        return rid
    raise UserError("rid must be a string, or a list with one string per prompt")


def _sampling_params(raw: Any, prompt: Any, limits: RequestLimits) -> tuple[SamplingParams, int]:
    """Checks one prompt with its sampling_params; returns the parameters and `n`, the number of samples."""
    if not isinstance(prompt, list) or not prompt:
        raise UserError("input_ids: every prompt must be a non-empty list of token ids")
    _check_room(len(prompt), limits)
    check_tokens(prompt, limits, name="input_ids")
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError("sampling_params must be an object")
    _check_supported(raw)
    room = limits.context_length - len(prompt)
    max_new_tokens = integer(raw, "max_new_tokens", min(DEFAULT_NEW_TOKENS, room), low=1)
    if max_new_tokens > room:
        raise UserError(
            f"{len(prompt)} prompt tokens and max_new_tokens={max_new_tokens} "
            f"exceed the context of {limits.context_length} tokens"
        )
    stops = raw.get("stop_token_ids") or []
    if not isinstance(stops, list) or len(stops) > MAX_STOP_TOKENS:
        raise UserError(f"stop_token_ids must be a list of at most {MAX_STOP_TOKENS} token ids")
    check_tokens(stops, limits, name="stop_token_ids")
    if not flag(raw, "ignore_eos"):
        stops = [*stops, *limits.eos_token_ids]
    top_k = integer(raw, "top_k", -1, low=-1)
    if top_k == 0:
        raise UserError("top_k must be at least 1, or -1 for no limit")
    top_p = number(raw, "top_p", 1.0, low=0, high=1)
    if top_p == 0:
        raise UserError("top_p must be above 0 and at most 1")
    temperature = number(raw, "temperature", 1.0, low=0, high=1e4)
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=top_p,
        top_k=min(top_k, limits.vocab_size),
        min_p=number(raw, "min_p", 0.0, low=0, high=1),
        stop_token_ids=tuple(dict.fromkeys(stops)),
        sampling_seed=integer(raw, "sampling_seed", None, low=-(1 << 63), high=(1 << 64) - 1),
        stream_interval=integer(raw, "stream_interval", 0, low=1, high=1 << 30),
    )
    return params, integer(raw, "n", 1, low=1, high=MAX_SEQUENCES)


def _check_supported(raw: Mapping[str, Any]) -> None:
    for name, value in raw.items():
        if name in _SUPPORTED:
            continue
        if name not in _NEUTRAL:
            raise UserError(f"unknown sampling parameter {name!r}")
        if name not in _TEXT_ONLY and value != _NEUTRAL[name] and value not in (None, [], ""):
            raise UserError(f"sampling parameter {name!r} is not supported by the embedded engine")


def _check_room(num_tokens: int, limits: RequestLimits) -> None:
    if num_tokens >= limits.context_length:
        raise UserError(
            f"the prompt's {num_tokens} tokens leave no room in a context of {limits.context_length}"
        )


def check_tokens(tokens: list[Any], limits: RequestLimits, *, name: str) -> None:
    """Raises UserError unless every token is in the vocabulary. `name`: name of the field."""
    if set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < limits.vocab_size:
        return
    for token in tokens:
        if type(token) is not int:
            raise UserError(f"{name}: {token!r} is not a token id")
        if not 0 <= token < limits.vocab_size:
            raise UserError(f"{name}: token id {token} is outside the vocabulary of {limits.vocab_size}")
