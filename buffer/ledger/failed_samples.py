"""Applies `buffer.on_failure` to failed samples, and judges the server and the task by failures in a row.

    failed sample -> retry (leased again) | drop (its ticket ends); `zero` arrives as a normal sample
    of an evaluation -> retry | given up: it counts 0, and the other samples of its prompt continue
    server's row too long -> quarantine of that server
    rows of every server too long before the first good sample -> the job ends with the last error

One server must not be able to end a job while others work, so failures in a row are counted for each server
(`buffer/tables/server_health.py`), and the job ends only when every server with an outcome is broken. The
task's code can end it only while no sample was ever good: then the code most likely has a mistake, and the
user who started the job is told at once. Later the job keeps waiting, with occasional retries, for a judge or
a game server to come back. Failures that a server in quarantine still reports are retried without being
counted, so it cannot use up a ticket's retries. A prompt that is too long says nothing about the server or
the task; the job ends only after more of them than any data set would explain. Failed rewards of an
evaluation set with its own task do not count either: training continues without it. External agents are
judged where they claim their sessions.
"""

from __future__ import annotations

from areal_like.failures import FAULTS_OF_AGENTS, FAULTS_OF_SERVER, FAULTS_OF_TASK, FailureKind, FailurePolicy
from areal_like.wire.messages.producer import Purpose
from buffer.ledger.lifecycle import TicketLifecycle, TicketRules
from buffer.ledger.state import LedgerState
from buffer.tables.lease_table import Server
from buffer.tickets import Drop, State, Ticket

MAX_PROMPTS_GIVEN_UP = 10_000
"""Consecutive tickets, without an accepted sample between them, that may be dropped because of their
prompts."""


class FailedSamples(TicketRules):
    """Retries failed samples up to `buffer.max_sample_retries` times each, or drops their ticket."""

    def __init__(self, state: LedgerState, lifecycle: TicketLifecycle) -> None:
        super().__init__(state, lifecycle)
        self._num_prompts_in_row = 0

    def retry_or_drop(
        self,
        ticket: Ticket,
        lease_id: int,
        sample_index: int,
        *,
        kind: FailureKind,
        num_tokens: int,
        error: str,
    ) -> None:
        """Counts a failure of one sample, then leases the sample again or drops its ticket (FAILED).

        For an eval ticket, only the sample is given up.

        `num_tokens`: its sampled tokens, which are lost.
        """
        name = ticket.leases[lease_id].server
        self._lifecycle.remove_from_lease(ticket, lease_id, sample_index, arrived=False)
        ticket.failed_at = name
        if self._leases.servers[name].health.quarantine is not None:
            self._counters.count_failure(kind, FailurePolicy.RETRY, num_tokens=num_tokens)
            self._lifecycle.requeue(ticket, [sample_index])
            return
        self._judge(name, ticket, kind, f"{name}: {error}")
        ticket.num_failures[sample_index] = ticket.num_failures.get(sample_index, 0) + 1
        is_last = ticket.num_failures[sample_index] > self._settings.buffer.max_sample_retries
        is_given_up = is_last or self._settings.buffer.on_failure.policy(kind) is FailurePolicy.DROP
        if is_given_up and ticket.purpose is Purpose.EVAL:
            ticket.failed.add(sample_index)
        self._store.put_failure(ticket, sample_index)
        policy = FailurePolicy.DROP if is_given_up else FailurePolicy.RETRY
        self._counters.count_failure(kind, policy, num_tokens=num_tokens)
        if not is_given_up:
            self._lifecycle.requeue(ticket, [sample_index])
        elif ticket.purpose is Purpose.EVAL:
            self._lifecycle.end_eval_sample(ticket)
        elif ticket.state is State.CLOSED:
            self._lifecycle.give_up(ticket, [sample_index], Drop.FAILED)
        else:
            self._lifecycle.drop(ticket, Drop.FAILED, may_reissue=kind is not FailureKind.PROMPT)

    def count_success(self, name: str) -> None:
        """A sample of this server was accepted, which ends its failures in a row."""
        self._num_prompts_in_row = 0
        self._leases.servers[name].health.succeed()

    def count_zero(self, name: str, kind: FailureKind, *, num_tokens: int) -> None:
        """A sample of this server was accepted that is trained on with reward 0 because it failed."""
        self._num_prompts_in_row = 0
        self._counters.count_failure(kind, FailurePolicy.ZERO, num_tokens=num_tokens)
        self._leases.servers[name].health.succeed_without_reward()

    @property
    def task_trouble(self) -> str:
        """Why no server makes samples, if the task's code, or a teacher, fails at all of them; else empty."""
        quarantines = [server.health.quarantine for server in self._leases.servers.values()]
        if not quarantines or not all(one is not None and one.is_of_task for one in quarantines):
            return ""
        reasons = [one.reason for one in quarantines if one is not None]
        return f"the task's code or a teacher fails at every rollout server: {reasons[0]}"

    def lied(self, name: str, what: str) -> None:
        """A server has sent a message that no server sends. Others make its samples while it is in
        quarantine."""
        server = self._leases.servers.get(name)
        if server is None or not server.health.lie(what, now_s=server.last_heard_s):
            return
        self._begin_quarantine(server, "")
        for lease in list(server.leases.values()):
            self._lifecycle.revoke(lease)

    def _judge(self, name: str, ticket: Ticket, kind: FailureKind, error: str) -> None:
        """Counts a failure of the server, which may start a quarantine or end the job."""
        if ticket.purpose is Purpose.EVAL and (
            kind is FailureKind.PROMPT
            or (kind in FAULTS_OF_TASK and ticket.eval_set in self._settings.eval_sets_with_task)
        ):
            return
        if kind in FAULTS_OF_AGENTS:
            return
        if kind not in FAULTS_OF_SERVER | FAULTS_OF_TASK:
            self._num_prompts_in_row += 1
            if self._num_prompts_in_row >= MAX_PROMPTS_GIVEN_UP:
                self._end_job(
                    f"{self._num_prompts_in_row} prompts in a row cannot be used; the last: {error}"
                )
            return
        server = self._leases.servers[name]
        limit = self._settings.buffer.max_consecutive_failures
        if not server.health.fail(ticket.ticket_id, kind, error, limit=limit, now_s=server.last_heard_s):
            return
        assert server.health.quarantine is not None
        reason = server.health.quarantine.reason
        self._begin_quarantine(server, f" for {server.health.quarantine.until_s - server.last_heard_s:g} s")
        healths = [other.health for other in self._leases.servers.values() if other.health.has_outcome]
        may_task_end = not self._counters.num_good_samples
        if all(health.is_broken(may_task_end=may_task_end) for health in healths):
            self._end_job(reason)

    def _begin_quarantine(self, server: Server, how_long: str) -> None:
        assert server.health.quarantine is not None
        self._leases.in_quarantine.add(server.name)
        self._counters.count("num_quarantines")
        self._state.notices.append(
            f"{server.name} gets no leases{how_long}: {server.health.quarantine.reason}"
        )

    def _end_job(self, reason: str) -> None:
        self._state.failure_reason = self._state.failure_reason or reason
