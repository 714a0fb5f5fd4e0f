"""Intake of samples: the verdict on each sample that arrives, and the group filters.

Failed samples go to `FailedSamples` (failed_samples.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from areal_like.failures import FailureKind, FailurePolicy
from areal_like.trajectory import FinishReason, are_equal_rewards
from areal_like.wire.messages.producer import Purpose, SampleDone, SampleFailed
from areal_like.wire.records import Record
from buffer.ledger.failed_samples import FailedSamples
from buffer.ledger.lifecycle import TicketLifecycle, TicketRules
from buffer.ledger.state import LedgerState
from buffer.tickets import Drop, SampleSummary, State, Ticket, Verdict

_MANY_WITHOUT_SPREAD = 256
"""Consecutive groups without spread at which a log line is written; the next at twice as many, and so on."""


class SampleIntake(TicketRules):
    """Accepts or refuses samples, and decides whether a complete group is trained on."""

    def __init__(self, state: LedgerState, lifecycle: TicketLifecycle, failed_samples: FailedSamples) -> None:
        super().__init__(state, lifecycle)
        self._failed_samples = failed_samples
        self.last_rejection = ""
        """Description of the last group that the `single_version` filter rejected; empty: there was none."""
        self._num_without_spread = 0
        """Consecutive groups that the `spread` filter dropped."""

    @property
    def is_full(self) -> bool:
        """True while nothing can be written and memory has more than `buffer.cache_bytes` of samples and
        their routes: further ones wait at their servers."""
        blocked = bool(self._store.write_blocked_reason)
        return blocked and self._store.num_bytes > self._settings.buffer.cache_bytes

    def samples_done(self, name: str, samples: Sequence[SampleDone]) -> list[Verdict]:
        """Takes the samples that a server sent. The caller acknowledges them when they are durable."""
        verdicts = [self._take(name, sample) for sample in samples]
        for sample, verdict in zip(samples, verdicts, strict=True):
            if verdict is Verdict.INVALID and not sample.record.is_plausible:
                what = f"a sample with an absurd number (its reward is {sample.record.reward:g})"
                self._failed_samples.lied(name, what)
        self._lifecycle.record_ready_groups()
        return verdicts

    def sample_failed(self, name: str, message: SampleFailed) -> Verdict:
        """A server could not make a sample. Another server may get it, until its ticket is dropped."""
        index = message.sample_index
        verdict, ticket = self._find(
            name, lease_id=message.lease_id, ticket_id=message.ticket_id, sample_index=index
        )
        if ticket is not None:
            self._failed_samples.retry_or_drop(
                ticket,
                message.lease_id,
                index,
                kind=message.kind,
                num_tokens=min(message.num_tokens, self._settings.max_tokens),
                error=message.error,
            )
            self._lifecycle.record_ready_groups()
        return verdict

    def _find(
        self, name: str, *, lease_id: int, ticket_id: int, sample_index: int
    ) -> tuple[Verdict, Ticket | None]:
        """The verdict on a sample from its ids alone, and its ticket if the verdict is ACCEPTED."""
        ticket = self._tickets.live.get(ticket_id)
        if ticket is None:
            return (Verdict.FINISHED if self._tickets.has_issued(ticket_id) else Verdict.UNKNOWN_TICKET), None
        known = ticket.samples.get(sample_index)
        if known is not None:
            return (Verdict.DUPLICATE if known.lease_id == lease_id else Verdict.SUPERSEDED), None
        lease = ticket.leases.get(lease_id)
        if lease is None or lease.server != name or sample_index not in lease.outstanding:
            return Verdict.SUPERSEDED, None
        return Verdict.ACCEPTED, ticket

    def _take(self, name: str, done: SampleDone) -> Verdict:
        lease_id, record, index = done.lease_id, done.record, done.record.sample_index
        verdict, ticket = self._find(name, lease_id=lease_id, ticket_id=record.ticket_id, sample_index=index)
        num_sampled = record.num_sampled
        kind, fault = FailureKind.ENGINE, ""
        if ticket is not None:
            if fault := self._fault_of_routes(ticket, record):
                verdict, kind = Verdict.INVALID, FailureKind.ROUTES
            elif num_sampled == 0 or self._is_invalid(ticket, record) or self._is_invalid_zero(done):
                verdict = Verdict.INVALID
            elif isinstance(summary := self._summary(done), SampleSummary):
                if done.failure:
                    failure = FailureKind(done.failure)
                    self._failed_samples.count_zero(name, failure, num_tokens=num_sampled)
                else:
                    self._failed_samples.count_success(name)
                self._accept(ticket, summary, record)
            else:
                verdict = summary
        self._counters.count_offered(verdict, num_sampled=num_sampled)
        if ticket is None or verdict is Verdict.ACCEPTED:
            return verdict
        if verdict is Verdict.ABANDONED:
            # Not the server's failure: the trainer resumed at an earlier step during the sampling.
            self._lifecycle.remove_from_lease(ticket, lease_id, index, arrived=False)
            self._lifecycle.requeue(ticket, [index])
        else:
            # Its tokens are counted as refused, so they are not counted as lost again.
            self._failed_samples.retry_or_drop(
                ticket,
                lease_id,
                index,
                kind=kind,
                num_tokens=0,
                error=f"it sent a sample that cannot be used ({fault or verdict.value})",
            )
        return verdict

    def _summary(self, done: SampleDone) -> SampleSummary | Verdict:
        return self._versions.summarize(done.lease_id, done.record, failure=done.failure)

    def _is_invalid_zero(self, done: SampleDone) -> bool:
        """True if a sample claims a failure that is not trained on with reward 0, or claims one with another
        reward."""
        if not done.failure:
            return False
        policy = self._settings.buffer.on_failure.policy(FailureKind(done.failure))
        return policy is not FailurePolicy.ZERO or done.record.reward != 0

    def _is_invalid(self, ticket: Ticket, record: Record) -> bool:
        """True if a sample was aborted, is too long, is not of the kind that was leased, or has numbers that
        no reward or engine produces."""
        if record.finish_reason is FinishReason.ABORT or not record.is_plausible:
            return True
        if ticket.purpose is Purpose.EVAL:  # it need not fit into a micro-batch
            return record.num_tokens > self._settings.max_eval_tokens
        return (
            record.is_greedy is not ticket.is_greedy(record.sample_index)
            or record.num_tokens > self._settings.max_tokens
            or record.longest_segment > self._settings.max_segment_tokens
        )

    def _fault_of_routes(self, ticket: Ticket, record: Record) -> str:
        """Empty if a sample has routes exactly where the trainer needs them, and they are of its model."""
        is_trained_on = ticket.purpose is Purpose.TRAIN and not ticket.is_greedy(record.sample_index)
        needs_routes = self._settings.router_replay and is_trained_on
        if (record.structure.routes is not None) is not needs_routes:
            return "it has no routes" if needs_routes else "it has routes that nobody needs"
        want, routes = self._state.routes_shape, record.routes
        if want is not None and routes is not None and routes.shape != want:
            return f"its routes are those of {routes.shape}, and the trainer's model has {want}"
        return ""

    def _accept(self, ticket: Ticket, sample: SampleSummary, record: Record) -> None:
        self._lifecycle.remove_from_lease(ticket, sample.lease_id, record.sample_index, arrived=True)
        self._tickets.add_sample(ticket, record.sample_index, sample)
        self._store.put_sample(sample, record)
        if ticket.purpose is Purpose.EVAL:
            self._lifecycle.end_eval_sample(ticket)
            return
        if not ticket.is_greedy(record.sample_index):
            self._counters.count_training_sample(sample)
        if ticket.state is State.CLOSED:
            self._lifecycle.add_late(ticket, record.sample_index)
        elif len(ticket.samples) == ticket.num_samples:
            self._complete(ticket)
        else:
            self._lifecycle.requeue(ticket, ())

    def _complete(self, ticket: Ticket) -> None:
        """Filters a train group whose samples have all arrived, before it can take a position in a step."""
        self._state.prompts.observe(ticket)
        self._counters.count_group(ticket)
        group_filter = self._settings.buffer.group_filter
        if group_filter == "spread" and are_equal_rewards([s.reward for s in ticket.training_samples]):
            self._lifecycle.drop(ticket, Drop.NO_SPREAD)
            self._note_without_spread(ticket)
        elif group_filter == "single_version" and not self._is_single_version(ticket.samples.values()):
            self.last_rejection = _describe_mixed_versions(ticket)
            self._lifecycle.drop(ticket, Drop.REJECTED)
        else:
            self._num_without_spread = 0
            self._lifecycle.mark_ready(ticket)

    def _note_without_spread(self, ticket: Ticket) -> None:
        """Logs groups without spread: a step for which no group has spread waits forever."""
        self._num_without_spread += 1
        rows, rest = divmod(self._num_without_spread, _MANY_WITHOUT_SPREAD)
        if not rest and rows & (rows - 1) == 0:
            self._state.notices.append(
                f"buffer.group_filter=spread has dropped {self._num_without_spread} groups in a row, because "
                f"the rewards of each were all equal (the last: {ticket.training_samples[0].reward:g}): the "
                "task is solved, or too hard for the policy; `areal-like data stats RUN` counts both kinds"
            )

    def _is_single_version(self, samples: Iterable[SampleSummary]) -> bool:
        """True if all tokens were sampled with the same weights. A push and its repetition have the same
        weights."""
        versions = {
            version for sample in samples for version in (sample.oldest_version, sample.newest_version)
        }
        return len({self._versions.weights_of(version) for version in versions}) == 1


def _describe_mixed_versions(ticket: Ticket) -> str:
    by_sample = ", ".join(
        str(sample.oldest_version)
        if sample.oldest_version == sample.newest_version
        else f"{sample.oldest_version}-{sample.newest_version}"
        for _, sample in sorted(ticket.samples.items())
    )
    return (
        f"the samples of ticket {ticket.ticket_id} come from different weights (versions {by_sample}), and "
        "buffer.group_filter=single_version accepts one version per group: "
        "with weights.update_mode=drain and weights.sync_interval above 1 no group spans a push"
    )
