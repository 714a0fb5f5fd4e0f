"""The nouns of the ledger: tickets, their samples, and what may become of them. Plain data; the rules are in `ledger.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from areal_like.wire.messages.producer import Purpose


class State(StrEnum):
    """Where a ticket is. Every issued ticket is in exactly one of these."""

    QUEUED = "queued"
    """No server holds any of its missing samples."""
    LEASED = "leased"
    """At least one server works on it."""
    READY = "ready"
    """All samples are here and passed the filters; not yet in a step."""
    BATCHED = "batched"
    """Recorded at (step, position); served to the trainer from there, however often it asks."""
    TRAINED = "trained"
    """A checkpoint that contains its step is durable."""
    EVALUATED = "evaluated"
    """An eval ticket whose reward is known."""
    DROPPED = "dropped"
    """Ended without being trained on, for a recorded reason."""

    @property
    def is_terminal(self) -> bool:
        """Nothing more happens to such a ticket."""
        return self in TERMINAL


TERMINAL = frozenset({State.TRAINED, State.EVALUATED, State.DROPPED})


class Drop(StrEnum):
    """Why a ticket was dropped."""

    STALE = "stale"
    """A sample was beyond the ticket's `max_staleness` for the open step."""
    NO_SPREAD = "no_spread"
    """All rewards of the group were equal (`group_filter: spread`)."""
    FAILED = "failed"
    """A sample failed more often than `max_sample_retries`."""
    REJECTED = "rejected"
    """The group mixes weights versions (`group_filter: single_version`)."""
    CANCELLED = "cancelled"
    """Admission was closed before it was recorded."""
    INTERVAL = "interval"
    """It began before the engines' last sync and was not recorded in that interval (`weights.sync_interval`)."""
    ABANDONED = "abandoned"
    """A sample's weights are of steps that a trainer which came back will do anew, and it was not recorded in one before."""
    POISON = "poison"
    """An operator took it out of the step that it was recorded in; another group gets its place."""


REISSUED = frozenset({Drop.STALE, Drop.FAILED, Drop.REJECTED, Drop.INTERVAL, Drop.ABANDONED})
"""Drops whose prompt is tried again. A group without spread is refilled with another prompt: the same one would likely have none again."""


class Verdict(StrEnum):
    """What became of an offered sample."""

    ACCEPTED = "accepted"
    """Recorded."""
    DUPLICATE = "duplicate"
    """Sent again by the lease that delivered it: acknowledged again, nothing recorded."""
    SUPERSEDED = "superseded"
    """Its lease was taken away; another server makes (or made) this sample."""
    FINISHED = "finished"
    """Its ticket has ended: dropped, or trained long ago."""
    UNKNOWN_TICKET = "unknown ticket"
    """No such ticket was ever issued."""
    UNKNOWN_VERSION = "unknown version"
    """A token names weights that were never allocated."""
    ABANDONED = "abandoned"
    """A token's weights are of steps that a trainer which came back does anew. The sample is made again."""
    INVALID = "invalid"
    """Aborted, or no token of it was sampled: nothing to learn from. Or not the kind of sample that was asked for."""

    @property
    def refusal(self) -> str:
        """`SampleAck.refused`: empty when the sample counts."""
        return "" if self in (Verdict.ACCEPTED, Verdict.DUPLICATE) else self.value


REFUSALS = tuple(verdict for verdict in Verdict if verdict.refusal)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the ledger needs to know of an accepted trajectory; its record is in the store."""

    lease_id: int
    """The lease that delivered it."""
    oldest_step: int
    """Step of the oldest sampled token's weights: lag in step j is j minus this."""
    sum_token_steps: int
    """Sum over sampled tokens of the step of their weights."""
    oldest_version: int
    newest_version: int
    num_sampled: int
    """Tokens that the policy sampled."""
    reward: float


@dataclass(kw_only=True, slots=True, eq=False)
class Ticket:
    """The right to generate one group. Transitions are the ledger's (see its docstring)."""

    ticket_id: int
    purpose: Purpose
    prompt_index: int
    num_samples: int
    """Greedy ones included."""
    num_greedy: int = 0
    """The last so many of its samples are greedy: baselines, which are never trained on."""
    parent: int = 0
    """Ticket whose prompt this one tries again; 0: none."""
    num_reissues: int = 0
    """Tickets before this one in the chain of parents."""
    eval_id: int = 0
    max_staleness: int = 0
    """The bound on lag, in steps, that it was issued under."""
    state: State = State.QUEUED
    drop: Drop | None = None
    samples: dict[int, Sample] = field(default_factory=dict)
    """Accepted samples by index."""
    unleased: set[int] = field(default_factory=set)
    """Sample indices that are neither here nor being made."""
    leases: dict[int, LeaseRecord] = field(default_factory=dict)
    """Live leases; each covers samples of its own."""
    num_failures: dict[int, int] = field(default_factory=dict)
    """Failures of each sample index so far."""
    step: int = -1
    position: int = -1

    def is_greedy(self, sample_index: int) -> bool:
        """Whether a sample is a baseline."""
        return sample_index >= self.num_samples - self.num_greedy

    @property
    def learned_from(self) -> list[Sample]:
        """Accepted samples but for the greedy ones."""
        return [sample for index, sample in self.samples.items() if not self.is_greedy(index)]

    @property
    def proven_floor(self) -> int | None:
        """Step of the oldest token that has arrived; None before the first sample."""
        return min((sample.oldest_step for sample in self.samples.values()), default=None)

    @property
    def floor(self) -> int | None:
        """Lower bound on the step of its oldest token: what arrived, and what live leases may at worst sample with; None: no bound yet."""
        steps = [sample.oldest_step for sample in self.samples.values()]
        steps += [lease.weights_step for lease in self.leases.values()]
        return min(steps, default=None)


@dataclass(kw_only=True, slots=True, eq=False)
class LeaseRecord:
    """Samples of one ticket that one server is making."""

    lease_id: int
    ticket_id: int
    server: str
    weights_step: int
    """Step of the server's weights when it was granted: no token of it can be older."""
    outstanding: set[int]
    """Sample indices not yet finished."""
    expires_s: float
