"""The data classes of the ledger: tickets, leases, accepted samples, and the enums of their outcomes.

Plain data. The rules that change it are in `buffer/ledger/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from areal_like.wire.messages.producer import Purpose


class State(StrEnum):
    """State of a ticket. Every issued ticket is in exactly one of them."""

    QUEUED = "queued"
    """No server holds a lease on any of its missing samples."""
    LEASED = "leased"
    """At least one server holds a lease."""
    READY = "ready"
    """All samples arrived and passed the group filter; not assigned to a step yet."""
    CLOSED = "closed"
    """The group was closed (`buffer.overdue=close`): its samples enter steps as parts, in positions that are
    tickets of their own. Some are still to be sampled or recorded."""
    BATCHED = "batched"
    """Recorded at (step, position); every fetch of this position returns the same group, or the same
    parts."""
    TRAINED = "trained"
    """A durable checkpoint contains its step."""
    EVALUATED = "evaluated"
    """An eval ticket with at least one sample, all of whose samples have arrived or failed for good."""
    SPLIT = "split"
    """A closed group all of whose samples are recorded in positions of parts or given up."""
    DROPPED = "dropped"
    """Ended without being trained on; `Ticket.drop` is the reason."""

    @property
    def is_terminal(self) -> bool:
        """True for states that a ticket does not leave (except TRAINED, if a trainer repeats its step)."""
        return self in TERMINAL


TERMINAL = frozenset({State.TRAINED, State.EVALUATED, State.SPLIT, State.DROPPED})


class Drop(StrEnum):
    """Reason for dropping a ticket."""

    STALE = "stale"
    """A sample exceeded the ticket's `max_staleness` at the open step; with `buffer.overdue=close`, none of a
    part's tokens is within the bound."""
    NO_SPREAD = "no_spread"
    """All rewards of the group were equal (`buffer.group_filter=spread`)."""
    FAILED = "failed"
    """A sample failed more often than `buffer.max_sample_retries`, or its failure is of a kind that is not
    retried (`buffer.on_failure`)."""
    REJECTED = "rejected"
    """The group mixes weight versions (`buffer.group_filter=single_version`)."""
    CANCELLED = "cancelled"
    """Admission was closed before the group was recorded."""
    INTERVAL = "interval"
    """Sampled before the last weight sync and not recorded within that sync interval
    (`weights.sync_interval`)."""
    ABANDONED = "abandoned"
    """A sample used weights of steps that a resumed trainer repeats, and its group was not recorded yet."""
    POISON = "poison"
    """An operator removed it from the step in which it was recorded; another group takes its position."""


REISSUED = frozenset({Drop.STALE, Drop.FAILED, Drop.REJECTED, Drop.INTERVAL, Drop.ABANDONED})
"""Drops whose prompt is issued again. Not NO_SPREAD: the prompt would likely have no spread again."""


class Verdict(StrEnum):
    """Outcome of a sample that a server sent."""

    ACCEPTED = "accepted"
    """Recorded."""
    DUPLICATE = "duplicate"
    """Sent twice under the same lease: acknowledged again but not recorded again."""
    SUPERSEDED = "superseded"
    """The lease was revoked; another server generates (or generated) this sample."""
    FINISHED = "finished"
    """The ticket has ended: it was dropped, evaluated or trained."""
    UNKNOWN_TICKET = "unknown ticket"
    """No ticket with this id was ever issued."""
    UNKNOWN_VERSION = "unknown version"
    """A token carries a weight version that was never allocated."""
    ABANDONED = "abandoned"
    """A token used weights of steps that a resumed trainer repeats. The sample is leased again."""
    INVALID = "invalid"
    """Aborted, too long, without a sampled token, greedy instead of random (or vice versa), or failed in a
    way that is not trained on with reward 0."""

    @property
    def refusal(self) -> str:
        """Value of `SampleAck.refused`: empty for an accepted sample or a duplicate, else the reason."""
        return "" if self in (Verdict.ACCEPTED, Verdict.DUPLICATE) else self.value


REFUSALS = tuple(verdict for verdict in Verdict if verdict.refusal)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSummary:
    """The fields of an accepted trajectory that the rules use; the trajectory itself is in the store."""

    lease_id: int
    """The lease under which the sample arrived."""
    oldest_step: int
    """Optimizer step of the oldest sampled token's weights. In step j the sample's lag is j minus this."""
    sum_token_steps: int
    """Sum over sampled tokens of the step of their weights (for the mean lag of tokens)."""
    oldest_version: int
    newest_version: int
    num_sampled: int
    """Tokens that the policy sampled."""
    reward: float
    token_steps: tuple[tuple[int, int], ...] = ()
    """(step of the weights, number of sampled tokens), by step. Empty: all tokens are of `oldest_step` (or
    the sample was recorded by an earlier release)."""
    is_truncated: bool = False
    """A limit, not the policy, ended it."""
    failure: str = ""
    """Empty, or the `FailureKind` of a failure that was recorded with reward 0."""

    def trained_steps(self, *, first_step: int) -> tuple[tuple[int, int], ...]:
        """`token_steps` of the tokens of weights of `first_step` or later: those within a staleness bound."""
        known = self.token_steps or ((self.oldest_step, self.num_sampled),)
        return tuple([one for one in known if one[0] >= first_step])


