"""SGLang's request and answer shapes: everything that comes in is checked here, before the engine sees it.

The engine proper may then assume that token ids are in the vocabulary and that a sequence fits its row. Unknown fields of a
body are ignored, unknown sampling parameters are refused, as SGLang does; what it has and we do not (penalties, grammars) is refused by
name instead of being silently left out of the distribution.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from areal_like.errors import UserError
from areal_like.trajectory import FinishReason
from rollout_server.engine.loop import Report
from rollout_server.engine.scheduler import SamplingParams, Sequence

MAX_SEQUENCES = 4096
"""Sequences in one request."""
DEFAULT_NEW_TOKENS = 128
MAX_STOPS = 64

_NEUTRAL = {
    "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_new_tokens": 0, "stop": None, "stop_regex": None,
    "json_schema": None, "regex": None, "ebnf": None, "structural_tag": None, "logit_bias": None, "custom_params": None,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "no_stop_trim": False, "stream_interval": None,
}  # fmt: skip
"""SGLang parameters that the embedded engine accepts only at the value that changes nothing."""
_COSMETIC = {"skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "stream_interval"}
"""Those that only concern text, of which there is none here."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests are checked against."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    stream_interval: int


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerateRequest:
    """A checked /generate body."""

    sequences: list[Sequence]
    sample_index: list[int]
    """Which of the `n` samples of its prompt each sequence is."""
    single: bool
    """One prompt, one sample: the answer is an object, else a list."""
    stream: bool
    return_logprob: list[bool]


def parse_generate(body: Mapping[str, Any], limits: Limits) -> GenerateRequest:
    """Checks a /generate body. Raises UserError saying what is wrong."""
    input_ids = body.get("input_ids")
    if input_ids is None:
        raise UserError("input_ids is missing: this engine takes token ids, not text")
    if not isinstance(input_ids, list) or not input_ids:
        raise UserError("input_ids must be a non-empty list of token ids, or a list of such lists")
    batched = isinstance(input_ids[0], list)
    prompts = input_ids if batched else [input_ids]
    raw_params = body.get("sampling_params")
    params = raw_params if isinstance(raw_params, list) else [raw_params] * len(prompts)
    if len(params) != len(prompts):
        raise UserError(f"sampling_params: {len(params)} entries for {len(prompts)} prompts")
    checked = [_params(p, prompt, limits) for p, prompt in zip(params, prompts, strict=True)]
    if sum(n for _, n in checked) > MAX_SEQUENCES:
        raise UserError(f"more than {MAX_SEQUENCES} sequences in one request: send several")
    stream = _flag(body, "stream")
    logprob = body.get("return_logprob", False)
    wants = logprob if isinstance(logprob, list) else [logprob] * len(prompts)
    if len(wants) != len(prompts) or not all(isinstance(want, bool) for want in wants):
        raise UserError("return_logprob must be true, false, or one of these a prompt")
    sequences, sample_index, return_logprob = [], [], []
    rids = _rids(body.get("rid"), len(prompts))
    for rid, prompt, (sampling, n), want in zip(rids, prompts, checked, wants, strict=True):
        for index in range(n):
            sequence = Sequence(
                seq_id=rid if n == 1 else f"{rid}_{index}",
                rid=body["rid"] if isinstance(body.get("rid"), str) else rid,
                prompt=tuple(prompt),
                params=sampling,
                stream_interval=limits.stream_interval if stream else 0,
            )
            sequences.append(sequence)
            sample_index.append(index)
            return_logprob.append(want)
    if len({sequence.seq_id for sequence in sequences}) < len(sequences):
        raise UserError("rid: every prompt of a request needs an id of its own")
    return GenerateRequest(
        sequences=sequences,
        sample_index=sample_index,
        single=not batched and len(sequences) == 1,
        stream=stream,
        return_logprob=return_logprob,
    )


def _rids(rid: Any, num_prompts: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(num_prompts)]
    if isinstance(rid, str):
        return [rid] if num_prompts == 1 else [f"{rid}_{i}" for i in range(num_prompts)]
    if isinstance(rid, list) and len(rid) == num_prompts and all(isinstance(one, str) and one for one in rid):
        return rid
    raise UserError("rid must be a string, or a list with one string a prompt")


