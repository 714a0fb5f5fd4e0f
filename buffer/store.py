"""Where arrays and ledger rows are kept. The ledger writes through this interface and reads back only arrays.

`Store` is made for a durable implementation: writes are ordered and never fail half-way from the ledger's view, and an acknowledgement is
sent only from `when_durable`, which may call back at once (memory) or after a group commit (disk). The rows name every fact that is
needed to rebuild the ledger, so a store that keeps them needs nothing else. `MemoryStore` keeps arrays only, and those only until
their step is committed: its size is bounded by the tickets in flight, however long the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from areal_like.trajectory import Trajectory
from buffer.tickets import Sample, Ticket


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionRow:
    """One allocated weights version."""

    version: int
    step: int
    """Optimizer step that these weights are the start of."""
    parent: int
    """The version allocated before it."""
    trainer_incarnation: int


class Store(Protocol):
    """Ordered writes of everything that must survive, and the arrays of live tickets."""

    def put_ticket(self, ticket: Ticket) -> None:
        """The ticket was issued or changed its state, step or leases. A terminal state releases its arrays."""

    def put_sample(self, ticket: Ticket, sample_index: int, sample: Sample, trajectory: Trajectory) -> None:
        """A sample was accepted."""

    def put_version(self, row: VersionRow) -> None:
        """A version was allocated."""

    def put_mark(self, name: str, value: int) -> None:
        """A scalar of the ledger changed: `trainer_step`, `committed_step`, `trainer_incarnation`, `cursor`, `max_staleness`."""

    def group(self, ticket: Ticket) -> list[Trajectory]:
        """All trajectories of a complete ticket, in sample order."""

    def when_durable(self, then: Callable[[], None]) -> None:
        """Calls `then` in the caller's event loop once everything written so far survives what the store promises to survive."""

    @property
    def num_bytes(self) -> int:
        """Bytes of arrays held."""


class MemoryStore:
    """Survives nothing, acknowledges at once."""

    def __init__(self) -> None:
        self._arrays: dict[int, dict[int, Trajectory]] = {}
        self._num_bytes = 0

    def put_ticket(self, ticket: Ticket) -> None:
        """Releases the arrays of a ticket that has ended; rows are not kept."""
        if ticket.state.is_terminal:
            for trajectory in self._arrays.pop(ticket.ticket_id, {}).values():
                self._num_bytes -= _num_bytes(trajectory)

    def put_sample(self, ticket: Ticket, sample_index: int, sample: Sample, trajectory: Trajectory) -> None:
        """Keeps the arrays."""
        self._arrays.setdefault(ticket.ticket_id, {})[sample_index] = trajectory
        self._num_bytes += _num_bytes(trajectory)

    def put_version(self, row: VersionRow) -> None:
        """Not kept."""

    def put_mark(self, name: str, value: int) -> None:
        """Not kept."""

    def group(self, ticket: Ticket) -> list[Trajectory]:
        """All trajectories of a complete ticket, in sample order."""
        arrays = self._arrays[ticket.ticket_id]
        return [arrays[index] for index in range(ticket.num_samples)]

    def when_durable(self, then: Callable[[], None]) -> None:
        """At once: there is nothing to wait for."""
        then()

    @property
    def num_bytes(self) -> int:
        """Bytes of arrays held."""
        return self._num_bytes


def _num_bytes(trajectory: Trajectory) -> int:
    return trajectory.tokens.nbytes + trajectory.loss_mask.nbytes + trajectory.logprobs.nbytes + trajectory.versions.nbytes
