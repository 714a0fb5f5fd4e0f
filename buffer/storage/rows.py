"""Rows that a store returns after a restart. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from areal_like.wire.messages.producer import Purpose
from buffer.prompts.order import Prompt
from buffer.tickets import Drop, State, Ticket


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionRow:
    """One allocated weight version."""

    version: int
    step: int
    """The optimizer step that starts from these weights: the number of steps completed before."""
    parent: int
    """The version allocated before it."""
    trainer_incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRow:
    """One live lease. Its expiry time is not stored: a restarted buffer gives it a new one."""

    lease_id: int
    ticket_id: int
    server: str
    server_incarnation: int
    weights_step: int
    outstanding: frozenset[int]
    """Sample indices as last written. An index that has a sample row is not outstanding any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackRow:
    """Training that was undone: a trainer resumed at an earlier step than the last complete one."""

    trainer_incarnation: int
    """Incarnation of the trainer that resumed."""
    from_step: int
    """Steps that were complete before."""
    to_step: int
    """Steps that the resumed checkpoint contains."""
    num_tickets: int
    """Tickets trained on in the steps between."""
    num_tokens: int
    """Sampled tokens of these tickets."""
    unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationRow:
    """What an operator did to the run. It is written for people and never read back."""

    unix_s: float
    verb: str
    """The command, e.g. `unfence`."""
    subject: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingRow:
    """A value of a setting that may change while the run goes on, or an action that an operator asked for."""

    step: int
    """The first optimizer step with this value. Of an action: the step after which it is done."""
    key: str
    value: str
    origin: str
    """`start`: a trainer started with it; `operator`: changed while the run went on."""
    unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One evaluation of one set. Its tickets were issued together, in the order of their prompts."""

    first_ticket: int
    """Id of the ticket of prompt 0."""
    eval_id: int
    """The trainer's id: completed optimizer steps."""
    eval_set: str
    num_prompts: int
    num_samples: int
    """Samples of each prompt."""
    min_version: int
    state: str
    """`running`, `done`, `released` (done, and its samples are not needed any more), or `cancelled`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRow:
    """One file of trajectories."""

    segment: int
    num_bytes: int
    """Rows refer to bytes up to here; bytes after it were never acknowledged."""
    retained: bool
    """True if the file is never deleted (written with `buffer.retain_trajectories`)."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Everything that earlier processes wrote. Empty for a new run."""

    tickets: list[Ticket] = field(default_factory=list)
    """Live tickets by id, with samples and failures. Every index without a sample is in `unleased`; `leases`
    is empty."""
    trained: list[Ticket] = field(default_factory=list)
    """TRAINED tickets whose records are not released yet, by (step, position)."""
    evaluated: list[Ticket] = field(default_factory=list)
    """EVALUATED tickets whose records are not released yet, by id."""
    evaluations: list[EvaluationRow] = field(default_factory=list)
    """The running ones, and the finished ones whose samples are kept, in the order of their requests."""
    leases: list[LeaseRow] = field(default_factory=list)
    versions: list[VersionRow] = field(default_factory=list)
    """In order of allocation."""
    scalars: dict[str, int] = field(default_factory=dict)
    returned: list[Prompt] = field(default_factory=list)
    """Prompts given back and not issued again, in the order in which they were given back."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Step -> number of trainers that began it."""
    rollbacks: list[RollbackRow] = field(default_factory=list)
    settings: list[SettingRow] = field(default_factory=list)
    """In the order in which they were made."""
    counters: dict[str, float] = field(default_factory=dict)
    ended: dict[tuple[Purpose, State, Drop | None], int] = field(default_factory=dict)
    """Number of tickets by purpose, terminal state and drop reason, including those in `trained` and
    `evaluated`. Their rows are counted, not read."""
    num_issued: int = 0
    """The largest ticket id."""
