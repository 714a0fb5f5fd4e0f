"""A /generate body that asks for the log-probs of its prompt and for no new tokens, as SGLang takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import UserError
from rollout_server.engine.http.bodies import number
from rollout_server.engine.http.generate_request import RequestLimits, check_tokens

MAX_SCORED = 256
"""Most tokens scored in one request: each is one decode step, during which no sequence advances."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """A checked request: the log-probs of `tokens` from index `first` on."""

    tokens: list[int]
    first: int

    def answer(self, scores: NDArray[np.float32], *, version: str) -> dict[str, Any]:
        """SGLang's answer. `scores`: [len(tokens) - first]. The token at `first - 1` has no log-prob."""
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
    """The request in a /generate body; None if the body asks for no log-probs of the prompt.

    Raises UserError.
    """
    if body.get("logprob_start_len") in (None, -1):
        return None
    tokens, params = body.get("input_ids"), body.get("sampling_params")
    if not isinstance(tokens, list) or not tokens or isinstance(tokens[0], (list, bytes)):
        raise UserError("logprob_start_len: give one prompt of token ids in input_ids")
    check_tokens(tokens, limits, name="input_ids")
    start = int(number(body, "logprob_start_len", 0, low=0, integer=True))
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
