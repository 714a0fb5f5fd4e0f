"""The life cycle of a ticket: every transition between its states, applied to all tables together.

    train                  sample failed, lease lost
                        +-----------------------------+
                        v                             |
          issue --> QUEUED --lease--> LEASED ---------+
                        |               | last sample, filter passed       commit(step)
                        |               v                                  ------------>
                        |             READY --record--> BATCHED(step, position)       TRAINED
                        |               |                   |              <------------
                        |               |                   |       a trainer resumes before the commit
                        +---------------+-------------------+--> DROPPED(reason); from BATCHED
                                                                 only as poison or cancelled
    close QUEUED, LEASED --overdue--> CLOSED --every sample is in a position, or given up--> SPLIT | DROPPED
          samples of closed groups --as many as a group has--> READY --record--> BATCHED(step, position)
    eval  issue --> QUEUED <--> LEASED --> every sample has arrived or failed for good:
                                           EVALUATED | DROPPED(failed: all of them | cancelled)

    issued == queued + leased + ready + closed + batched + trained + evaluated + split + dropped, checked
    after every operation.

The transition to and from TRAINED is `StepLog.commit_to`. Ended tickets leave memory; the store has their
rows.

Closing (`buffer.overdue=close`): a group begins with its first lease, under weights of some step, and is
closed when the trainer begins the step `min(close_after, bound) - 1` later, whatever its samples say: a time
that does not depend on their completions adds no bias. Its samples are *parts* from then on. `group_size`
parts fill one position, which is a ticket of its own, so a step has the same number of positions and of
samples as without parts. Each sample enters one position. The staleness bound holds for each token: the
position records the bound that is in force, older tokens are not trained on, and a part without a token
within the bound is given up. Once the last step is full, all other tickets are cancelled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from areal_like.wire.messages.producer import Lease, Purpose
from buffer.ledger.state import LedgerPart, LedgerState
from buffer.prompts.order import Prompt, evaluation_seed, sampling_seed
from buffer.tables.lease_table import Server
from buffer.tickets import REISSUED, Drop, LeaseRecord, State, Ticket


class TicketLifecycle(LedgerPart):
    """Transitions of single tickets.

    Operations that can make a group ready or stale, or open a position for one, end with
    `record_ready_groups`.
    """

    def __init__(self, state: LedgerState) -> None:
        super().__init__(state)
        self._settled: tuple[object, ...] = ()
        """The `_situation` in which nothing was left to record."""

    def issue_train(self) -> Ticket:
        """Issues a train ticket for the next prompt: QUEUED."""
        return self._tickets.issue(
            Purpose.TRAIN,
            self._state.prompts.next(),
            num_samples=self._settings.group_size + self._settings.num_greedy,
            num_greedy=self._settings.num_greedy,
            max_staleness=self._bound.current,
        )

    def lease(self, ticket: Ticket, server: Server, weights_step: int, *, now_s: float) -> Lease:
        """Leases the unleased samples of a ticket to a server: LEASED. Returns the message for the server.

        Samples of an eval ticket, which may be many, are leased only as far as the server has room for them.
        """
        is_eval = ticket.purpose is Purpose.EVAL
        max_samples = max(1, server.free_samples) if is_eval else None
        lease = self._leases.grant(
            server, ticket, weights_step=weights_step, now_s=now_s, max_samples=max_samples
        )
        if ticket.begin_step < 0 and self._settings.closes and not is_eval:
            self._begin(ticket, weights_step)
        if ticket.state is not State.CLOSED:
            self._tickets.move(ticket, State.LEASED)
        if is_eval and ticket.unleased:
            self._evals.requeue(ticket)
        self._track(ticket)
        indices = sorted(lease.outstanding)
        return Lease(
            lease_id=lease.lease_id,
            ticket_id=ticket.ticket_id,
            prompt_index=ticket.prompt_index,
            purpose=ticket.purpose,
            sample_indices=indices,
            greedy_indices=[index for index in indices if ticket.is_greedy(index)],
            seed=self._seed(ticket),
            eval_set=ticket.eval_set,
            sessions=[index for index in indices if index in ticket.journals],
        )

    def forget_journals(self, ticket: Ticket, sample_indices: Iterable[int]) -> None:
        """The sessions of these samples are not to be continued."""
        for index in sample_indices:
            if (journal := ticket.journals.pop(index, None)) is not None:
                self._state.num_journal_bytes -= journal.num_bytes
                self._store.forget_journal(ticket.ticket_id, index)

    def _seed(self, ticket: Ticket) -> int:
        if ticket.purpose is Purpose.EVAL:
            return evaluation_seed(self._settings.seed, ticket.eval_set, ticket.prompt_index)
        return sampling_seed(self._settings.seed, ticket.ticket_id, sum(ticket.num_failures.values()))

    def remove_from_lease(self, ticket: Ticket, lease_id: int, sample_index: int, *, arrived: bool) -> None:
        """Removes a sample from its lease because it arrived or failed; an empty lease ends."""
        self.forget_journals(ticket, [sample_index])
        if self._leases.remove_sample(ticket.leases[lease_id], sample_index, arrived=arrived):
            del ticket.leases[lease_id]

    def requeue(self, ticket: Ticket, sample_indices: Collection[int]) -> None:
        """Queues samples (maybe none) to be leased again; a ticket with other leases stays LEASED."""
        ticket.unleased.update(sample_indices)
        if sample_indices and ticket.purpose is Purpose.EVAL:
            self._evals.requeue(ticket)
        elif sample_indices:
            self._state.admission.add_waiting(ticket)
        if ticket.state is State.CLOSED:
            return
        if not (ticket.leases or ticket.samples or ticket.journals):
            ticket.begin_step = ticket.close_step = -1
        state = State.LEASED if ticket.leases else State.QUEUED
        if ticket.state is not state:
            self._tickets.move(ticket, state)
        self._track(ticket)

    def lose_leases(self, leases: Iterable[LeaseRecord]) -> None:
        """Requeues the missing samples of leases that have ended; samples that arrived are kept."""
        for lease in leases:
            self._counters.count("num_leases_lost")
            ticket = self._tickets.live[lease.ticket_id]
            del ticket.leases[lease.lease_id]
            self.requeue(ticket, lease.outstanding)
        self.record_ready_groups()

    def revoke(self, lease: LeaseRecord) -> None:
        """Takes a lease away from its server; its samples are leased again later."""
        if lease.lease_id not in self._leases.live:
            return  # an earlier revocation has filled the last step, which ends all other leases
        self._leases.revoke(lease)
        self.lose_leases([lease])

    def mark_ready(self, ticket: Ticket) -> None:
        """All samples have arrived and passed the group filter: READY."""
        self._tickets.move(ticket, State.READY)
        self._add_ready(ticket)

    def end_eval_sample(self, ticket: Ticket) -> None:
        """A sample of an eval ticket has arrived or failed for good; after the last: EVALUATED or DROPPED."""
        if len(ticket.samples) + len(ticket.failed) < ticket.num_samples:
            self.requeue(ticket, ())
        elif ticket.samples:
            self._tickets.move(ticket, State.EVALUATED)
            self._evals.end(ticket)
            self._check_evals()
        else:
            self.drop(ticket, Drop.FAILED)

    def drop(self, ticket: Ticket, reason: Drop, *, may_reissue: bool = True) -> None:
        """Drops a ticket, aborts its leases, and gives its prompt back if the reason and `may_reissue` allow
        it. Of a closed group, gives up the samples that are not in a position; if none is, the group ends as
        dropped, and its prompt is given back only if it was cancelled."""
        if ticket.state is State.CLOSED:
            self.give_up(ticket, range(ticket.num_samples), reason)
            return
        for lease in ticket.leases.values():
            self._leases.revoke(lease)
        ticket.leases.clear()
        self.forget_journals(ticket, list(ticket.journals))
        self._scheduler.remove(ticket.ticket_id)
        ticket.drop = reason
        self._state.drops[reason] += 1
        self._counters.count_dropped(ticket, reason)
        self._tickets.move(ticket, State.DROPPED)
        if ticket.purpose is Purpose.EVAL:
            self._evals.end(ticket)
        elif ticket.parts:
            self._release_groups_of(ticket)
        elif reason is Drop.CANCELLED:
            self._give_back_prompt(ticket, num_reissues=ticket.num_reissues)
        elif reason in REISSUED and may_reissue and ticket.num_reissues < self._settings.buffer.max_reissues:
            self._counters.count("num_reissued")
            self._give_back_prompt(ticket, num_reissues=ticket.num_reissues + 1)
        elif reason in REISSUED:
            self._counters.count("prompts_given_up")

    def cancel_evals(self) -> None:
        """Drops the tickets of running evaluations: the trainer that requested them has been replaced."""
        for ticket in self._evals.cancel(lambda row: True):
            self.drop(ticket, Drop.CANCELLED)
        self._evals.forget_results()
        self._check_evals()

    def cancel_unusable_evals(self) -> None:
        """After a restart: drops the tickets of evaluations that the current configuration does not have."""
        evals, sets = self._evals, self._settings.eval_sets
        is_other_job = self._state.settings_changed
        over = evals.cancel(lambda row: is_other_job or sets.get(row.eval_set) != row.num_samples)
        # Earlier releases have left tickets without a row of their evaluation.
        over += [ticket for ticket in self._tickets.of_purpose(Purpose.EVAL) if ticket not in evals]
        for ticket in dict.fromkeys(over):
            self.drop(ticket, Drop.CANCELLED)
        self._check_evals()

    def _check_evals(self) -> None:
        """Asserts that every live eval ticket belongs to a running evaluation. Linear in the evaluations."""
        num_live = self._tickets.count(Purpose.EVAL, State.QUEUED, State.LEASED)
        num_open = self._evals.num_open
        assert num_live == num_open, f"{num_live} eval tickets are live, evaluations have {num_open}"

    def readmit(self, ticket: Ticket) -> None:
        """Adds a recovered train ticket to the waiting, running or ready tickets, by its state."""
        begun_at = ticket.oldest_possible_step
        is_running = ticket.state is not State.BATCHED and not ticket.parts
        if self._settings.closes and is_running and ticket.begin_step < 0 and begun_at is not None:
            self._begin(ticket, begun_at)  # it began under another rule
        if ticket.state is State.READY:
            self._add_ready(ticket)
        elif ticket.state is not State.BATCHED:
            if ticket.unleased:
                self._state.admission.add_waiting(ticket)
            self._track(ticket)

    def record_ready_groups(self) -> None:
        """Closes or drops overdue tickets, and records ready groups and parts, until nothing changes.

        Then checks conservation. Most samples change nothing that could make a ticket overdue or recordable.
        """
        if self._settled != self._situation:
            self._record_until_settled()
            self._settled = self._situation
        if changes := self._counters.take_changes():
            self._store.put_counters(changes)
        self._tickets.check_conservation()

    @property
    def _situation(self) -> tuple[object, ...]:
        """Everything that decides whether a ticket is overdue or can be recorded now."""
        state = self._state
        return (
            self._scheduler.num_changes,
            self._parts.num_loose,
            state.steps.current,
            self._bound.current,
            state.settings_changed,
        )

    def _record_until_settled(self) -> None:
        steps = self._steps
        while not self._state.settings_changed:
            first = steps.current if self._settings.closes else self._scheduler.num_full_steps
            if (overdue := self._scheduler.next_overdue(first)) is not None:
                ticket = self._tickets.live[overdue]
                self._close(ticket) if self._settings.closes else self._drop_stale(ticket)
            elif (position := self._next_position_of_parts()) is not None:
                self._record(position)
            elif (ready := self._scheduler.next_to_record(trainer_step=steps.current)) is not None:
                self._record(self._tickets.live[ready])
            else:
                break
        if self._scheduler.num_full_steps >= self._settings.num_steps and (
            self._settings.closes or self._tickets.count(Purpose.TRAIN, State.CLOSED)
        ):
            self._cancel_rest()

    def add_late(self, group: Ticket, sample_index: int) -> None:
        """A sample of a closed group has arrived."""
        self._parts.add(group, sample_index, was_late=True)
        self._counters.count("samples_late")

    def give_up(self, group: Ticket, sample_indices: Iterable[int], reason: Drop) -> None:
        """Gives up those of a closed group's samples that are not in a position; after the last, ends the
        group."""
        for index in sample_indices:
            if index in group.placed or index in group.failed:
                continue
            if index in group.samples:
                self._counters.count_given_up_sample(group.samples[index], reason)
            self.forget_journals(group, [index])
            self._parts.give_up(group, index)
            self._store.put_failure(group, index)
            group.unleased.discard(index)
        for lease in list(group.leases.values()):
            if lease.outstanding <= group.failed:
                self._leases.revoke(lease)
                del group.leases[lease.lease_id]
        self._end_if_over(group, reason)

    def release(self, ticket: Ticket) -> None:
        """No checkpoint needs this recorded ticket any more."""
        self._store.release(ticket)
        self._release_groups_of(ticket)

    def _begin(self, ticket: Ticket, weights_step: int) -> None:
        """A train ticket begins under these weights, which decides when it is closed."""
        ticket.begin_step = weights_step
        ticket.close_step = weights_step + max(1, min(self._settings.close_after, self._bound.current)) - 1

    def _cancel_rest(self) -> None:
        """Drops what no step of the run will need."""
        if self._tickets.count(Purpose.TRAIN, State.QUEUED, State.LEASED, State.READY, State.CLOSED):
            for ticket in self._tickets.of_purpose(Purpose.TRAIN):
                if ticket.state is not State.BATCHED:
                    self.drop(ticket, Drop.CANCELLED)

    def _close(self, ticket: Ticket) -> None:
        """Ends the common life of a group's samples: complete ones are parts now, others once they arrive."""
        self._scheduler.remove(ticket.ticket_id)
        ticket.early = tuple(sorted(ticket.samples))
        self._tickets.move(ticket, State.CLOSED)
        self._counters.count("groups_closed")
        self._counters.count("samples_early", len(ticket.early))
        self._parts.add_group(ticket)
        for index in ticket.early:
            self._parts.add(ticket, index, was_late=False)
        if ticket.unleased:
            self._state.admission.add_waiting(ticket)

    def _next_position_of_parts(self) -> Ticket | None:
        """A position of parts that can be recorded now; None: there are too few parts, or the step has to
        wait."""
        size = self._settings.group_size
        if self._parts.num_loose < size or not self._scheduler.may_record(trainer_step=self._steps.current):
            return None
        first_step = self._scheduler.num_full_steps - self._bound.current
        found: list[tuple[Ticket, int]] = []
        while len(found) < size and (part := self._parts.pop()) is not None:
            group, index = part
            if group.samples[index].trained_steps(first_step=first_step):
                found.append(part)
            else:
                self._parts.add(group, index, was_late=False)
                self.give_up(group, [index], Drop.STALE)
        if len(found) < size:
            for group, index in found:
                self._parts.add(group, index, was_late=False)
            return None
        position = self._tickets.issue_position(found, max_staleness=self._bound.current)
        self._parts.place(position)
        for group, _ in found:
            self._end_if_over(group, Drop.STALE)
        return position

    def _end_if_over(self, group: Ticket, reason: Drop) -> None:
        """Ends a closed group all of whose samples are placed or given up (the last one for this reason)."""
        if group.state is not State.CLOSED or not self._parts.is_over(group):
            return
        if group.placed:
            if len(group.early) < group.num_samples:  # a group that was complete has been observed
                self._state.prompts.observe(group)
            self._tickets.move(group, State.SPLIT)
        else:
            group.drop = reason
            self._state.drops[reason] += 1
            self._tickets.move(group, State.DROPPED)
            if reason is Drop.CANCELLED:
                self._give_back_prompt(group, num_reissues=group.num_reissues)
        self._forget(group)

    def _release_groups_of(self, position: Ticket) -> None:
        for group in self._parts.release(position):
            self._store.release(group)

    def _forget(self, group: Ticket) -> None:
        if self._parts.forget(group) is not None and group.state is State.SPLIT:
            self._store.release(group)

    def _drop_stale(self, ticket: Ticket) -> None:
        oldest_step = ticket.oldest_sampled_step
        assert oldest_step is not None
        exceeds_bound = self._scheduler.num_full_steps - oldest_step > ticket.max_staleness
        self.drop(ticket, Drop.STALE if exceeds_bound else Drop.INTERVAL)

    def _record(self, ticket: Ticket) -> None:
        if self._settings.closes and not ticket.parts:
            ticket.max_staleness = self._bound.current
            first_step = self._scheduler.num_full_steps - ticket.max_staleness
            if not all(sample.trained_steps(first_step=first_step) for sample in ticket.samples.values()):
                self._close(ticket)  # its other samples are still of use
                return
        ticket.step, ticket.position = self._scheduler.assign(ticket.ticket_id)
        assert ticket.oldest_sampled_step is not None
        lag = ticket.step - ticket.oldest_sampled_step
        assert lag >= 0 and (self._settings.closes or ticket.parts or lag <= ticket.max_staleness), (
            f"ticket {ticket.ticket_id} has lag {lag} in step {ticket.step}"
        )
        self._steps.add(ticket)
        self._tickets.move(ticket, State.BATCHED)

    def _add_ready(self, ticket: Ticket) -> None:
        if self._settings.closes:
            self._scheduler.add_ready(ticket.ticket_id, deadline=ticket.close_step)
            return
        deadline = self._deadline(ticket, ticket.oldest_sampled_step)
        assert deadline is not None
        self._scheduler.add_ready(ticket.ticket_id, deadline=deadline)

    def _track(self, ticket: Ticket) -> None:
        if ticket.purpose is Purpose.TRAIN and self._settings.closes and ticket.state is not State.CLOSED:
            last_open = None if ticket.begin_step < 0 else ticket.close_step - 1
            self._scheduler.track(ticket.ticket_id, earliest_deadline=last_open, latest_deadline=last_open)
        elif ticket.purpose is Purpose.TRAIN and ticket.state is not State.CLOSED:
            self._scheduler.track(
                ticket.ticket_id,
                earliest_deadline=self._deadline(ticket, ticket.oldest_possible_step),
                latest_deadline=self._deadline(ticket, ticket.oldest_sampled_step),
            )

    def _deadline(self, ticket: Ticket, oldest_step: int | None) -> int | None:
        if oldest_step is None:
            return None
        return self._bound.deadline(oldest_step, max_staleness=ticket.max_staleness)

    def _give_back_prompt(self, ticket: Ticket, *, num_reissues: int) -> None:
        self._state.prompts.give_back(
            Prompt(index=ticket.prompt_index, parent=ticket.ticket_id, num_reissues=num_reissues)
        )


class TicketRules(LedgerPart):
    """Rules of a ledger that change tickets through `TicketLifecycle`."""

    def __init__(self, state: LedgerState, lifecycle: TicketLifecycle) -> None:
        super().__init__(state)
        self._lifecycle = lifecycle
