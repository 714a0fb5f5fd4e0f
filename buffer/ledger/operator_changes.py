"""The ledger's operations for an operator: pause, cordon, unfence, drop, and changes of settings in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from areal_like.errors import RefusedError
from buffer.ledger.lifecycle import TicketRules
from buffer.storage.base import OperationRow
from buffer.tables.incarnations import TRAINER, is_impossible
from buffer.tables.live_settings import (
    ACTIONS,
    EVAL_INTERVAL,
    EVALUATE,
    LOG_LEVEL,
    MAX_STALENESS,
    canonical,
)
from buffer.tickets import Drop, State, Ticket

_MAX_ROWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change that was made."""

    key: str
    value: str
    before: str
    """The previous value; empty for an action."""
    step: int
    """The first step with this value; for an action, the step after which it is done."""


class OperatorChanges(TicketRules):
    """Changes are recorded in the table `operations`, those of settings also in `settings`.

    A dropped ticket is recorded in its own row.
    """

    def set_paused(self, is_paused: bool, *, unix_s: float) -> bool:
        """Stops granting leases of training tickets, or resumes it. Returns False if nothing changed."""
        has_changed = self._state.holds.set_paused(is_paused)
        if has_changed:
            self._record("pause" if is_paused else "resume", "training", unix_s=unix_s)
        return has_changed

    def set_cordoned(self, name: str, is_cordoned: bool, *, unix_s: float) -> bool:
        """Stops granting a server new leases, or resumes it. Returns False if nothing changed."""
        has_changed = self._state.holds.set_cordoned(name, is_cordoned)
        if has_changed:
            self._record("cordon" if is_cordoned else "uncordon", name, unix_s=unix_s)
            if (server := self._leases.servers.get(name)) is not None:
                server.is_cordoned = is_cordoned
        return has_changed

    def change_settings(self, wanted: Mapping[str, str], *, unix_s: float) -> list[Change]:
        """Makes all changes, or none: raises RefusedError(key, reason).

        A setting applies from the first step that no trainer has begun; `max_staleness` and the log level
        also take effect at once. An action is done after the step in training.
        """
        state = self._state
        is_training = not state.closed_reason
        first = state.steps.current + is_training
        values = {key: canonical(key, text) for key, text in wanted.items()}
        for key, value in values.items():
            self._check(key, value, step=state.steps.current if key in ACTIONS else first)
        changes = []
        for key, value in values.items():
            step = state.steps.current if key in ACTIONS else first
            if key in ACTIONS:
                state.live.ask(key, step=step, unix_s=unix_s)
                before = ""
            else:
                before = state.live.change(key, value, step=step, unix_s=unix_s) or ""
            if key == MAX_STALENESS:
                state.bound.current = int(value)
            if before != value:
                when = f"after step {step}" if key in ACTIONS else f"{before} -> {value} from step {step}"
                self._record("set", key, detail=when, unix_s=unix_s)
            changes.append(Change(key=key, value=value, before=before, step=step))
        return changes

    def unfence(self, name: str, *, unix_s: float) -> str:
        """Takes a name from the process that holds it, for an operator; the next new process gets it. `name`:
        the name of a rollout server, or TRAINER. Returns a description of the change.
        """
        newest_used = self._versions.newest_incarnation if name == TRAINER else 0
        before, after = self._state.incarnations.unfence(name, floor=newest_used)
        if name != TRAINER:
            self._lifecycle.lose_leases(self._leases.remove_server(name))
        elif is_impossible(self._state.trainer_incarnation):
            self._state.set_trainer(after)
        detail = f"incarnation {before} -> {after}"
        self._record("unfence", name, detail=detail, unix_s=unix_s)
        return detail

    def poison(self, ticket_ids: Sequence[int]) -> None:
        """Removes tickets from their steps, for an operator; other groups take their positions.

        The trainer may already have trained on one of them, so its incarnation becomes stale and it has to
        restart from its checkpoint. Removes all tickets or raises RefusedError(ticket_id, reason). Tickets of
        other shards are ignored, except that the counts of attempts of all steps are reset.
        """
        shard, steps = self._settings.shard, self._steps
        wanted = dict.fromkeys(ticket_ids)
        own = [ticket_id for ticket_id in wanted if shard.owns(ticket_id)]
        tickets = [self._recorded_ticket(ticket_id) for ticket_id in own]
        if len(own) < len(wanted):
            for step in list(steps.attempts):
                steps.reset_attempts(step)
        for ticket in tickets:
            if ticket.state is State.CLOSED:
                self._lifecycle.drop(ticket, Drop.POISON)
                continue
            steps.uncount_from(ticket.step)
            steps.remove(ticket)
            steps.reset_attempts(ticket.step)
            self._scheduler.free((ticket.step, ticket.position))
            self._lifecycle.drop(ticket, Drop.POISON)
        if tickets:
            self._state.set_trainer(self._state.trainer_incarnation + 1)
            self._lifecycle.record_ready_groups()

    def _check(self, key: str, value: str, *, step: int) -> None:
        state, settings = self._state, self._settings
        if len(state.live.rows) >= _MAX_ROWS:
            raise RefusedError(
                key, f"this run has {_MAX_ROWS} changes already: stop it, and resume it with this"
            )
        if state.is_finished or (step >= settings.num_steps and key != LOG_LEVEL):
            raise RefusedError(key, "the last step has begun: nothing can be changed any more")
        if key == MAX_STALENESS:
            least, cap = max(settings.sync_interval - 1, int(settings.closes)), settings.staleness_cap
            if settings.adaptive:
                raise RefusedError(key, "it follows the effective sample size (max_staleness=auto)")
            if value == "auto" or not least <= int(value) <= cap:
                raise RefusedError(key, f"want {least}..{cap}: the run was started with {cap}")
            return
        base = EVAL_INTERVAL if key == EVALUATE else key
        if key not in ACTIONS or key == EVALUATE:
            configured = state.live.configured(base)
            if configured is None:
                raise RefusedError(key, "no trainer has started yet: start it with this setting")
            if base == EVAL_INTERVAL and int(configured) == 0:
                raise RefusedError(key, "evaluations are off in this run (eval.num_prompts=0)")
        if key == EVAL_INTERVAL and int(value) < 1:
            raise RefusedError(key, f"want a whole number of at least 1, got {value}")

    def _recorded_ticket(self, ticket_id: int) -> Ticket:
        """A ticket that an operator may remove: a recorded one, or a closed group, of which the samples that
        are in no position are given up. Raises RefusedError(ticket_id, reason)."""
        ticket = self._tickets.live.get(ticket_id)
        if ticket is not None and ticket.state is State.CLOSED and len(ticket.placed) < ticket.num_samples:
            return ticket
        if (group := self._parts.groups.get(ticket_id)) is not None:
            raise RefusedError(str(ticket_id), self._positions_of(group))
        if ticket is None or ticket.state is not State.BATCHED:
            state = f"{ticket.state.value}" if ticket else "ended, or was never issued"
            raise RefusedError(
                str(ticket_id), f"is not recorded in a step that is still to be trained: it is {state}"
            )
        if ticket.step < self._steps.current:
            raise RefusedError(
                str(ticket_id),
                f"was trained on in step {ticket.step}, and is part of the weights: "
                f"go back with resume=step:K, K <= {ticket.step}, first",
            )
        return ticket

    def _positions_of(self, group: Ticket) -> str:
        """Where the samples of a closed group are."""
        recorded = {ticket.ticket_id: ticket for ticket in self._steps.tickets_from(0)}
        positions = [recorded[key] for key in sorted({*group.placed.values()}) if key in recorded]
        places = ", ".join(f"{ticket.ticket_id} (step {ticket.step})" for ticket in positions)
        return (
            "is a group that was closed; its samples are trained on in positions that are tickets of their "
            f"own: {places or 'none so far'}. Drop those"
        )

    def _record(self, verb: str, subject: str, *, unix_s: float, detail: str = "") -> None:
        row = OperationRow(unix_s=unix_s, verb=verb, subject=subject, detail=detail)
        self._store.put_row(row)
