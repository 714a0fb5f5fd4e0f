"""Kinds of failed samples, and the policies for them (`buffer.on_failure`).

A rollout server says which kind a failure is, because only it knows the cause; the buffer applies the policy,
because only it knows the ticket. `zero` is the exception: the server has the sampled tokens, so it applies
`zero` itself and sends a normal sample with reward 0 and the kind of its failure.
"""

from __future__ import annotations

from enum import StrEnum


class FailureKind(StrEnum):
    """What failed while a sample was being made."""

    ENGINE = "engine"
    """The engine responded with an error, or its completion cannot be used."""
    TIMEOUT = "timeout"
    """The engine returned no token within `rollout.sample_timeout_s`. If there are tokens, the sample is
    truncated, which is not a failure."""
    REWARD = "reward"
    """The reward function raised, returned no finite number, or its process died."""
    REWARD_TIMEOUT = "reward_timeout"
    """The reward function exceeded `rollout.reward_timeout_s`."""
    PROMPT = "prompt"
    """The prompt is too long or empty, or the engine refuses it: it would fail at every server."""
    ENVIRONMENT = "environment"
    """The task's example() or the episode raised or hung."""
    ROUTES = "routes"
    """The engine returned no routes for a completion, or unusable ones (`model.router_replay`)."""
    TEACHER = "teacher"
    """No server of the sample's teacher returned the log-probs of its tokens within `distill.retry_s`."""
    AGENT = "agent"
    """External agents did not make the sample: they made no request, posted no reward, or disappeared."""


class FailurePolicy(StrEnum):
    """The treatment of a failed sample."""

    RETRY = "retry"
    """It is sampled again, up to `buffer.max_sample_retries` times; then its ticket is dropped."""
    ZERO = "zero"
    """Its tokens are trained on with reward 0. Without a sampled token it is treated as `retry`."""
    DROP = "drop"
    """Its ticket is dropped at once, with reason `failed`."""


FAULTS_OF_SERVER = frozenset({FailureKind.ENGINE, FailureKind.TIMEOUT, FailureKind.ROUTES})
"""Kinds that count against the rollout server."""
FAULTS_OF_TASK = frozenset(
    {FailureKind.REWARD, FailureKind.REWARD_TIMEOUT, FailureKind.ENVIRONMENT, FailureKind.TEACHER}
)
"""Kinds that count against the task's code, or against services that are the same for every server."""
FAULTS_OF_AGENTS = frozenset({FailureKind.AGENT})
"""Kinds that count against the agent that claimed the session; its server keeps the count."""
