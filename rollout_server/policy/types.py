"""Sampling parameters, a finished generation, and properties of an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EngineError
from areal_like.trajectory import FinishReason


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


class SamplingClient(Protocol):
    """The part of an `EngineClient` that episodes use."""

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        sampling: Sampling,
        rid: str | None = None,
        timeout_s: float = math.inf,
    ) -> Generation:
        """Samples one continuation of `input_ids`; see EngineClient.generate."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Properties of an engine that a weight group depends on; defaults where the engine omits them."""

    num_ranks: int = 1
    """Tensor-parallel ranks of the engine; each is one rank of the weight group."""
    device: str = "cpu"
    device_uuid: str = ""
    nccl_version: str = ""
    authenticates_store: bool = False
    """True if the engine accepts the key of a weight group's rendezvous; SGLang does not."""
    loads_in_place: bool = False
    """True if the engine does not decode while it receives weights (SGLang)."""

    @classmethod
    def from_server_info(cls, server_info: Mapping[str, Any]) -> EngineInfo:
        """Builds it from `/server_info` of either engine."""
        return cls(
            num_ranks=int(server_info.get("tp_size") or 1),
            device=str(server_info.get("device") or "cpu"),
            device_uuid=str(server_info.get("device_uuid") or ""),
            nccl_version=str(server_info.get("nccl_version") or ""),
            authenticates_store=server_info.get("authenticates_store") is True,
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
