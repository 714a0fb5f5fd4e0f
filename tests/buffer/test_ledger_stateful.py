"""The ledger under arbitrary sequences of operations, checked against a model of its guarantees.

There are two machines: one with a ledger in memory, and one with a store from which the ledger is rebuilt at
random moments, as after a SIGKILL of the buffer. The rebuilt ledger must have the same state as the lost one
and keep the same guarantees.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from areal_like.errors import RefusedError, StaleIncarnationError
from areal_like.failures import FailureKind
from areal_like.selection import failures_of, selection_report
from areal_like.wire.messages.evaluation import SampleOutcome
from areal_like.wire.messages.producer import Lease, Purpose, ServerState
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.scheduling.step_log import MAX_STARTS
from buffer.storage.base import Store
from buffer.storage.memory import MemoryStore
from buffer.tickets import Drop, State, Ticket, Verdict
from launch.audit.invariants import LEDGER_INVARIANTS
from tests.support.ledger_simulation import add_server, beat, deliver, done, failed, new_ledger
from tests.support.row_store import RowStore

SERVERS = ("a", "b", "c")
GROUPS, SIZE, STEPS = 2, 2, 6
EVAL_SETS = {"eval": 1, "hard": 3}
"""Answers to each prompt by evaluation set."""


pytestmark = pytest.mark.slow


class LedgerMachine(RuleBasedStateMachine):
    """Model: leases granted, samples accepted, groups served by position."""

    durable = False

    def new_store(self) -> Store:
        return MemoryStore()

    @initialize(
        max_staleness=st.sampled_from([0, 1, 2]),
        overdue=st.sampled_from(["wait", "drop", "close", "close"]),
        close_after=st.integers(1, 2),
        group_filter=st.sampled_from(["none", "spread", "single_version"]),
        adaptive=st.booleans(),
        sync_interval=st.sampled_from([1, 1, 2, 3]),
        num_greedy=st.sampled_from([0, 0, 1]),
    )
    def begin(
        self,
        max_staleness: int,
        overdue: str,
        close_after: int,
        group_filter: str,
        adaptive: bool,
        sync_interval: int,
        num_greedy: int,
    ) -> None:
        self.closes = overdue == "close"
        if self.closes:
            max_staleness, adaptive, sync_interval, num_greedy = max(1, max_staleness), False, 1, 0
            group_filter = "none" if group_filter == "single_version" else group_filter
        self.num_greedy = num_greedy
        self.sync_interval = min(sync_interval, max_staleness + 1)
        self.ledger = new_ledger(
            store=self.new_store(),
            durable=self.durable,
            max_staleness=max_staleness,
            groups_per_step=GROUPS,
            group_size=SIZE,
            num_greedy=num_greedy,
            num_steps=STEPS,
            overdue=overdue,
            close_after=min(close_after, max_staleness),
            group_filter=group_filter,
            adaptive=adaptive,
            sync_interval=self.sync_interval,
            max_consecutive_failures=10**6,
            lease_timeout_s=5.0,
            eval_sets=EVAL_SETS,
            keep_evaluations=1,
        )
        self.results: dict[tuple[int, str], list[object]] = {}
        self.now_s = 0.0
        self.incarnation = 1
        self.num_trained = 0
        self.leases: list[tuple[str, Lease]] = []
        self.accepted: dict[tuple[int, int], int] = {}
        self.steps_of = {0: 0}  # version -> step
        self.abandoned: set[int] = set()
        self.served: dict[tuple[int, int], int] = {}
        self.placed: dict[tuple[int, int], int] = {}  # (ticket, sample) -> ticket of its position
        self.versions = [0]
        self.server_incarnation = dict.fromkeys(SERVERS, 1)
        for name in SERVERS[:2]:
            add_server(self.ledger, name, capacity=2 * SIZE)
        self.grant()

    # --- servers ---

    @rule(name=st.sampled_from(SERVERS), restarted=st.booleans())
    def hello(self, name: str, restarted: bool) -> None:
        self.server_incarnation[name] += restarted
        known = self.ledger.servers.get(name)
        version = known.weights_version if known and not restarted else self.versions[-1]
        add_server(
            self.ledger,
            name,
            capacity=2 * SIZE,
            version=version,
            now_s=self.now_s,
            incarnation=self.server_incarnation[name],
        )
        self.grant()

    @rule(
        name=st.sampled_from(SERVERS),
        newest=st.booleans(),
        capacity=st.sampled_from([0, 1, 4, 5]),
        state=st.just(ServerState.SERVING) | st.sampled_from(ServerState),
    )
    def heartbeat(self, name: str, newest: bool, capacity: int, state: ServerState) -> None:
        server = self.ledger.servers.get(name)
        if server is not None:
            version = self.versions[-1] if newest else server.weights_version
            beat(self.ledger, name, capacity=capacity, version=version, now_s=self.now_s, state=state)
        self.grant()

    def grant(self) -> None:
        for name, leases in self.ledger.dispatcher.grant(now_s=self.now_s).items():
            for lease in leases:
                assert not any((lease.ticket_id, index) in self.accepted for index in lease.sample_indices), (
                    "a sample that has arrived is leased again"
                )
                self.leases.append((name, lease))

    def draw_sample(self, data: st.DataObject) -> tuple[str, Lease, int]:
        """Any sample of any lease ever granted, the newest more often.

        So duplicates, superseded samples and those of ended tickets occur too.
        """
        name, lease = data.draw(st.sampled_from(self.leases[-4:]) | st.sampled_from(self.leases))
        return name, lease, data.draw(st.sampled_from(lease.sample_indices))

    def expected(self, name: str, lease: Lease, index: int) -> Verdict:
        """The verdict that the rules require, by the model and the outstanding samples."""
        held = self.ledger.state.leases.live.get(lease.lease_id)
        ticket = self.ledger.state.tickets.live.get(lease.ticket_id)
        if ticket is None:
            return Verdict.FINISHED
        if self.accepted.get((lease.ticket_id, index)) == lease.lease_id:
            return Verdict.DUPLICATE
        is_held = held is not None and held.server == name and index in held.outstanding
        return Verdict.ACCEPTED if is_held else Verdict.SUPERSEDED

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        reward=st.sampled_from([0.0, 1.0]),
        has_failed=st.sampled_from([False, False, True]),
        old=st.booleans(),
        other_server=st.sampled_from([False, False, True]),
    )
    def deliver(
        self, data: st.DataObject, reward: float, has_failed: bool, old: bool, other_server: bool
    ) -> None:
        name, lease, index = self.draw_sample(data)
        if other_server:
            name = data.draw(st.sampled_from(SERVERS))
        expected = self.expected(name, lease, index)
        server = self.ledger.servers.get(name)
        newest = server.weights_version if server else 0
        oldest = self.versions[max(0, self.versions.index(newest) - 1)] if old else newest
        if expected is Verdict.ACCEPTED and self.abandoned & {oldest, newest}:
            expected = Verdict.ABANDONED
        failure = "reward_timeout" if has_failed and not reward else ""
        sample = done(lease, index, [oldest, newest], reward=reward, failure=failure)
        verdict = deliver(self.ledger, name, sample)
        assert verdict is expected
        if verdict is Verdict.ACCEPTED:
            self.accepted[lease.ticket_id, index] = lease.lease_id

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def deliver_whole_lease(self, data: st.DataObject) -> None:
        name, lease = data.draw(st.sampled_from(self.leases[-4:]))
        version = self.ledger.servers[name].weights_version if name in self.ledger.servers else 0
        for index in lease.sample_indices:
            if (
                deliver(self.ledger, name, done(lease, index, [version], reward=float(index)))
                is Verdict.ACCEPTED
            ):
                self.accepted[lease.ticket_id, index] = lease.lease_id
        self.grant()

    @precondition(lambda self: self.closes)
    @rule(stragglers=st.sets(st.integers(0, 7), max_size=6), push=st.booleans())
    def a_step_with_stragglers(self, stragglers: set[int], push: bool) -> None:
        """All live leases are delivered, some without their last sample, and a full step is trained."""
        live = self.ledger.state.leases.live
        held = [(name, lease) for name, lease in self.leases if lease.lease_id in live]
        for number, (name, lease) in enumerate(held):
            outstanding = sorted(live[lease.lease_id].outstanding)
            newest = self.ledger.servers[name].weights_version
            oldest = next(version for version, step in self.steps_of.items() if step == self.start_of(lease))
            for index in outstanding[: -1 if number in stragglers else None]:
                if self.abandoned & {oldest, newest}:
                    continue
                sample = done(lease, index, [oldest, newest], reward=float(index))
                assert deliver(self.ledger, name, sample) is Verdict.ACCEPTED
                self.accepted[lease.ticket_id, index] = lease.lease_id
        if self.ledger.state.scheduler.num_full_steps > self.ledger.state.steps.current:
            self.train(push=push, commit=push)
        for name in sorted(self.ledger.servers):
            beat(self.ledger, name, capacity=3 * SIZE, version=self.versions[-1], now_s=self.now_s)
        self.grant()

    def start_of(self, lease: Lease) -> int:
        """Step of the weights with which the samples of a live lease began."""
        return self.ledger.state.leases.live[lease.lease_id].weights_step

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), kind=st.sampled_from(FailureKind), num_tokens=st.sampled_from([0, 3]))
    def fail(self, data: st.DataObject, kind: FailureKind, num_tokens: int) -> None:
        name, lease, index = self.draw_sample(data)
        expected = self.expected(name, lease, index)
        message = failed(lease, index, kind=kind, num_tokens=num_tokens)
        assert self.ledger.intake.sample_failed(name, message) is expected
        self.grant()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        name, lease = data.draw(st.sampled_from(self.leases))
        if name in self.ledger.servers:
            self.ledger.dispatcher.return_leases(name, [lease.lease_id, lease.lease_id])
        self.grant()

    @rule(name=st.sampled_from(SERVERS))
    def leave(self, name: str) -> None:
        self.ledger.dispatcher.remove_server(name)

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        for name in self.ledger.dispatcher.expire(now_s=self.now_s):
            assert name not in self.ledger.servers
        self.grant()

    # --- trainer ---

    @property
    def num_taken(self) -> int:
        return self.ledger.state.scheduler.step * GROUPS + self.ledger.state.scheduler.position

    @precondition(lambda self: self.num_taken)
    @rule(position=st.integers(0, STEPS * GROUPS - 1))
    def fetch_any(self, position: int) -> None:
        self.fetch(*divmod(position % (self.num_taken + 1), GROUPS))

    def fetch(self, step: int, position: int) -> None:
        if not self.ledger.state.steps.committed < step < STEPS:
            return
        group = self.ledger.trainer.fetch(step=step, position=position)
        if group is None:
            assert (step, position) not in self.served, "a recorded group has disappeared"
            return
        assert self.served.setdefault((step, position), group.ticket_id) == group.ticket_id, (
            "a position was given to another group"
        )
        assert list(self.served.values()).count(group.ticket_id) == 1, "a group has two positions"
        assert len(group.trajectories) == SIZE + self.num_greedy
        for record in group.records:
            position_of = self.placed.setdefault((record.ticket_id, record.sample_index), group.ticket_id)
            assert position_of == group.ticket_id, "a sample has two positions"
        assert group.max_staleness <= self.ledger.settings.staleness_cap
        assert {version: self.steps_of[version] for version in group.versions} == dict(
            zip(group.versions, group.steps, strict=True)
        )
        assert {closed.ticket_id for closed in group.closed} == (
            {record.ticket_id for record in group.records} - {group.ticket_id}
        )
        for trajectory, oldest_step in zip(group.trajectories, group.version_steps, strict=True):
            newest_step = max(self.steps_of[version] for version in trajectory.versions[1:].tolist())
            assert 0 <= step - newest_step <= group.max_staleness
            assert self.closes or step - oldest_step <= group.max_staleness
            if self.sync_interval > 1:
                assert step // self.sync_interval == oldest_step // self.sync_interval, (
                    "trained in another interval than it was sampled in"
                )
            assert trajectory.num_sampled > 0

    @precondition(lambda self: self.ledger.state.scheduler.num_full_steps > self.ledger.state.steps.current)
    @rule(push=st.booleans(), commit=st.booleans())
    def train(self, push: bool, commit: bool) -> None:
        step = self.ledger.state.steps.current
        for position in range(GROUPS):
            self.fetch(step, position)
        self.ledger.trainer.complete_step(incarnation=self.incarnation, step=step)
        self.ledger.trainer.complete_step(incarnation=self.incarnation, step=step)
        self.num_trained = max(self.num_trained, step + 1)
        if push:
            version = self.ledger.trainer.alloc_version(incarnation=self.incarnation, step=step + 1)
            self.note_version(version, step + 1)
        if commit:
            self.commit(step)
            self.commit(step)
        self.grant()

    def note_version(self, version: int, step: int) -> None:
        assert version > self.versions[-1], "a version was given out twice"
        self.versions.append(version)
        self.steps_of[version] = step

    def commit(self, step: int) -> None:
        """Commits; the checkpoint before this one is kept too."""
        self.ledger.trainer.commit(incarnation=self.incarnation, step=step, oldest_kept_step=max(0, step))

    @rule(data=st.data())
    def trainer_restarts(self, data: st.DataObject) -> None:
        first = self.ledger.state.steps.first_kept if self.durable else self.ledger.state.steps.committed + 1
        self.trainer_restarts_at(data.draw(st.integers(first, self.ledger.state.steps.current)))

    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        ids = sorted(
            ticket.ticket_id
            for ticket in self.ledger.state.steps.tickets_from(self.ledger.state.steps.current)
        )
        if ids:
            self.drop_as_poison(data.draw(st.sampled_from(ids)))
            with pytest.raises(StaleIncarnationError):
                self.ledger.trainer.commit(incarnation=self.incarnation, step=0)
            self.trainer_restarts_at(self.ledger.state.steps.current)

    def drop_as_poison(self, ticket_id: int) -> None:
        ticket = self.ledger.state.tickets.live[ticket_id]
        self.ledger.operator.poison([ticket_id])
        self.served.pop((ticket.step, ticket.position), None)
        self.num_trained = min(self.num_trained, ticket.step)

    @precondition(lambda self: self.ledger.settings.adaptive)
    @rule(data=st.data())
    def adapt(self, data: st.DataObject) -> None:
        bound = data.draw(st.integers(0, self.ledger.settings.staleness_cap))
        self.ledger.trainer.set_max_staleness(incarnation=self.incarnation, max_staleness=bound)
        self.grant()

    @precondition(lambda self: not self.ledger.settings.adaptive)
    @rule(data=st.data())
    def operator_changes_the_bound(self, data: st.DataObject) -> None:
        settings = self.ledger.settings
        least = 1 if self.closes else settings.sync_interval - 1
        bound = data.draw(st.integers(least, settings.staleness_cap))
        with contextlib.suppress(RefusedError):  # the last step has begun
            (change,) = self.ledger.operator.change_settings({"max_staleness": str(bound)}, unix_s=1.0)
            assert change.step in (self.ledger.state.steps.current, self.ledger.state.steps.current + 1)
        self.grant()

    @rule(eval_id=st.integers(1, 2), eval_set=st.sampled_from(["eval", "hard"]))
    def evaluate(self, eval_id: int, eval_set: str) -> None:
        size = EVAL_SETS[eval_set]
        result = self.ledger.trainer.request_eval(
            eval_id=eval_id, num_prompts=2, min_version=0, eval_set=eval_set, num_samples=size
        )
        assert result is None or result.num_evaluated + result.num_failed == 2 * size
        if result is None:
            assert (eval_id, eval_set) not in self.results, "a finished evaluation has begun again"
            return
        assert result.count(SampleOutcome.FAILED) <= result.num_evaluated
        assert not np.any(result.tokens[result.outcomes == SampleOutcome.MISSING])
        assert not np.any(result.rewards[result.outcomes != 0])
        numbers = [result.rewards.tolist(), result.tokens.tolist(), result.outcomes.tolist()]
        assert self.results.setdefault((eval_id, eval_set), numbers) == numbers, "a result has changed"
        self.grant()

    @rule()
    def close(self) -> None:
        self.ledger.trainer.close("test")
        assert self.ledger.state.tickets.count(Purpose.TRAIN, State.LEASED) == 0
        if not self.durable:
            self.served = {
                (step, position): ticket_id
                for (step, position), ticket_id in self.served.items()
                if step < self.ledger.state.steps.current
            }
            kept = set(self.served.values())
            self.placed = {key: position for key, position in self.placed.items() if position in kept}
            self.num_trained = min(self.num_trained, self.ledger.state.steps.current)
            assert self.ledger.state.tickets.count(Purpose.TRAIN, State.QUEUED, State.READY) == 0

    # --- guarantees ---

    @invariant()
    def tickets_are_conserved(self) -> None:
        self.ledger.state.tickets.check_conservation()
        counts = self.ledger.state.tickets.num_by_state()
        assert counts[State.DROPPED] == self.ledger.state.drops.total()
        tickets = self.ledger.state.tickets
        live = [state for state in State if not state.is_terminal]
        is_recorded = (State.BATCHED, State.TRAINED)
        num_positions = tickets.count(
            Purpose.TRAIN, *(is_recorded if self.closes else [*live, State.TRAINED])
        )
        assert num_positions <= STEPS * GROUPS, "more groups than the run has positions"
        if not self.closes:
            assert tickets.count(Purpose.TRAIN, State.CLOSED, State.SPLIT) == 0

    @invariant()
    def samples_are_counted_once(self) -> None:
        counters = self.ledger.state.counters.summary()
        assert counters["samples_trained"] == self.num_trained * GROUPS * SIZE
        report = selection_report(counters)
        assert report["trained"]["samples"] == counters["samples_trained"] <= report["offered"]["samples"]
        num_groups = sum(report["groups_trained_by_solve_rate"].values())
        assert num_groups == self.num_trained * GROUPS or (
            self.closes and num_groups < self.num_trained * GROUPS
        )
        num_failed = sum(sum(counts.values()) for counts in failures_of(counters).values())
        assert num_failed == counters["samples_failed"]
        assert counters["max_trained_lag"] <= self.ledger.settings.staleness_cap
        assert self.num_taken <= (self.num_trained + 2) * GROUPS, (
            "recording ran more than one step ahead of the trainer"
        )

    @invariant()
    def leases_match_tickets(self) -> None:
        leases, live = self.ledger.state.leases, self.ledger.state.tickets.live
        for server in leases.servers.values():
            assert server.owed_samples == sum(len(lease.outstanding) for lease in server.leases.values())
        assert set(leases.live) == {lease_id for ticket in live.values() for lease_id in ticket.leases}
        for ticket in live.values():
            if ticket.state in (State.QUEUED, State.LEASED):
                making = [index for lease in ticket.leases.values() for index in lease.outstanding]
                assert sorted([*making, *ticket.unleased, *ticket.samples, *ticket.failed]) == list(
                    range(ticket.num_samples)
                ), "a sample is lost or leased twice"
                assert not ticket.failed or ticket.purpose is Purpose.EVAL
                assert (ticket.state is State.LEASED) == bool(ticket.leases)
            elif ticket.state is State.CLOSED:
                making = [index for lease in ticket.leases.values() for index in lease.outstanding]
                given_up = ticket.failed - ticket.samples.keys()
                assert sorted([*making, *ticket.unleased, *ticket.samples, *given_up]) == list(
                    range(ticket.num_samples)
                ), "a sample of a closed group is lost or leased twice"
                assert not ticket.failed & ticket.placed.keys()

    @invariant()
    def parts_are_conserved(self) -> None:
        parts, live = self.ledger.state.parts, self.ledger.state.tickets.live
        closed = {i: ticket for i, ticket in live.items() if ticket.state is State.CLOSED}
        loose = {
            (i, index)
            for i, ticket in closed.items()
            for index in ticket.samples.keys() - ticket.placed.keys() - ticket.failed
        }
        assert parts._loose.keys() == loose
        assert parts.num_late == sum(
            ticket.num_samples - len(ticket.samples.keys() | ticket.failed) for ticket in closed.values()
        )
        assert self.ledger.state.tickets.num_partial == sum(
            len(ticket.samples)
            for ticket in live.values()
            if ticket.purpose is Purpose.TRAIN and ticket.state in (State.QUEUED, State.LEASED)
        )
        assert self.ledger.state.leases.order is not None
        assert self.ledger.state.leases.num_slots == sum(
            max(0, server.capacity_samples)
            for server in self.ledger.state.leases.servers.values()
            if server.state is ServerState.SERVING
        )
        recorded = [t for row in self.ledger.state.steps.recorded.values() for t in row.values() if t.parts]
        needed = {ticket_id for ticket in recorded for ticket_id, _ in ticket.parts}
        assert parts.groups.keys() == closed.keys() | needed
        for ticket in recorded:
            assert len(ticket.parts) == SIZE and ticket.prompt_index == -1
            for ticket_id, index in ticket.parts:
                assert parts.groups[ticket_id].placed[index] == ticket.ticket_id

    @invariant()
    def the_order_has_the_servers_with_credit(self) -> None:
        leases = self.ledger.state.leases
        places = {}
        for server in leases.servers.values():
            if server.credit > 0:
                kind = server.weights_version, not server.leases
                places.setdefault(kind, []).append((-server.credit, server.name))
        assert leases.order._lists == {kind: sorted(those) for kind, those in places.items()}

    @invariant()
    def evaluations_have_their_tickets(self) -> None:
        evals, live = self.ledger.state.evals, self.ledger.state.tickets.live
        running = [round_ for round_ in evals.rounds.values() if not round_.is_done]
        of_rounds = {
            ticket_id: round_.row.eval_set
            for round_ in running
            for ticket_id, ticket in round_.tickets.items()
            if not ticket.state.is_terminal
        }
        of_table = {t.ticket_id: t.eval_set for t in live.values() if t.purpose is Purpose.EVAL}
        assert of_rounds == of_table, "a ticket belongs to no running evaluation"
        queued = {ticket_id for round_ in running for ticket_id in round_.waiting}
        assert queued == {ticket_id for ticket_id in of_table if live[ticket_id].unleased}

    def teardown(self) -> None:
        """After any operations, healthy peers can finish the run: no position is blocked forever."""
        ledger = getattr(self, "ledger", None)
        if ledger is None:
            return
        self.trainer_restarts_at(ledger.state.steps.current)
        self.now_s += 100.0
        ledger.dispatcher.expire(now_s=self.now_s)
        for _ in range(40 * STEPS):
            version = self.versions[-1]
            self.server_incarnation["a"] += 1
            add_server(
                ledger,
                "a",
                capacity=100,
                version=version,
                now_s=self.now_s,
                incarnation=self.server_incarnation["a"],
            )
            for leases in ledger.dispatcher.grant(now_s=self.now_s).values():
                for lease in leases:
                    for index in lease.sample_indices:
                        deliver(ledger, "a", done(lease, index, [version], reward=float(index)))
            if ledger.state.scheduler.num_full_steps > ledger.state.steps.current:
                self.train(push=True, commit=True)
        assert ledger.state.steps.current == STEPS, (
            f"stuck: {ledger.state.tickets.num_by_state()}, step {ledger.state.scheduler.step}"
        )
        assert ledger.state.tickets.count(Purpose.TRAIN, State.TRAINED) == STEPS * GROUPS
        assert not any(ticket.purpose is Purpose.TRAIN for ticket in ledger.state.tickets.live.values()), (
            "tickets are left over"
        )
        ledger.trainer.commit(incarnation=self.incarnation, step=STEPS - 1, oldest_kept_step=STEPS)
        assert ledger.state.store.num_bytes == 0
        if isinstance(store := ledger.state.store, RowStore):
            kept = [round_ for rounds in ledger.state.evals._kept.values() for round_ in rounds]
            assert store.records.keys() == {ticket_id for round_ in kept for ticket_id in round_.tickets}
            assert all(round_.is_done for round_ in kept) and len(kept) <= len(EVAL_SETS)

    def trainer_restarts_at(self, step: int) -> None:
        steps = self.ledger.state.steps
        self.incarnation = max(self.incarnation, self.ledger.state.trainer_incarnation) + 1
        while (looping := steps.find_crash_loop(first=step)) is not None:  # an operator has to drop its data
            with pytest.raises(RefusedError, match=f"{MAX_STARTS} trainers died in step {looping}"):
                self.ledger.trainer.start_training(incarnation=self.incarnation, step=step, stream={})
            self.drop_as_poison(steps.tickets_of(looping)[0].ticket_id)
            self.incarnation = self.ledger.state.trainer_incarnation + 1
        self.ledger.trainer.start_training(incarnation=self.incarnation, step=step, stream={})
        self.results.clear()
        self.abandoned |= {version for version in self.versions if self.steps_of[version] > step}
        self.note_version(self.ledger.trainer.alloc_version(incarnation=self.incarnation, step=step), step)


class DurableLedgerMachine(LedgerMachine):
    """The same guarantees over any number of restarts of the buffer."""

    durable = True

    def new_store(self) -> Store:
        return RowStore()

    def rebuilt(self) -> Ledger:
        """The ledger that the next buffer would recover if this one were killed now."""
        store = self.ledger.state.store
        assert isinstance(store, RowStore)
        ledger = recover(self.ledger.settings, store.copy(), now_s=self.now_s)
        ledger.state.prompts.set_num_train_prompts(1000)
        return ledger

    @rule()
    def rebuilding_changes_nothing(self) -> None:
        rebuilt = self.rebuilt()
        assert observed(rebuilt) == observed(self.ledger)
        store = rebuilt.state.store
        assert isinstance(store, RowStore)
        for law in LEDGER_INVARIANTS:
            if "bytes on disk" not in law.text:  # this store has no segment files
                assert store.connection.execute(law.violations).fetchall() == [], law.text

    @rule(back=st.sets(st.sampled_from(SERVERS)))
    def buffer_is_killed(self, back: set[str]) -> None:
        """Servers in `back` register at once; others do so later, or their leases expire."""
        before, self.ledger = self.ledger, self.rebuilt()
        known = self.ledger.state.evals.rounds  # of the finished ones, those whose samples are kept
        self.results = {key: result for key, result in self.results.items() if key in known}
        for name in sorted(back & before.state.leases.servers.keys()):
            server = before.state.leases.servers[name]
            add_server(
                self.ledger,
                name,
                capacity=2 * SIZE,
                version=server.weights_version,
                now_s=self.now_s,
                incarnation=server.incarnation,
            )
            assert self.ledger.servers[name].leases.keys() == server.leases.keys(), "a lease did not survive"
        self.grant()


def observed(ledger: Ledger) -> dict[str, object]:
    """All state that later operations depend on.

    Except the parts that are not recovered on purpose: servers, and the set of groups that a trainer has
    received.
    """
    evals = ledger.state.evals
    return {
        "tickets": {i: fields_of(ticket) for i, ticket in ledger.state.tickets.live.items()},
        "evaluations": [
            (round_.row, round_.num_open, sorted(round_.waiting), sorted(round_.tickets))
            for round_ in evals.rounds.values()
            if not round_.is_done
        ],
        "kept samples": {
            name: [(round_.row, {i: fields_of(t) for i, t in round_.tickets.items()}) for round_ in rounds]
            for name, rounds in evals._kept.items()
            if rounds
        },
        "recorded": {
            step: {position: fields_of(t) for position, t in row.items()}
            for step, row in ledger.state.steps.recorded.items()
        },
        "records": {
            t.ticket_id: len(ledger.state.store.records_of(t))
            for row in ledger.state.steps.recorded.values()
            for t in row.values()
        },
        "num_issued": ledger.state.tickets.num_issued,
        "counts": {
            (purpose, state): ledger.state.tickets.count(purpose, state)
            for purpose in Purpose
            for state in State
        },
        "drops": {reason: ledger.state.drops[reason] for reason in Drop},
        "prompts": (ledger.state.prompts.order.cursor, list(ledger.state.prompts.order._returned)),
        "versions": (
            ledger.state.versions._weights,
            ledger.state.versions._abandoned,
            ledger.state.versions.newest,
        ),
        "bound": ledger.state.bound.current,
        "settings": ledger.state.live.rows,
        "open": not ledger.state.closed_reason,
        "trainer": (ledger.state.trainer_incarnation, ledger.state.incarnations._newest),
        "steps": (
            ledger.state.steps.current,
            ledger.state.steps.committed,
            ledger.state.steps.first_kept,
            ledger.state.steps.num_counted,
            ledger.state.steps.attempts,
        ),
        "scheduler": (
            ledger.state.scheduler.step,
            ledger.state.scheduler.position,
            ledger.state.scheduler._holes,
            ledger.state.scheduler._ready,
        ),
        "deadlines": (ledger.state.scheduler._tracked, +ledger.state.scheduler._num_due),
        "ready": sorted(
            entry for entry in set(ledger.state.scheduler._heap) if entry[1] in ledger.state.scheduler._ready
        ),
        "waiting": ledger.state.admission.waiting,
        "parts": (sorted(ledger.state.parts._loose.items()), ledger.state.parts.num_late),
        "closed groups": {i: fields_of(group) for i, group in ledger.state.parts.groups.items()},
        "counters": ledger.state.counters.summary(),
    }


def fields_of(ticket: Ticket) -> dict[str, object]:
    """A ticket as plain data, without expiry times (each buffer has its own clock)."""
    leases = {
        i: (x.ticket_id, x.server, x.weights_step, frozenset(x.outstanding)) for i, x in ticket.leases.items()
    }
    fields = {field.name: getattr(ticket, field.name) for field in dataclasses.fields(ticket)}
    del fields["failed_at"]  # as servers, it is not recovered
    return fields | {"leases": leases}


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=50, stateful_step_count=60, suppress_health_check=list(HealthCheck)
)
TestDurableLedger = DurableLedgerMachine.TestCase
TestDurableLedger.settings = settings(
    max_examples=25, stateful_step_count=60, suppress_health_check=list(HealthCheck)
)
