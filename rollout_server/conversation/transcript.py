"""The tokens of one episode, with the log-prob and weight version of each sampled one.

Context (prompt, tool output, the next user turn) has loss mask zero; everything sampled has loss mask one,
the end-of-sequence token included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from rollout_server.conversation.scoring import Outcome, Span, placed_token_rewards, placed_turns
from rollout_server.policy.types import Generation


@dataclass(kw_only=True, eq=False)
class Transcript:
    """The tokens of one episode in order; tokens are only appended."""

    finish_reason: FinishReason = FinishReason.STOP
    """Reason for the end of the policy's last turn."""
    spans: list[Span] = field(default_factory=list)
    """(first, end) of each turn: sampled tokens without context between them."""
    _num_tokens: int = 0
    _tokens: list[NDArray[np.int32]] = field(default_factory=list)
    _logprobs: list[NDArray[np.float32]] = field(default_factory=list)
    _versions: list[NDArray[np.int32]] = field(default_factory=list)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[T] all tokens so far."""
        return np.concatenate(self._tokens) if self._tokens else np.empty(0, np.int32)

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """[T] log-prob of each token, 0 for context."""
        return np.concatenate(self._logprobs) if self._logprobs else np.empty(0, np.float32)

    @property
    def versions(self) -> NDArray[np.int32]:
        """[T] version of the weights of each token, NOT_SAMPLED for context."""
        return np.concatenate(self._versions) if self._versions else np.empty(0, np.int32)

    @property
    def sampled(self) -> NDArray[np.int32]:
        """The policy's tokens of all turns, without the context between them."""
        return self.tokens[self._sampled_mask()]

    @property
    def last_turn(self) -> NDArray[np.int32]:
        """The policy's tokens of the last turn."""
        first, end = self.spans[-1] if self.spans else (0, 0)
        return self.tokens[first:end]

    @property
    def num_sampled(self) -> int:
        """Number of the policy's tokens."""
        return int(np.count_nonzero(self._sampled_mask()))

    def append_context(self, tokens_T: NDArray[np.int32]) -> None:
        """Appends tokens that are not trained on."""
        num_tokens = len(tokens_T)
        self._append(tokens_T, np.zeros(num_tokens, np.float32), np.full(num_tokens, NOT_SAMPLED, np.int32))

    def append_sampled(self, generation: Generation) -> None:
        """Appends tokens that the policy sampled."""
        first = self._num_tokens
        self._append(generation.output_ids, generation.logprobs, generation.versions)
        if self.spans and self.spans[-1][1] == first:  # the rest of an interrupted turn
            first = self.spans.pop()[0]
        if first < self._num_tokens:
            self.spans.append((first, self._num_tokens))
        self.finish_reason = generation.finish_reason

    def to_trajectory(
        self,
        outcome: Outcome,
        *,
        generation_s: float = 0.0,
        reward_s: float = 0.0,
        is_greedy: bool = False,
        label: str = "",
    ) -> Trajectory:
        """The transcript as a Trajectory.

        Raises ValueError for invalid log-probs or versions, and for an outcome of other turns or tokens.
        """
        return Trajectory(
            tokens=self.tokens,
            loss_mask=self._sampled_mask().astype(np.uint8),
            logprobs=np.concatenate(self._logprobs),
            versions=np.concatenate(self._versions),
            reward=outcome.reward,
            reward_components=outcome.reward_components,
            turns=placed_turns(outcome, self.spans),
            metrics=outcome.metrics,
            label=label,
            arrays=placed_token_rewards(outcome, self.spans, num_tokens=self._num_tokens),
            finish_reason=self.finish_reason,
            is_greedy=is_greedy,
            generation_s=generation_s,
            reward_s=reward_s,
        )

    def _append(
        self, tokens_T: NDArray[np.int32], logprobs_T: NDArray[np.float32], versions_T: NDArray[np.int32]
    ) -> None:
        self._num_tokens += len(tokens_T)
        self._tokens.append(tokens_T)
        self._logprobs.append(logprobs_T)
        self._versions.append(versions_T)

    def _sampled_mask(self) -> NDArray[np.bool_]:
        return np.concatenate(self._versions) != NOT_SAMPLED if self._versions else np.empty(0, np.bool_)
