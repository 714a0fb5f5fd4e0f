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
    eval  issue --> QUEUED <--> LEASED --> every sample has arrived or failed for good:
                                           EVALUATED | DROPPED(failed: all of them | cancelled)

    issued == queued + leased + ready + batched + trained + evaluated + dropped, checked after every
    operation.

The transition to and from TRAINED is `StepLog.commit_to`. Ended tickets leave memory; the store has their
rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from areal_like.wire.messages.producer import Lease, Purpose
from buffer.ledger.state import LedgerState
from buffer.prompts.order import Prompt, evaluation_seed, sampling_seed
from buffer.tables.lease_table import Server
from buffer.tickets import REISSUED, Drop, LeaseRecord, State, Ticket


class TicketLifecycle:
    """Transitions of single tickets.

    Operations that can make a group ready or stale, or open a position for one, end with
    `record_ready_groups`.
    """

    def __init__(self, state: LedgerState) -> None:
        self._state = state
        self._settings = state.settings
        self._store = state.store
        self._tickets = state.tickets
        self._leases = state.leases
        self._scheduler = state.scheduler
        self._bound = state.bound

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
        self._tickets.move(ticket, State.LEASED)
        if is_eval and ticket.unleased:
            self._state.evals.requeue(ticket)
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
        )

    def _seed(self, ticket: Ticket) -> int:
        if ticket.purpose is Purpose.EVAL:
            return evaluation_seed(self._settings.seed, ticket.eval_set, ticket.prompt_index)
        return sampling_seed(self._settings.seed, ticket.ticket_id, sum(ticket.num_failures.values()))

    def remove_from_lease(self, ticket: Ticket, lease_id: int, sample_index: int, *, arrived: bool) -> None:
        """Removes a sample from its lease because it arrived or failed; an empty lease ends."""
        if self._leases.remove_sample(ticket.leases[lease_id], sample_index, arrived=arrived):
            del ticket.leases[lease_id]

    def requeue(self, ticket: Ticket, sample_indices: Collection[int]) -> None:
        """Queues samples (maybe none) to be leased again; a ticket with other leases stays LEASED."""
        ticket.unleased.update(sample_indices)
        if sample_indices and ticket.purpose is Purpose.EVAL:
            self._state.evals.requeue(ticket)
        elif sample_indices:
            self._state.admission.add_waiting(ticket)
        state = State.LEASED if ticket.leases else State.QUEUED
        if ticket.state is not state:
            self._tickets.move(ticket, state)
        self._track(ticket)

    def lose_leases(self, leases: Iterable[LeaseRecord]) -> None:
        """Requeues the missing samples of leases that have ended; samples that arrived are kept."""
        for lease in leases:
            self._state.counters.count_lost_lease()
            ticket = self._tickets.live[lease.ticket_id]
            del ticket.leases[lease.lease_id]
            self.requeue(ticket, lease.outstanding)
        self.record_ready_groups()

    def revoke(self, lease: LeaseRecord) -> None:
        """Takes a lease away from its server; its samples are leased again later."""
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
            self._state.evals.end(ticket)
            self._check_evals()
        else:
            self.drop(ticket, Drop.FAILED)

    def drop(self, ticket: Ticket, reason: Drop, *, may_reissue: bool = True) -> None:
        """Drops a ticket, aborts its leases, and gives its prompt back if the reason and `may_reissue` allow
        it."""
        for lease in ticket.leases.values():
            self._leases.revoke(lease)
        ticket.leases.clear()
        self._scheduler.remove(ticket.ticket_id)
        ticket.drop = reason
        self._state.drops[reason] += 1
        self._state.counters.count_dropped(ticket, reason)
        self._tickets.move(ticket, State.DROPPED)
        if ticket.purpose is Purpose.EVAL:
            self._state.evals.end(ticket)
        elif reason is Drop.CANCELLED:
            self._give_back_prompt(ticket, num_reissues=ticket.num_reissues)
        elif reason in REISSUED and may_reissue and ticket.num_reissues < self._settings.max_reissues:
            self._state.counters.count_reissue()
            self._give_back_prompt(ticket, num_reissues=ticket.num_reissues + 1)
        elif reason in REISSUED:
            self._state.counters.count_given_up()

    def cancel_evals(self) -> None:
        """Drops the tickets of running evaluations: the trainer that requested them has been replaced."""
        for ticket in self._state.evals.cancel(lambda row: True):
            self.drop(ticket, Drop.CANCELLED)
        self._state.evals.forget_results()
        self._check_evals()

    def cancel_unusable_evals(self) -> None:
        """After a restart: drops the tickets of evaluations that the current configuration does not have."""
        evals, sets = self._state.evals, self._settings.eval_sets
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
        num_open = self._state.evals.num_open
        assert num_live == num_open, f"{num_live} eval tickets are live, evaluations have {num_open}"

    def readmit(self, ticket: Ticket) -> None:
        """Adds a recovered train ticket to the waiting, running or ready tickets, by its state."""
        if ticket.state is State.READY:
            self._add_ready(ticket)
        elif ticket.state is not State.BATCHED:
            if ticket.unleased:
                self._state.admission.add_waiting(ticket)
            self._track(ticket)

    def record_ready_groups(self) -> None:
        """Drops stale tickets and records ready groups until nothing changes; then checks conservation."""
        steps = self._state.steps
        while not self._state.settings_changed:
            if (stale := self._scheduler.next_stale()) is not None:
                self._drop_stale(self._tickets.live[stale])
            elif (ready := self._scheduler.next_to_record(trainer_step=steps.current)) is not None:
                self._record(self._tickets.live[ready])
            else:
                break
        if changes := self._state.counters.take_changes():
            self._store.put_counters(changes)
        self._tickets.check_conservation()

    def _drop_stale(self, ticket: Ticket) -> None:
        oldest_step = ticket.oldest_sampled_step
        assert oldest_step is not None
        exceeds_bound = self._scheduler.num_full_steps - oldest_step > ticket.max_staleness
        self.drop(ticket, Drop.STALE if exceeds_bound else Drop.INTERVAL)

    def _record(self, ticket: Ticket) -> None:
        ticket.step, ticket.position = self._scheduler.assign(ticket.ticket_id)
        lag = ticket.step - min(sample.oldest_step for sample in ticket.samples.values())
        assert 0 <= lag <= ticket.max_staleness, (
            f"ticket {ticket.ticket_id} has lag {lag} in step {ticket.step}"
        )
        self._state.steps.add(ticket)
        self._tickets.move(ticket, State.BATCHED)

    def _add_ready(self, ticket: Ticket) -> None:
        deadline = self._deadline(ticket, ticket.oldest_sampled_step)
        assert deadline is not None
        self._scheduler.add_ready(ticket.ticket_id, deadline=deadline)

    def _track(self, ticket: Ticket) -> None:
        if ticket.purpose is Purpose.TRAIN:
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
