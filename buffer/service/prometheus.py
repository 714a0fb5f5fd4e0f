"""The buffer's Prometheus series, copied from the ledger at every tick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Counter
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from areal_like.failures import FailureKind, FailurePolicy
from areal_like.runtime.metrics import PREFIX, Metrics
from areal_like.selection import LENGTHS, MAX_BUCKET, failures_of, lengths_of, wasted_of
from areal_like.wire.messages.hello import Role
from buffer.ledger.state import LedgerState
from buffer.service.peers import ConnectedPeers
from buffer.tickets import REFUSALS, Drop, State, Verdict

_WASTED = sorted(
    {reason.value for reason in Drop}
    | {verdict.name.lower() for verdict in REFUSALS}
    | {f"failed_{kind.value}" for kind in FailureKind}
)
_POPULATIONS = {
    "offered": ("offered",),
    "trained": ("trained",),
    "failed": tuple(f"failed_{kind.value}" for kind in FailureKind),
}
_STEPS = ("completed", "committed", "recording")
_PROMPTS = ("issued", "all")
_PARTS = ("waiting", "running")
_MAX_LAGS = 256
"""Lags whose series exist from the start. `max_staleness` may be so large that it is no bound; the series of
a larger lag begins with the first sample that has it."""


class BufferSeries:
    """All series of the buffer. Every labeled series exists from the start, at zero."""

    def __init__(self, metrics: Metrics, *, max_staleness: int) -> None:
        """`max_staleness`: the largest lag that a sample can have (the cap)."""
        lags = [str(lag) for lag in range(min(max_staleness + 1, _MAX_LAGS))]
        self._tickets = metrics.gauge("tickets", "Tickets by state", label="state", values=list(State))
        self._drops = metrics.counter(
            "tickets_dropped", "Dropped tickets by reason", label="reason", values=list(Drop)
        )
        self._samples = metrics.counter(
            "samples_offered", "Samples that arrived, by verdict", label="verdict", values=list(Verdict)
        )
        self._trained = metrics.counter(
            "samples_trained", "Samples learned from, by lag in optimizer steps", label="lag", values=lags
        )
        self._failed = metrics.counter_of(
            "samples_failed",
            "Failed samples by kind, and by what was done: sampled again, trained with reward 0, or dropped",
            {"kind": list(FailureKind), "outcome": list(FailurePolicy)},
        )
        self._wasted = metrics.counter(
            "tokens_wasted", "Sampled tokens that are not trained on", label="reason", values=_WASTED
        )
        self._lengths = ResponseLengths()
        metrics.registry.register(self._lengths)
        self._quarantined = metrics.gauge(
            "servers_quarantined", "Servers that get no leases because of failures in a row"
        )
        self._peers = metrics.gauge(
            "peers", "Registered peers by role", label="role", values=[role.value for role in Role]
        )
        self._steps = metrics.gauge(
            "step",
            "Optimizer steps: completed, committed, and the one being recorded",
            label="of",
            values=_STEPS,
        )
        self._bound = metrics.gauge(
            "max_staleness", "Bound on lag, in optimizer steps, of tickets issued now"
        )
        self._version = metrics.gauge("weights_newest_version", "Newest allocated weights version")
        self._bytes = metrics.gauge("buffer_bytes", "Bytes of records held")
        self._free = metrics.gauge("free_samples", "Samples that servers could take now")
        self._due = metrics.gauge(
            "tickets_due", "Running tickets that cannot be recorded later than in the open step"
        )
        self._parts = metrics.gauge(
            "parts",
            "Samples of closed groups: waiting for a position, still generated",
            label="state",
            values=_PARTS,
        )
        self._solve_rate = metrics.gauge(
            "curriculum_solve_rate",
            "Estimated solve rate of prompts (with buffer.curriculum): of those issued recently, and of all",
            label="of",
            values=_PROMPTS,
        )
        self._held_back = metrics.counter(
            "held_back_seconds",
            "Time in which the trainer waited although complete samples of unfinished groups would do",
        )
        self._unlabeled = {
            name: metrics.counter(name, doc)
            for name, doc in (
                ("quarantines", "Quarantines of servers because of failures in a row"),
                ("prompts_given_up", "Prompts that were dropped and not issued again in their epoch"),
                ("leases_lost", "Leases that expired, were returned, or whose server was replaced"),
                ("tokens_trained", "Sampled tokens learned from"),
                ("tokens_masked", "Sampled tokens of trained samples that were beyond the staleness bound"),
                ("groups_closed", "Groups closed before all of their samples were complete"),
                ("samples_early", "Samples of closed groups that were complete at the closing"),
                ("samples_late", "Samples of closed groups that arrived after the closing"),
                ("parts_dropped", "Complete samples of closed groups that were given up"),
                ("received_bytes", "Bytes received from peers"),
                ("bad_frames", "Messages that could not be decoded"),
                ("refused_frames", "Messages refused because of their sender's key"),
                ("refused_handshakes", "Connections refused for lack of an allowed key"),
                ("unregistered_frames", "Messages of peers that have not registered"),
                ("undelivered_messages", "Messages dropped because the peer did not read those before"),
            )
        }
        self._exported: dict[tuple[int, tuple[str, ...]], float] = {}
        """Value of each counter at the last update, by (id of the counter, values of its labels)."""

    def update(self, state: LedgerState, peers: ConnectedPeers, counters: Mapping[str, float]) -> None:
        """Copies the numbers. `counters`: the ledger's, and the value of each counter without a label."""
        for ticket_state, count in state.tickets.num_by_state().items():
            self._tickets.labels(ticket_state).set(count)
        for reason in Drop:
            self._raise_to(self._drops, state.drops[reason], reason)
        for verdict, count in state.counters.verdicts.items():
            self._raise_to(self._samples, count, verdict)
        for lag, count in state.counters.lag_histogram.items():
            self._raise_to(self._trained, count, str(lag))
        for kind, outcomes in failures_of(counters).items():
            for outcome, count in outcomes.items():
                self._raise_to(self._failed, count, kind, outcome)
        for wasted_because, num_tokens in wasted_of(counters).items():
            self._raise_to(self._wasted, num_tokens, wasted_because)
        self._lengths.counters = counters
        servers = state.leases.servers.values()
        self._quarantined.set(sum(server.health.quarantine is not None for server in servers))
        for name, counter in self._unlabeled.items():
            self._raise_to(counter, counters[name])
        for role in Role:
            self._peers.labels(role.value).set(peers.count(role))
        steps = (state.steps.current, state.steps.committed + 1, state.scheduler.step)
        for of, step in zip(_STEPS, steps, strict=True):
            self._steps.labels(of).set(step)
        self._bound.set(state.bound.current)
        self._version.set(state.versions.newest)
        self._bytes.set(state.store.num_bytes)
        self._free.set(sum(max(0, server.free_samples) for server in servers))
        self._due.set(state.scheduler.num_due)
        for of, number in zip(_PARTS, (state.parts.num_loose, state.parts.num_late), strict=True):
            self._parts.labels(of).set(number)
        self._raise_to(self._held_back, counters["held_back_s"])
        if (curriculum := state.prompts.curriculum) is not None:
            rates = (curriculum.issued_solve_rate, curriculum.mean_solve_rate)
            for of, rate in zip(_PROMPTS, rates, strict=True):
                self._solve_rate.labels(of).set(rate)

    def _raise_to(self, counter: Counter, value: float, *labels: str) -> None:
        key = (id(counter), labels)
        if (increase := value - self._exported.get(key, 0.0)) > 0:
            (counter.labels(*labels) if labels else counter).inc(increase)
            self._exported[key] = value


class ResponseLengths(Collector):
    """The histograms of response lengths, which the ledger has counted in buckets already."""

    def __init__(self) -> None:
        self.counters: Mapping[str, float] = {}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(
            f"{PREFIX}_response_tokens",
            "Sampled tokens of a train sample: offered with a reward, trained on, failed",
            labels=["of"],
        )
        for of, names in _POPULATIONS.items():
            cumulative, total = [], 0
            for bucket, count in enumerate(lengths_of(self.counters, names)):
                total += count
                limit = "+Inf" if bucket == MAX_BUCKET else str(float(LENGTHS[bucket]))
                cumulative.append((limit, float(total)))
            num_tokens = sum(self.counters.get(f"{name}_sum_tokens", 0.0) for name in names)
            family.add_metric([of], cumulative, num_tokens)
        yield family