@dataclass(kw_only=True, slots=True, eq=False)
class Journal:
    """What the rules know of the journal of one sample's session; its entries are in the store."""

    session: str
    """Id of the session."""
    oldest_step: int
    """No token of the session is from weights of an earlier step: the lowest of the leases that it had."""
    num_entries: int = 0
    num_bytes: int = 0


@dataclass(kw_only=True, slots=True, eq=False)
class Ticket:
    """The right to generate one group: `num_samples` completions of one prompt.

    Only `TicketTable` changes `state`.
    """

    ticket_id: int
    purpose: Purpose
    prompt_index: int
    num_samples: int
    """All samples of the group, including greedy ones."""
    num_greedy: int = 0
    """Greedy samples, which have the last indices. They are reward baselines and never trained on."""
    parent: int = 0
    """The dropped ticket whose prompt this ticket repeats; 0: none."""
    num_reissues: int = 0
    """Number of dropped tickets with the same prompt before this one: the length of the chain of parents."""
    eval_id: int = 0
    eval_set: str = ""
    """Name of the evaluation set; empty for training."""
    max_staleness: int = 0
    """The ticket's own bound on lag, in optimizer steps: the bound under which its first sample was leased.

    Fixed once the ticket has a sample or a lease; a ticket that has neither gets the current one from
    `Admission` with its next lease.
    """
    state: State = State.QUEUED
    drop: Drop | None = None
    samples: dict[int, SampleSummary] = field(default_factory=dict)
    """Accepted samples by index; only `add_sample` adds one."""
    oldest_sampled_step: int | None = None
    """Step of the oldest token that has arrived; None before the first sample."""
    unleased: set[int] = field(default_factory=set)
    """Indices of samples that have not arrived and are not under a lease."""
    leases: dict[int, LeaseRecord] = field(default_factory=dict)
    """Live leases by id; no two cover the same sample."""
    journals: dict[int, Journal] = field(default_factory=dict)
    """Journals of the sessions of missing samples, by index."""
    num_failures: dict[int, int] = field(default_factory=dict)
    """Number of failures so far, by sample index."""
    failed: set[int] = field(default_factory=set)
    """Indices of samples that failed for good or, in a closed group, were dropped. Only for eval tickets and
    closed groups: any other ticket is dropped as a whole."""
    failed_at: str = ""
    """The server at which a sample failed last; others are preferred for the retry. Not stored."""
    step: int = -1
    position: int = -1
    begin_step: int = -1
    """Step of the weights under which the group began: those of its first lease. -1: not yet."""
    close_step: int = -1
    """With `buffer.overdue=close`: the group is closed when the trainer begins this step. -1: not known."""
    early: tuple[int, ...] = ()
    """Of a closed group: the samples that were complete when it was closed."""
    placed: dict[int, int] = field(default_factory=dict)
    """Of a closed group: sample index -> id of the position in which the sample is recorded."""
    parts: tuple[tuple[int, int], ...] = ()
    """Of a position of parts: (ticket id, sample index) of each sample. Empty for a group."""

    def set_parts(self, parts: Sequence[tuple[Ticket, int]]) -> None:
        """Makes this the position of these samples of closed groups: (group, sample index) of each."""
        self.parts = tuple((group.ticket_id, index) for group, index in parts)
        for slot, (group, index) in enumerate(parts):
            self.add_sample(slot, group.samples[index])
        self.unleased = set()

    def add_sample(self, sample_index: int, sample: SampleSummary) -> None:
        """A sample was accepted."""
        self.samples[sample_index] = sample
        if self.oldest_sampled_step is None or sample.oldest_step < self.oldest_sampled_step:
            self.oldest_sampled_step = sample.oldest_step

    @property
    def record_keys(self) -> list[tuple[int, int]]:
        """(ticket id, sample index) of each record, in the order in which it is served."""
        return list(self.parts) or [(self.ticket_id, index) for index in range(self.num_samples)]

    def is_greedy(self, sample_index: int) -> bool:
        return sample_index >= self.num_samples - self.num_greedy

    @property
    def training_samples(self) -> list[SampleSummary]:
        """Accepted samples without the greedy ones."""
        return [sample for index, sample in self.samples.items() if not self.is_greedy(index)]

    @property
    def oldest_possible_step(self) -> int | None:
        """Lower bound on the step of the group's oldest token; None: no sample, no session and no lease yet.

        A lease counts with the step of its server's weights when it was granted, because its tokens cannot be
        from older weights; a session that waits for another server, with that of its first lease.
        """
        oldest = self.oldest_sampled_step
        for journal in self.journals.values():
            if oldest is None or journal.oldest_step < oldest:
                oldest = journal.oldest_step
        for lease in self.leases.values():
            if oldest is None or lease.weights_step < oldest:
                oldest = lease.weights_step
        return oldest


@dataclass(kw_only=True, slots=True, eq=False)
class LeaseRecord:
    """Samples of one ticket that one server generates."""

    lease_id: int
    ticket_id: int
    server: str
    weights_step: int
    """Step of the server's weights when the lease was granted; no token of its samples can be older."""
    outstanding: set[int]
    """Sample indices not yet finished."""
    expires_s: float
    """When it expires, unless its server has renewed all of its leases since (`Server.renewed_until_s`)."""
    granted_s: float = 0.0
    """When it was granted, or restored by a new buffer."""
