"""The ledger: a pure state machine that leases prompts, takes samples, and fills the trainer's steps.

It owns no socket, task, thread or clock: time and messages are arguments, replies are return values, and
leases to abort at a server are returned by `take_aborts()`. So the same code runs in the daemon, under
hypothesis and in a simulator with a virtual clock.

    Ledger.state            LedgerState: tables, step scheduler and log; data without rules
    Ledger.dispatcher       LeaseDispatcher: servers, heartbeats, granting of leases
    Ledger.intake           SampleIntake: verdicts on samples, group filters
    Ledger.failed_samples   FailedSamples: retry or drop of a failed sample, quarantine of a server
    Ledger.journals         SessionJournals: sessions that other servers can continue
    Ledger.trainer          TrainerSession: start, fetch, complete, commit, evaluations
    Ledger.operator         OperatorChanges: pause, cordon, drop, settings that change during the run
    Ledger.lifecycle        TicketLifecycle: transitions of a ticket (the state machine is in its docstring),
                            which all of them use

Steps are absolute (a run that resumes after K steps begins at step K). Let s be the step of a server's
weights. Two rules are stricter than the staleness bound itself requires; both keep healthy tickets from ever
becoming stale:
* Admission counts with the *server's* weights: a ticket is leased to it while recorded + ready + running <
  (deadline(s) + 1) * groups_per_step, where deadline(s) = s + max_staleness, or the end of its sync interval
  (`scheduling/staleness.py`). Counting with the trainer's step instead would allow a server that has not
  received the newest weights yet to start work that is a step too old. The rule implies s >= trainer_step -
  max_staleness.
* Recording is earliest deadline first, and reserves positions for every later deadline, not only in the open
  step (`scheduling/step_scheduler.py`).

With `buffer.overdue=close` no position is reserved: overdue groups are closed, and the bound holds for each
token (`lifecycle.py`).

Every operation is O(log n) in the number of live tickets, except O(max_staleness) in the scheduler and O(n)
in `close`, `stream_state` and `start_training`. `recovery.py` rebuilds a ledger from its store.
"""

from __future__ import annotations

from collections.abc import Mapping

from buffer.ledger.failed_samples import FailedSamples
from buffer.ledger.lease_dispatcher import LeaseDispatcher
from buffer.ledger.lifecycle import TicketLifecycle
from buffer.ledger.operator_changes import OperatorChanges
from buffer.ledger.sample_intake import SampleIntake
from buffer.ledger.session_journals import SessionJournals
from buffer.ledger.state import LedgerState
from buffer.ledger.trainer_session import TrainerSession
from buffer.tables.incarnations import TRAINER
from buffer.tables.lease_table import Server


class Ledger:
    """All operations of peers on one state, by the peer that requests them.

    They raise RefusedError(field, reason) or StaleIncarnationError for a request that a peer may not make.
    """

    def __init__(self, state: LedgerState) -> None:
        """`state`: new, or filled by `recovery.recover`."""
        self.state = state
        self.settings = state.settings
        self.lifecycle = TicketLifecycle(state)
        self.failed_samples = FailedSamples(state, self.lifecycle)
        self.intake = SampleIntake(state, self.lifecycle, self.failed_samples)
        self.dispatcher = LeaseDispatcher(state, self.lifecycle)
        self.journals = SessionJournals(state, self.lifecycle)
        self.trainer = TrainerSession(state, self.lifecycle)
        self.operator = OperatorChanges(state, self.lifecycle)

    @property
    def servers(self) -> Mapping[str, Server]:
        """Registered rollout servers by name. Do not change them."""
        return self.state.leases.servers

    def admit_process(self, name: str, process: str) -> int:
        """Gives the name to a new process; returns its incarnation. Raises the same errors as
        `IncarnationTable.admit`."""
        above = self.state.trainer_incarnation if name == TRAINER else 0
        return self.state.incarnations.admit(name, process, above=above)

    def hold_grants(self) -> None:
        """Grants no lease until everything written so far is durable.

        If a buffer died before its generation is durable, the next one would reuse its lease ids.
        """

        def allow() -> None:
            self.state.leases.may_grant = True

        self.state.leases.may_grant = False
        self.state.store.when_durable(allow)

    def take_notices(self) -> list[str]:
        """The texts for the log since the last call."""
        notices, self.state.notices = self.state.notices, []
        return notices
