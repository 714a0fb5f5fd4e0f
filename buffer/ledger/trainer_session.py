"""The ledger's operations for the trainer: start, versions, groups, completed and committed steps.

Steps are absolute (a run that resumes after K steps begins at step K). Only the newest trainer incarnation
may change the ledger; requests of older ones raise StaleIncarnationError.

When a trainer starts, its checkpoint is authoritative: steps before it count as trained; recorded steps from
there on are served again unchanged, and groups sampled with weights of later steps are dropped unless they
were recorded. If the ledger has no usable data for that step (it is new, or its steps were recorded under
other settings), the stream starts there, at the position in the order of prompts that the checkpoint
contains (`stream_state`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from areal_like.config.evaluation import DEFAULT_SET
from areal_like.errors import RefusedError, RunFinishedError, StaleIncarnationError
from areal_like.wire.messages.consumer import ClosedGroup, EarlyMember, Group, StepSettings
from areal_like.wire.messages.evaluation import EvalResult
from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import sampled_versions
from areal_like.wire.routes import RoutesShape
from buffer.ledger.lifecycle import TicketRules
from buffer.prompts.order import Prompt
from buffer.storage.base import EvaluationRow, RollbackRow
from buffer.tables.evaluations import RUNNING, check_request
from buffer.tables.live_settings import (
    CHECKPOINT,
    EVAL_INTERVAL,
    EVALUATE,
    LR,
    MAX_STALENESS,
    canonical,
)
from buffer.tables.version_table import MAX_VERSION
from buffer.tickets import Drop, State, Ticket

_STREAM_TYPES = {"cursor": int, "next_version": int, "pending": list, "curriculum": list}


class TrainerSession(TicketRules):
    """CLOSED (no trainer) -> start_training -> OPEN -> close -> CLOSED.

    Fetches and evaluations work in both states.
    """

    def refuse_older_trainer(self, incarnation: int) -> None:
        """Raises StaleIncarnationError if a newer trainer has started."""
        newest = self._state.trainer_incarnation
        if incarnation < newest:
            raise StaleIncarnationError(
                f"trainer was replaced: its incarnation is {incarnation}, the newest is {newest}"
            )

    def start_training(
        self,
        *,
        incarnation: int,
        step: int,
        stream: dict[str, Any],
        settings: Mapping[str, str] = MappingProxyType({}),
        routes_shape: RoutesShape | None = None,
        unix_s: float = 0.0,
    ) -> None:
        """A trainer starts with `step` completed steps; older trainers are refused from now on. Idempotent.

        Raises RunFinishedError if the run is finished and this is its last step; an earlier step reopens it.
        `stream`: the `stream_state` in its checkpoint; empty without a checkpoint. `settings`: the trainer's
        values of the settings that may change during the run. `routes_shape`: what the routes of samples must
        be like; None: not known.
        """
        self.refuse_older_trainer(incarnation)
        if incarnation == self._state.trainer_incarnation:
            return
        base = {key: canonical(key, value) for key, value in settings.items()}
        if self._state.is_finished:
            if step >= self._settings.num_steps:
                raise RunFinishedError("the run is finished")
            self._state.set_finished(False)
        self._start_at(step, stream, incarnation=incarnation, unix_s=unix_s)
        self._state.set_trainer(incarnation)
        self._state.set_routes_shape(routes_shape)
        self._state.live.begin(step, base | self._state.configured, unix_s=unix_s)
        self._state.set_closed("")
        self._lifecycle.record_ready_groups()

    def alloc_version(self, *, incarnation: int, step: int) -> int:
        """Allocates a new version number for the weights that `step` starts from."""
        self._check_current(incarnation)
        self._check_weights_step(step)
        if self._settings.shard.index:
            raise RefusedError(
                "shard",
                "this buffer cannot allocate versions: only the first one does, and the others adopt them",
            )
        return self._versions.allocate(step=step, trainer_incarnation=incarnation)

    def adopt_version(self, *, incarnation: int, version: int, step: int) -> None:
        """Adds a version that the first shard allocated. Call it before the push. Idempotent."""
        self._check_current(incarnation)
        self._check_weights_step(step)
        if not self._settings.shard.index:
            raise RefusedError("shard", "the first buffer allocates versions; it cannot adopt them")
        if not self._versions.adopt(version, step=step, trainer_incarnation=incarnation):
            raise RefusedError(
                "version",
                f"version {version} was not allocated for step {step}, and a new version must be in "
                f"{self._versions.newest + 1}..{MAX_VERSION}",
            )

    def settings_of(self, *, incarnation: int, step: int) -> StepSettings:
        """The settings that may change during the run, as of a step; repeated requests return the same.

        Raises RefusedError for a step that may still change: one after the step in training.
        """
        self._check_current(incarnation)
        if not 0 <= step <= self._steps.current:
            raise RefusedError(
                "step",
                f"the settings of step {step} are not fixed yet; only those of steps "
                f"0..{self._steps.current} are",
            )
        live = self._state.live
        bound = live.at(MAX_STALENESS, step)
        return StepSettings(
            step=step,
            lr=float(live.at(LR, step) or 0.0),
            eval_interval=int(live.at(EVAL_INTERVAL, step) or 0),
            max_staleness=self._bound.current if bound in (None, "auto") else int(bound),
            evaluate=live.is_asked(EVALUATE, step - 1),
            checkpoint=live.is_asked(CHECKPOINT, step - 1),
        )

    def fetch(self, *, step: int, position: int) -> Group | None:
        """The group recorded at (step, position), always the same one; None: not recorded yet.

        `position` counts the groups of the step over all shards.
        """
        first, last = self._steps.committed + 1, self._settings.num_steps - 1
        if not first <= step <= last:
            raise RefusedError("step", f"step {step} is not served; only steps {first}..{last} are")
        shard, num_own = self._settings.shard, self._settings.groups_per_step
        if not shard.owns(position) or not 0 <= shard.local(position) < num_own:
            raise RefusedError(
                "position",
                f"{position} is not one of the {num_own} positions that {shard.name} fills in a step",
            )
        ticket = self._steps.recorded.get(step, {}).get(shard.local(position))
        if ticket is None:
            return None
        records = self._store.records_of(ticket)
        self._steps.mark_served(step, shard.local(position))
        return Group(
            step=step,
            position=position,
            ticket_id=ticket.ticket_id,
            prompt_index=ticket.prompt_index,
            records=records,
            version_steps=[ticket.samples[index].oldest_step for index in range(ticket.num_samples)],
            max_staleness=ticket.max_staleness,
            versions=(versions := sampled_versions(records)),
            steps=[self._versions.weights_of(version)[0] for version in versions],
            begin_step=ticket.begin_step,
            closed=self._closed_groups(ticket),
        )

    def _closed_groups(self, position: Ticket) -> list[ClosedGroup]:
        """What the baselines of a position's parts are computed from; empty for a whole group."""
        groups = [self._parts.groups[ticket_id] for ticket_id in sorted({key for key, _ in position.parts})]
        return [
            ClosedGroup(
                ticket_id=group.ticket_id,
                prompt_index=group.prompt_index,
                begin_step=group.begin_step,
                early=[
                    EarlyMember(
                        sample_index=index,
                        reward=group.samples[index].reward,
                        num_sampled=group.samples[index].num_sampled,
                        is_truncated=group.samples[index].is_truncated,
                    )
                    for index in group.early
                ],
            )
            for group in groups
        ]

    def complete_step(self, *, incarnation: int, step: int) -> None:
        """The trainer finished optimizer step `step`. Idempotent."""
        self._check_current(incarnation)
        if step < self._steps.current:
            return
        num_full = self._scheduler.num_full_steps
        if step > self._steps.current or step >= num_full:
            raise RefusedError(
                "step",
                f"step {step} cannot be complete: step {self._steps.current} is in training and step "
                f"{num_full} is still being recorded",
            )
        self._steps.count_until(step + 1)
        self._steps.complete_current()
        if self._settings.closes:
            self._state.admission.step_done()
        self._lifecycle.record_ready_groups()

    def commit(self, *, incarnation: int, step: int, oldest_kept_step: int = 0) -> None:
        """Steps <= `step` are in a durable checkpoint: their tickets are TRAINED. Idempotent.

        `oldest_kept_step`: completed steps of the oldest checkpoint on disk. Records of earlier steps are
        released; without a durable store, the records of all trained steps.
        """
        self._check_current(incarnation)
        if step >= self._steps.current:
            raise RefusedError(
                "step", f"step {step} cannot be committed: only {self._steps.current} steps are complete"
            )
        if step > self._steps.committed:
            self._steps.commit_to(step)
        first_uncommitted = self._steps.committed + 1
        keep_from = min(oldest_kept_step, first_uncommitted) if self._settings.durable else first_uncommitted
        for ticket in self._steps.release_before(keep_from):
            self._lifecycle.release(ticket)
        self._tickets.check_conservation()

    def finish(self, *, incarnation: int) -> None:
        """The last step, its checkpoint and the last evaluation are done. Idempotent."""
        self._check_current(incarnation)
        num_done, num_steps = self._steps.committed + 1, self._settings.num_steps
        if num_done < num_steps:
            raise RefusedError(
                "step", f"cannot finish the run: only {num_done} of {num_steps} steps are committed"
            )
        self._state.set_finished(True)

    def stream_state(self, *, step: int) -> dict[str, int | list[int]]:
        """The stream's position to save in a checkpoint with the steps <= `step`, for `start_training`."""
        pending = [
            ticket.prompt_index
            for ticket in self._tickets.of_purpose(Purpose.TRAIN)
            if not ticket.parts
            and not ticket.placed
            and (ticket.state is not State.BATCHED or ticket.step > step)
        ]
        return self._state.prompts.state(pending) | {"next_version": self._versions.newest + 1}

    def close(self, reason: str) -> None:
        """Stops granting leases of train tickets until a trainer starts. Evaluations continue.

        A durable ledger keeps all tickets and only revokes their leases. A ledger in memory cancels every
        ticket outside completed steps, and gives the prompts back.
        """
        self._state.set_closed(reason)
        self._steps.trainer_left_cleanly()
        if self._settings.durable:
            train = self._tickets.of_purpose(Purpose.TRAIN)
            for lease in [lease for ticket in train for lease in ticket.leases.values()]:
                self._lifecycle.revoke(lease)
        else:
            self._cancel_from(self._steps.current)
        self._lifecycle.record_ready_groups()

    def set_max_staleness(self, *, incarnation: int, max_staleness: int) -> None:
        """Sets the bound of new tickets (`max_staleness: auto`); earlier tickets keep theirs."""
        self._check_current(incarnation)
        cap = self._settings.staleness_cap
        if not self._settings.adaptive:
            raise RefusedError(
                "max_staleness",
                f"the bound cannot change: it is fixed at {cap} in this buffer; start all roles with "
                "max_staleness=auto",
            )
        if not 0 <= max_staleness <= cap:
            raise RefusedError("max_staleness", f"want 0..{cap} (max_staleness_cap), got {max_staleness}")
        self._bound.current = max_staleness
        self._store.put_scalar("max_staleness", max_staleness)

    def request_eval(
        self,
        *,
        eval_id: int,
        num_prompts: int,
        min_version: int,
        eval_set: str = DEFAULT_SET,
        num_samples: int = 1,
    ) -> EvalResult | None:
        """Starts an evaluation of a set unless it is known. Returns its result, or None while it runs.

        A finished evaluation of an earlier trainer, which a restarted buffer has found in its store, counts
        as a different one if its weights or its size differ.
        """
        round_ = self._evals.requested(
            (eval_id, eval_set), size=(num_prompts, num_samples), min_version=min_version
        )
        if round_ is None:
            check_request(eval_set, num_prompts=num_prompts, num_samples=num_samples)
            tickets = [
                self._tickets.issue(
                    Purpose.EVAL,
                    Prompt(index=index),
                    num_samples=num_samples,
                    eval_id=eval_id,
                    eval_set=eval_set,
                )
                for index in range(num_prompts)
            ]
            self._tickets.check_conservation()
            row = EvaluationRow(
                first_ticket=tickets[0].ticket_id,
                eval_id=eval_id,
                eval_set=eval_set,
                num_prompts=num_prompts,
                num_samples=num_samples,
                min_version=min_version,
                state=RUNNING,
            )
            self._evals.begin(row, tickets)
            return None
        return (
            round_.result(lambda version: self._versions.weights_of(version)[0]) if round_.is_done else None
        )

    def _check_current(self, incarnation: int) -> None:
        """Raises unless this is the trainer that started last."""
        self.refuse_older_trainer(incarnation)
        if incarnation > self._state.trainer_incarnation:
            raise RefusedError("incarnation", "this trainer has not started: send StartTraining first")

    def _check_weights_step(self, step: int) -> None:
        newest = min(self._steps.current + 1, self._scheduler.step)
        if not 0 <= step <= newest:
            raise RefusedError(
                "step",
                f"weights of step {step} cannot exist yet: the newest possible weights are of step {newest}",
            )

    def _start_at(self, step: int, stream: dict[str, Any], *, incarnation: int, unix_s: float) -> None:
        """Moves to `step` completed steps, for a trainer that is newer than all earlier ones.

        Raises RefusedError.
        """
        self._check_start(step, stream)
        self._versions.continue_from(stream.get("next_version", 1))
        self._steps.reset_served()
        known = min(step, max(self._steps.current, self._scheduler.num_full_steps))
        has_past = bool(self._state.trainer_incarnation)
        if has_past:
            self._move_to(known, incarnation, unix_s=unix_s)
        if not has_past or step > known or self._state.settings_changed:
            self._restart_at(step, stream)

    def _cancel_from(self, step: int) -> None:
        """Drops every train ticket that is not recorded in a step before this one."""
        self._steps.uncount_from(step)
        for ticket in self._tickets.of_purpose(Purpose.TRAIN):
            if ticket.state is not State.BATCHED or ticket.step >= step:
                if ticket.state is State.BATCHED:
                    self._steps.remove(ticket)
                self._lifecycle.drop(ticket, Drop.CANCELLED)
        self._scheduler.restore((), first_step=step)

    def _check_start(self, step: int, stream: dict[str, Any]) -> None:
        if (
            not all(isinstance(value, _STREAM_TYPES.get(name, object)) for name, value in stream.items())
            or stream.get("next_version", 1) > MAX_VERSION
        ):
            raise RefusedError(
                "stream",
                "is not a stream state of this program: was the checkpoint made by a different version of "
                "this program?",
            )
        num_steps, first = self._settings.num_steps, self._steps.first_kept
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
                "To resume from an earlier step, restart it without its ledger (move the run's ledger/ away)",
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
        if self._versions.abandon(after_step=step, trainer_incarnation=incarnation) or undone:
            self._store.put_row(
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
        may_use_abandoned = self._versions.may_use_abandoned
        for ticket in unrecorded:
            abandoned = [index for index, one in ticket.samples.items() if may_use_abandoned(one)]
            if ticket.state is State.CLOSED:
                self._lifecycle.give_up(ticket, abandoned, Drop.ABANDONED)
            elif abandoned:
                self._lifecycle.drop(ticket, Drop.ABANDONED)
        # Only after the drops: revoking a lease frees a position, at which a ticket that has to be dropped
        # could otherwise be recorded.
        leases = [lease for ticket in unrecorded for lease in list(ticket.leases.values())]
        for lease in leases:
            if lease.weights_step > step:
                self._lifecycle.revoke(lease)
        for ticket in unrecorded:
            if begun_later := [index for index, one in ticket.journals.items() if one.oldest_step > step]:
                self._lifecycle.forget_journals(ticket, begun_later)
                self._lifecycle.requeue(ticket, ())

    def _restart_at(self, step: int, stream: dict[str, Any]) -> None:
        """Starts the stream at `step`; groups recorded from there on are cancelled."""
        prompts, state = self._state.prompts, self._state
        # A checkpoint's position before the ledger's cursor is not used: those prompts have already been
        # issued.
        takes_position = not state.prompts_changed and (
            stream.get("cursor", 0) > prompts.order.cursor or not state.trainer_incarnation
        )
        if takes_position:
            prompts.restart_curriculum(stream.get("curriculum", []))
        self._cancel_from(min(step, self._steps.current))
        if state.prompts_changed:
            prompts.restart(cursor=0, pending=[])
        elif takes_position:
            prompts.restart(cursor=stream.get("cursor", 0), pending=stream.get("pending", []))
        state.settings_changed = state.prompts_changed = False
        state.put_recorded_settings()
        self._scheduler.restore((), first_step=step)
        for ticket in self._steps.begin_at(step):
            self._lifecycle.release(ticket)
