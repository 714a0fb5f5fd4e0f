"""The ledger: a pure state machine that leases prompts, takes samples, and fills the trainer's steps.

It owns no socket, task, thread or clock: time and messages are arguments, answers are return values, and
leases to abort at a server are returned by `take_aborts()`. So the same code runs in the daemon, under
hypothesis and in a simulator with a virtual clock.

    LedgerState        tables, step scheduler and log: data without rules
    TicketLifecycle    transitions of a ticket (the state machine is in its docstring)
    LeaseDispatcher    servers, heartbeats, granting of leases
    SampleIntake       verdicts on samples, group filters
    FailedSamples      retry or drop of a failed sample, quarantine of a server
    TrainerSession     start, fetch, complete, commit, evaluations
    OperatorChanges    pause, cordon, settings that change while the run goes on
    Ledger             all of these operations on one state

They use LedgerState, all but the last use TicketLifecycle; SampleIntake also uses FailedSamples.

Steps are absolute (a run that resumes after K steps begins at step K). Let s be the step of a server's
weights. Two rules are stricter than the staleness bound itself requires; both keep healthy tickets from ever
becoming stale:
* Admission counts with the *server's* weights: a ticket is leased to it while recorded + ready + running <
  (deadline(s) + 1) * groups_per_step, where deadline(s) = s + max_staleness, or the end of its sync interval
  (`scheduling/staleness.py`). Counting with the trainer's step instead would let a server that has not
  received the newest weights yet start work that is a step too old. The rule implies s >= trainer_step -
  max_staleness.
* Recording is earliest deadline first, and reserves positions for every later deadline, not only in the open
  step (`scheduling/step_scheduler.py`).

Every operation is O(log n) in the number of live tickets, except O(max_staleness) in the scheduler and O(n)
in `close`, `stream_state` and `start_training`. `recovery.py` rebuilds a ledger from its store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from areal_like.wire.messages.producer import Lease
from buffer.ledger.data_change import DataChange
from buffer.ledger.failed_samples import FailedSamples
from buffer.ledger.lease_dispatcher import LeaseDispatcher
from buffer.ledger.lifecycle import TicketLifecycle
from buffer.ledger.operator_changes import OperatorChanges
from buffer.ledger.sample_intake import SampleIntake
from buffer.ledger.snapshot import LedgerSnapshot
from buffer.ledger.state import LedgerState
from buffer.ledger.trainer_session import TrainerSession
from buffer.tables.incarnations import TRAINER
from buffer.tables.lease_table import Server
from buffer.tickets import Drop, State, Ticket


class Ledger:
    """All operations of peers on one state.

    They raise RefusedError(field, reason) or StaleIncarnationError for a request that a peer may not make.
    """

    def __init__(self, state: LedgerState) -> None:
        """`state`: new, or filled by `recovery.recover`."""
        self.state = state
        self.settings = state.settings
        self._lifecycle = TicketLifecycle(state)
        self._failed_samples = FailedSamples(state, self._lifecycle)
        self._intake = intake = SampleIntake(state, self._lifecycle, self._failed_samples)
        self._dispatcher = dispatcher = LeaseDispatcher(state, self._lifecycle)
        session = TrainerSession(state, self._lifecycle)

        # Operations of rollout servers.
        self.register_server = dispatcher.register_server
        self.remove_server = dispatcher.remove_server
        self.heartbeat = dispatcher.heartbeat
        self.return_leases = dispatcher.return_leases
        self.take_back_undelivered = dispatcher.take_back_undelivered
        self.expire = dispatcher.expire
        self.samples_done = intake.samples_done
        self.sample_failed = intake.sample_failed
        self.lied = self._failed_samples.lied
        self.set_num_train_prompts = state.prompts.set_num_train_prompts
        self.set_content = DataChange(state, self._lifecycle).set_content
        self.take_aborts = state.leases.take_aborts

        # Operations of the trainer.
        self.refuse_older_trainer = session.refuse_older_trainer
        self.start_training = session.start_training
        self.alloc_version = session.alloc_version
        self.adopt_version = session.adopt_version
        self.settings_of = session.settings_of
        self.fetch = session.fetch
        self.complete_step = session.complete_step
        self.commit = session.commit
        self.stream_state = session.stream_state
        self.finish = session.finish
        self.set_max_staleness = session.set_max_staleness
        self.request_eval = session.request_eval
        self.close = session.close

        # Operations of an operator, and of every peer.
        self.poison = session.poison
        self.unfence = session.unfence
        operator = OperatorChanges(state)
        self.set_paused = operator.set_paused
        self.set_cordoned = operator.set_cordoned
        self.change_settings = operator.change_settings
        self.find_process = state.incarnations.find

    def admit_process(self, name: str, process: str) -> int:
        """Gives the name to a new process; returns its incarnation. Raises as `IncarnationTable.admit`."""
        above = self.trainer_incarnation if name == TRAINER else 0
        return self.state.incarnations.admit(name, process, above=above)

    def hold_grants(self) -> None:
        """Grants no lease until everything written so far is durable.

        A buffer that died before its generation is durable would leave its lease ids to the next one.
        """

        def allow() -> None:
            self.state.leases.may_grant = True

        self.state.leases.may_grant = False
        self.when_durable(allow)

    def grant(self, *, now_s: float) -> dict[str, list[Lease]]:
        """New leases by server (see LeaseDispatcher); none after the job has failed."""
        return {} if self.failure_reason else self._dispatcher.grant(now_s=now_s)

    def when_durable(self, then: Callable[[], None]) -> None:
        """Calls `then` once everything written so far is durable. Calls keep their order."""
        self.state.store.when_durable(then)

    def readmit(self, tickets: Iterable[Ticket]) -> None:
        """Adds recovered train tickets to the waiting, running or ready tickets, by their state."""
        for ticket in tickets:
            self._lifecycle.readmit(ticket)

    def finish_recovery(self) -> None:
        """Cancels evaluations that cannot go on, and records the groups that can be recorded."""
        self._lifecycle.cancel_unusable_evals()
        self._lifecycle.record_ready_groups()

    def close_store(self) -> None:
        """Writes what is pending and closes the files."""
        self.state.store.close()

    @property
    def trainer_step(self) -> int:
        """Optimizer steps that the trainer has completed: the index of the one it works on."""
        return self.state.steps.current

    @property
    def committed_step(self) -> int:
        """Last step that a durable checkpoint contains."""
        return self.state.steps.committed

    @property
    def newest_version(self) -> int:
        """The last allocated weight version."""
        return self.state.versions.newest

    @property
    def num_recorded(self) -> int:
        """Groups recorded since the process started; it never decreases."""
        return self.state.steps.num_recorded

    @property
    def trainer_incarnation(self) -> int:
        """Incarnation of the newest trainer; 0: no trainer has started."""
        return self.state.trainer_incarnation

    @property
    def is_finished(self) -> bool:
        """True after the last step and everything that follows it."""
        return self.state.is_finished

    @property
    def closed_reason(self) -> str:
        """Why no train tickets are issued; empty while they are."""
        return self.state.closed_reason

    @property
    def failure_reason(self) -> str:
        """Why the job cannot continue; empty while it can."""
        return self._failed_samples.job_failure_reason

    @property
    def task_trouble(self) -> str:
        """As FailedSamples.task_trouble."""
        return self._failed_samples.task_trouble

    def take_notices(self) -> list[str]:
        """What the log should tell since the last call: quarantines of servers, rows of groups without
        spread."""
        return [*self._failed_samples.take_notices(), *self._intake.take_notices()]

    @property
    def last_rejection(self) -> str:
        """Description of the last group that the `single_version` filter rejected; empty: none was."""
        return self._intake.last_rejection

    @property
    def write_blocked_reason(self) -> str:
        """Why nothing can be made durable now; empty if writes succeed."""
        return self.state.store.write_blocked_reason

    @property
    def servers(self) -> Mapping[str, Server]:
        """Registered rollout servers by name. Do not change them."""
        return MappingProxyType(self.state.leases.servers)

    @property
    def drops(self) -> Counter[Drop]:
        """Dropped tickets by reason."""
        return self.state.drops

    def num_by_state(self) -> dict[State, int]:
        """Number of tickets in each state."""
        return self.state.tickets.num_by_state()

    def counters(self) -> dict[str, float]:
        """Sums and means over samples and tokens, by name."""
        return self.state.counters.summary()

    def lag_histogram(self) -> Counter[int]:
        """Lag in optimizer steps -> trained samples."""
        return self.state.counters.lag_histogram

    def snapshot(self) -> LedgerSnapshot:
        """All numbers for /status and Prometheus."""
        return LedgerSnapshot.of(self.state)
