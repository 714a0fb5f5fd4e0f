"""A sample that failed, and what is sent to the buffer: a failure, or its tokens with reward 0. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.errors import (
    AgentLostError,
    ArealError,
    EngineError,
    EngineTimeoutError,
    EnvironmentLostError,
    EpisodeError,
    PromptRefusedError,
    RewardError,
    RewardTimeoutError,
)
from areal_like.failures import FailureKind, FailurePolicy
from areal_like.wire.messages.producer import Lease, SampleDone, SampleFailed
from areal_like.wire.records import Record
from rollout_server.sample.attempt import Attempt

_MAX_ERROR_CHARS = 500
_KINDS: tuple[tuple[type[ArealError], FailureKind], ...] = (
    (EngineTimeoutError, FailureKind.TIMEOUT),
    (PromptRefusedError, FailureKind.PROMPT),
    (EngineError, FailureKind.ENGINE),
    (RewardTimeoutError, FailureKind.REWARD_TIMEOUT),
    (RewardError, FailureKind.REWARD),
    (AgentLostError, FailureKind.AGENT),
    (EpisodeError, FailureKind.ENVIRONMENT),
)
"""Kinds of failures by exception; the first that fits."""


@dataclass(frozen=True, kw_only=True)
class FailedSample:
    """One sample that could not be made."""

    lease: Lease
    sample_index: int
    kind: FailureKind
    error: str
    attempt: Attempt | None = None
    """None if it failed before its attempt began."""
    is_innocent: bool = False
    """The policy had no part in it: its tokens are not trained on with reward 0."""

    @classmethod
    def of(
        cls,
        error: EngineError | EpisodeError | RewardError,
        lease: Lease,
        sample_index: int,
        attempt: Attempt | None,
    ) -> FailedSample:
        """A sample that `error` ended."""
        return cls(
            lease=lease,
            sample_index=sample_index,
            kind=next(kind for cause, kind in _KINDS if isinstance(error, cause)),
            error=str(error),
            attempt=attempt,
            is_innocent=isinstance(error, EnvironmentLostError),
        )

    def result(self, policy: FailurePolicy) -> SampleDone | SampleFailed:
        """What the buffer gets. With `zero` a sample, if there are tokens that can be trained on."""
        lease, attempt = self.lease, self.attempt
        if policy is FailurePolicy.ZERO and attempt is not None and not self.is_innocent:
            try:
                record = Record.of(lease.ticket_id, self.sample_index, attempt.without_reward())
                return SampleDone(lease_id=lease.lease_id, record=record, failure=self.kind.value)
            except ValueError:  # nothing was sampled, or the engine's answer cannot be used
                pass
        return SampleFailed(
            lease_id=lease.lease_id,
            ticket_id=lease.ticket_id,
            sample_index=self.sample_index,
            kind=self.kind,
            num_tokens=attempt.num_sampled if attempt is not None else 0,
            error=self.error[:_MAX_ERROR_CHARS],
        )
