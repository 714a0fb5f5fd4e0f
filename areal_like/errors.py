"""All exceptions that this project raises on purpose, in one tree.

    ArealError
        UserError               (also a ValueError)
            ConfigError
        WireError
            WireVersionError
        RefusedError
        RunFinishedError
        StaleIncarnationError
        EvaluationError
        DeadlineError
        PeerLostError
        EngineError
            NoSuchRouteError
            EngineTimeoutError
            PromptRefusedError
            RoutesError
        EpisodeError
            EpisodeBudgetError
            EnvironmentLostError
                AgentLostError
            ToolServerError
            SandboxError
        SessionGoneError
        SessionMovedError
        ToolError
        WeightSyncError
        RewardError
            RewardTimeoutError
        TeacherError
        CheckpointError
        DiskFullError
        StoreCorruptError

A UserError is a mistake that a person can correct: the command line prints only its message and exits with
code 2. The others are events in a running system; daemons catch them one class at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from areal_like.trajectory import FinishReason


def first_line(error: Exception) -> str:
    """The first line of an error's text, and the second after a colon; without a text, the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


class ArealError(Exception):
    """Root of the tree."""


class UserError(ArealError, ValueError):
    """A setting or input is wrong. The message says what to change."""


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another."""


class WireError(ArealError):
    """A message could not be decoded. The receiver counts and drops it, and continues."""


class WireVersionError(WireError):
    """A message has a different wire version: one side has to be upgraded."""


class RefusedError(ArealError):
    """A peer refused our request; the message names the field that differs."""

    field = ""
    """On the requesting side: the `field` of the `Refused`."""


class RunFinishedError(ArealError):
    """The run is finished: this process has nothing left to do."""


class StaleIncarnationError(ArealError):
    """A newer process of the same name has registered: this one must stop."""


class EvaluationError(ArealError):
    """No sample of an evaluation set could be made."""


class DeadlineError(ArealError):
    """No response or event arrived before the deadline; the message names it."""


class PeerLostError(ArealError):
    """The connection that a pending request needs is closed."""


class EngineError(ArealError):
    """The inference engine returned an error or did not respond."""


class NoSuchRouteError(EngineError):
    """The engine has no endpoint of this name (HTTP 404)."""


class EngineTimeoutError(EngineError):
    """The engine returned no token of a sequence within the time limit of a generation."""


class PromptRefusedError(EngineError):
    """The engine refused a request because of its prompt, and would refuse it again."""


class RoutesError(EngineError):
    """The engine returned no routes for a completion, or routes that do not fit it."""


class EpisodeError(ArealError):
    """The code of an episode or its environment raised."""


class EpisodeBudgetError(EpisodeError):
    """An episode has no room for another turn; what it sampled so far is a truncated sample."""

    def __init__(self, message: str, *, reason: FinishReason) -> None:
        """`reason`: TOKENS or CONTEXT."""
        super().__init__(message)
        self.reason = reason


class EnvironmentLostError(EpisodeError):
    """An environment's process was lost through no fault of the environment: the sample may be made again."""


class AgentLostError(EnvironmentLostError):
    """An external agent did not make the sample of its session: another agent may."""

    def __init__(self, message: str, *, is_of_sample: bool = True) -> None:
        """`is_of_sample`: the agent completed earlier samples, so the cause may be this sample."""
        super().__init__(message)
        self.is_of_sample = is_of_sample


class ToolServerError(EpisodeError):
    """A server of tools cannot be used: it does not start, its tools are refused, or it ended too often."""


class SandboxError(EpisodeError):
    """The sandbox of a sample cannot be opened, or was lost: through no fault of the programs in it."""


class SessionGoneError(ArealError):
    """The session of a request has ended; the message says why. It accepts no further requests."""


class SessionMovedError(ArealError):
    """The session is not at this server (any more), and will continue at another one: ask again soon."""


class ToolError(ArealError):
    """A tool cannot do what the policy asked for. The policy reads the message."""


class WeightSyncError(ArealError):
    """A weight push failed; the receiver keeps its old version or is quarantined."""


class RewardError(ArealError):
    """A reward function raised, exceeded its time limit, or returned no finite number."""


class RewardTimeoutError(RewardError):
    """A reward function exceeded its time limit."""


class TeacherError(ArealError):
    """No server of a sample's teacher has returned the log-probs of its tokens (`distill.teachers`)."""


class CheckpointError(ArealError):
    """Another rank could not write its part of a checkpoint, or was lost while writing it."""


class DiskFullError(ArealError):
    """A checkpoint could not be written for lack of disk space; the previous one is complete."""


class StoreCorruptError(ArealError):
    """A record on disk differs from its row in the ledger; the message names the ticket and the file."""


RAISED_BY_TASKS = (Exception, SystemExit)
"""Exceptions that the code of a task, an episode or a renderer may raise: its `sys.exit()` must not end the
daemon."""
