"""Rows that a store gives back after a restart. Plain data."""

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
    """Optimizer steps completed when these weights were made: they are the start of this step."""
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
    """Sample indices as last written; one that has a sample row by now is not outstanding any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackRow:
    """Training that was undone: a trainer resumed at an earlier step than the last complete one."""

    trainer_incarnation: int
    """Of the trainer that resumed."""
    from_step: int
    """Steps that were complete."""
    to_step: int
    """Steps that the resumed checkpoint contains."""
    num_tickets: int
    """Tickets trained on in the steps between."""
    num_tokens: int
    """Sampled tokens in them."""
    unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRow:
    """One file of trajectories."""

    segment: int
    num_bytes: int
    """Rows refer to bytes up to here; what follows was never acknowledged."""
    retained: bool
    """Kept for good, whether its trajectories are needed or not (`buffer.retain_trajectories`)."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Everything that earlier processes wrote. Empty for a new run."""

    tickets: list[Ticket] = field(default_factory=list)
    """Live ones by id, with samples and failures. Every index without a sample is in `unleased`; `leases` is
    empty."""
    trained: list[Ticket] = field(default_factory=list)
    """TRAINED ones whose records are not released yet, by (step, position)."""
    leases: list[LeaseRow] = field(default_factory=list)
    versions: list[VersionRow] = field(default_factory=list)
    """In order of allocation."""
    scalars: dict[str, int] = field(default_factory=dict)
    returned: list[Prompt] = field(default_factory=list)
    """Prompts given back and not issued again, in the order in which they were given back."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Step -> number of trainers that began it."""
    rollbacks: list[RollbackRow] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    ended: dict[tuple[Purpose, State, Drop | None], int] = field(default_factory=dict)
    """Number of tickets in each terminal state (those of `trained` included): their rows are counted, not
    read."""
    num_issued: int = 0
    """The largest ticket id."""
