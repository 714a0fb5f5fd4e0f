"""Start of a trainer: moves the ledger to the step of the trainer's checkpoint.

The checkpoint decides. Steps before it are trained; recorded steps from there on are served again
identically, and groups sampled with weights of later steps are dropped unless they were recorded. If the
ledger has no usable data for that step (it is new, or its steps were recorded under other settings), the
stream starts there, at the position in the order of prompts that the checkpoint contains
(`TrainerSession.stream_state`).
"""

from __future__ import annotations

from typing import Any

from areal_like.errors import RefusedError
from areal_like.wire.messages.producer import Purpose
from buffer.ledger.lifecycle import TicketLifecycle
from buffer.ledger.state import LedgerState
from buffer.storage.rows import RollbackRow
from buffer.tables.version_table import MAX_VERSION
from buffer.tickets import Drop, State

_STREAM_TYPES = {"cursor": int, "next_version": int, "pending": list, "curriculum": list}


class StreamStart:
    """Starts, rewinds or restarts the stream at a step."""

    def __init__(self, state: LedgerState, lifecycle: TicketLifecycle) -> None:
        self._state = state
        self._lifecycle = lifecycle
        self._tickets = state.tickets
        self._steps = state.steps
        self._scheduler = state.scheduler

    def start_at(self, step: int, stream: dict[str, Any], *, incarnation: int, unix_s: float) -> None:
        """Moves to `step` completed steps, for a trainer that is newer than all earlier ones.

        Raises RefusedError.
        """
        self._check(step, stream)
        self._state.versions.continue_from(stream.get("next_version", 1))
        self._steps.reset_served()
        known = min(step, max(self._steps.current, self._scheduler.num_full_steps))
        has_past = bool(self._state.trainer_incarnation)
        if has_past:
            self._move_to(known, incarnation, unix_s=unix_s)
        if not has_past or step > known or self._state.settings_changed:
            self._restart_at(step, stream)

    def cancel_from(self, step: int) -> None:
        """Drops every train ticket that is not recorded in a step before this one."""
        self._steps.uncount_from(step)
        for ticket in self._tickets.of_purpose(Purpose.TRAIN):
            if ticket.state is not State.BATCHED or ticket.step >= step:
                if ticket.state is State.BATCHED:
                    self._steps.remove(ticket)
                self._lifecycle.drop(ticket, Drop.CANCELLED)
        self._scheduler.restore((), first_step=step)

    def _check(self, step: int, stream: dict[str, Any]) -> None:
        if (
            not all(isinstance(value, _STREAM_TYPES.get(name, object)) for name, value in stream.items())
            or stream.get("next_version", 1) > MAX_VERSION
        ):
            raise RefusedError(
                "stream",
                "is not a stream state of this program: was the checkpoint made by another program version?",
            )
        num_steps, first = self._state.settings.num_steps, self._steps.first_kept
        if not 0 <= step <= num_steps:
            raise RefusedError(
                "step",
                f"want 0..{num_steps}, got {step}: raise trainer.num_steps to continue a finished run",
            )
        if self._state.trainer_incarnation and step < first:
            raise RefusedError(
                "step",
                f"this buffer can resume from step {first} or later, not {step}: "
                "the data of earlier steps is released. "
                "To go back further restart it without its ledger (move the run's ledger/ away)",
            )
        if (looping := self._steps.find_crash_loop(first=step)) is not None:
            ids = " ".join(str(ticket.ticket_id) for ticket in self._steps.tickets_of(looping))
            raise RefusedError(
                "attempts",
                f"{self._steps.attempts[looping]} trainers died in step {looping}, whose tickets are {ids}: "
                "see the trainer's log. Drop the faulty ones with `areal-like drop RUN TICKET ...` "
                "and resume with resume=latest",
            )

    def _move_to(self, step: int, incarnation: int, *, unix_s: float) -> None:
        """Moves the log to a step that the ledger contains: forward, or back with a rollback row."""
        self._steps.count_until(step)
        self._steps.commit_to(step - 1)
        undone = [ticket for ticket in self._steps.tickets_from(step) if ticket.step < self._steps.current]
        if self._state.versions.abandon(after_step=step, trainer_incarnation=incarnation) or undone:
            self._state.store.put_rollback(
                RollbackRow(
                    trainer_incarnation=incarnation,
                    from_step=self._steps.current,
                    to_step=step,
                    num_tickets=len(undone),
                    num_tokens=sum(sample.num_sampled for each in undone for sample in each.training_samples),
                    unix_s=unix_s,
                )
            )
        self._steps.move_to(step)
        self._drop_abandoned(step)

    def _drop_abandoned(self, step: int) -> None:
        """Drops unrecorded tickets of abandoned weights, and revokes leases on weights after `step`.

        Evaluations are cancelled, because the older trainer requested them.
        """
        self._lifecycle.cancel_evals()
        unrecorded = [
            ticket for ticket in self._tickets.of_purpose(Purpose.TRAIN) if ticket.state is not State.BATCHED
        ]
        for ticket in unrecorded:
            if any(map(self._state.versions.may_use_abandoned, ticket.samples.values())):
                self._lifecycle.drop(ticket, Drop.ABANDONED)
        # Only after the drops: revoking a lease frees a position, at which a ticket that has to be dropped
        # could otherwise be recorded.
        leases = [lease for ticket in unrecorded for lease in ticket.leases.values()]
        for lease in leases:
            if lease.weights_step > step:
                self._lifecycle.revoke(lease)

    def _restart_at(self, step: int, stream: dict[str, Any]) -> None:
        """Starts the stream at `step`; groups recorded from there on are cancelled."""
        prompts, state = self._state.prompts, self._state
        # The position of a checkpoint behind the ledger's cursor is not used: those prompts have been issued.
        takes_position = not state.prompts_changed and (
            stream.get("cursor", 0) > prompts.order.cursor or not state.trainer_incarnation
        )
        if takes_position:
            prompts.restart_curriculum(stream.get("curriculum", []))
        self.cancel_from(min(step, self._steps.current))
        if state.prompts_changed:
            prompts.restart(cursor=0, pending=[])
        elif takes_position:
            prompts.restart(cursor=stream.get("cursor", 0), pending=stream.get("pending", []))
        state.settings_changed = state.prompts_changed = False
        state.put_recorded_settings()
        self._scheduler.restore((), first_step=step)
        for ticket in self._steps.begin_at(step):
            state.store.release(ticket)