def _params(raw: Any, prompt: Any, limits: Limits) -> tuple[SamplingParams, int]:
    """Checks one prompt with its sampling_params; returns them and `n`."""
    if not isinstance(prompt, list) or not prompt:
        raise UserError("input_ids: every prompt must be a non-empty list of token ids")
    _check_tokens(prompt, limits, what="input_ids")
    if len(prompt) >= limits.context_length:
        raise UserError(
            f"the prompt's {len(prompt)} tokens leave no room in a context of {limits.context_length}"
        )
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError("sampling_params must be an object")
    known = {
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop_token_ids",
        "ignore_eos",
        "sampling_seed",
        "n",
    }
    for name, value in raw.items():
        if name in known:
            continue
        if name not in _NEUTRAL:
            raise UserError(f"unknown sampling parameter {name!r}")
        if name not in _COSMETIC and value != _NEUTRAL[name] and value not in (None, [], ""):
            raise UserError(f"sampling parameter {name!r} is not supported by the embedded engine")
    room = limits.context_length - len(prompt)
    max_new_tokens = _number(raw, "max_new_tokens", min(DEFAULT_NEW_TOKENS, room), low=1, whole=True)
    if max_new_tokens > room:
        raise UserError(
            f"{len(prompt)} prompt tokens and max_new_tokens={max_new_tokens} exceed the context of {limits.context_length} tokens"
        )
    stops = raw.get("stop_token_ids") or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise UserError(f"stop_token_ids must be a list of at most {MAX_STOPS} token ids")
    _check_tokens(stops, limits, what="stop_token_ids")
    if not _flag(raw, "ignore_eos"):
        stops = [*stops, *limits.eos_token_ids]
    top_k = int(_number(raw, "top_k", -1, low=-1, whole=True))
    if top_k == 0:
        raise UserError("top_k must be at least 1, or -1 for no limit")
    top_p = _number(raw, "top_p", 1.0, low=0, high=1)
    if top_p == 0:
        raise UserError("top_p must be above 0 and at most 1")
    seed = raw.get("sampling_seed")
    params = SamplingParams(
        max_new_tokens=int(max_new_tokens),
        temperature=_number(raw, "temperature", 1.0, low=0, high=1e4),
        top_p=top_p,
        top_k=top_k,
        min_p=_number(raw, "min_p", 0.0, low=0, high=1),
        stop_token_ids=tuple(dict.fromkeys(stops)),
        sampling_seed=None
        if seed is None
        else int(_number(raw, "sampling_seed", 0, low=-(1 << 63), high=(1 << 64) - 1, whole=True)),
    )
    return params, int(_number(raw, "n", 1, low=1, high=MAX_SEQUENCES, whole=True))


def _check_tokens(tokens: list[Any], limits: Limits, *, what: str) -> None:
    for token in tokens:
        if type(token) is not int:
            raise UserError(f"{what}: {token!r} is not a token id")
        if not 0 <= token < limits.vocab_size:
            raise UserError(f"{what}: token id {token} is outside the vocabulary of {limits.vocab_size}")


def _number(
    raw: Mapping[str, Any],
    name: str,
    default: float,
    *,
    low: float,
    high: float = math.inf,
    whole: bool = False,
) -> float:
    value = raw.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise UserError(f"{name} must be {kind} {bound}, got {value!r}")
    return value


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")
    return bool(value)


def answer(report: Report, *, index: int, return_logprob: bool, version: str) -> dict[str, Any]:
    """One sequence in SGLang's shape; `index` is its place in the request."""
    sequence, finish = report.sequence, report.finish
    meta: dict[str, Any] = {
        "id": sequence.seq_id,
        "finish_reason": None,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": len(report.output_ids),
        "cached_tokens": 0,
        "weight_version": version,
    }
    if return_logprob:
        pairs = zip(report.output_logprobs, report.output_ids, strict=True)
        meta["input_token_logprobs"] = []
        meta["output_token_logprobs"] = [(logprob, token, None) for logprob, token in pairs]
    if finish is not None:
        reason: dict[str, Any] = {"type": finish.reason.value}
        if finish.reason is FinishReason.STOP:
            reason["matched"] = finish.matched
        elif finish.reason is FinishReason.LENGTH:
            reason["length"] = len(report.output_ids)
        else:
            reason["message"] = finish.message
            reason["status_code"] = 500 if finish.is_error else None
        meta["finish_reason"] = reason
        meta["weight_versions"] = [
            {"version": v, "start": start, "end": end} for v, start, end in report.version_spans
        ]
    return {"text": "", "output_ids": report.output_ids, "meta_info": meta, "index": index}


def encode_event(event: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
