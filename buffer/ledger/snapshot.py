"""A copy of the ledger's numbers at one moment, for /status and Prometheus."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from buffer.ledger.state import LedgerState
from buffer.tickets import Drop, State, Verdict


@dataclass(frozen=True, kw_only=True)
class CurriculumSnapshot:
    """Estimated solve rates of prompts (with `buffer.curriculum`)."""

    issued_solve_rate: float
    mean_solve_rate: float
    status: dict[str, float | str]


@dataclass(frozen=True, kw_only=True)
class StepAttempts:
    """A step that trainers have begun and not completed."""

    num_starts: int
    ticket_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class LedgerSnapshot:
    """Counts and positions; steps are optimizer steps."""

    trainer_step: int
    """Steps that the trainer has completed."""
    committed_steps: int
    """Steps that a durable checkpoint contains."""
    open_step: int
    """The step being recorded."""
    open_position: int
    """Groups recorded in the open step."""
    num_due: int
    """Running tickets that must be recorded in the open step at the latest."""
    max_staleness: int
    """The current staleness bound."""
    newest_version: int
    num_issued: int
    num_by_state: dict[State, int]
    drops: Counter[Drop]
    verdicts: Counter[Verdict]
    lag_histogram: Counter[int]
    counters: dict[str, float]
    attempts: dict[int, StepAttempts]
    free_samples: int
    """Samples that servers could take now."""
    num_quarantined: int
    """Servers that get no leases because of failures in a row."""
    num_bytes: int
    """Bytes of records held in memory."""
    closed_reason: str
    write_blocked_reason: str
    curriculum: CurriculumSnapshot | None

    @classmethod
    def of(cls, state: LedgerState) -> LedgerSnapshot:
        """The numbers as they are now."""
        curriculum = state.prompts.curriculum
        return cls(
            trainer_step=state.steps.current,
            committed_steps=state.steps.committed + 1,
            open_step=state.scheduler.step,
            open_position=state.scheduler.position,
            num_due=state.scheduler.num_due,
            max_staleness=state.bound.current,
            newest_version=state.versions.newest,
            num_issued=state.tickets.num_issued,
            num_by_state=state.tickets.num_by_state(),
            drops=Counter({reason: state.drops[reason] for reason in Drop}),
            verdicts=state.counters.verdicts,
            lag_histogram=state.counters.lag_histogram,
            counters=state.counters.summary(),
            attempts={
                step: StepAttempts(
                    num_starts=num_starts,
                    ticket_ids=[ticket.ticket_id for ticket in state.steps.tickets_of(step)],
                )
                for step, num_starts in sorted(state.steps.attempts.items())
            },
            free_samples=sum(max(0, server.free_samples) for server in state.leases.servers.values()),
            num_quarantined=sum(
                server.health.quarantine is not None for server in state.leases.servers.values()
            ),
            num_bytes=state.store.num_bytes,
            closed_reason=state.closed_reason,
            write_blocked_reason=state.store.write_blocked_reason,
            curriculum=None
            if curriculum is None
            else CurriculumSnapshot(
                issued_solve_rate=curriculum.issued_solve_rate,
                mean_solve_rate=curriculum.mean_solve_rate,
                status=curriculum.status(),
            ),
        )
