"""The buffer's Prometheus series. The ledger counts; here its numbers are copied, so that the ledger knows nothing of metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter

from areal_like.runtime.metrics import Metrics
from areal_like.wire.messages.hello import Role
from buffer.ledger.ledger import Ledger
from buffer.service.peers import PeerBook
from buffer.tickets import Drop, State, Verdict


class BufferSeries:
    """Call `update` often; every labelled series exists from the start."""

    def __init__(self, metrics: Metrics, *, max_staleness: int) -> None:
        lags = [str(lag) for lag in range(max_staleness + 1)]
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
        self._solve_rate = metrics.gauge(
            "curriculum_solve_rate",
            "Estimated solve rate of prompts (with buffer.curriculum): issued of late, and all",
            label="of",
            values=_PROMPTS,
        )
        self._plain = {
            name: metrics.counter(name, doc)
            for name, doc in (
                ("samples_failed", "Samples that a server could not make"),
                ("leases_lost", "Leases that expired, were returned, or whose server was replaced"),
                ("tokens_generated", "Sampled tokens"),
                ("tokens_trained", "Sampled tokens learned from"),
                ("received_bytes", "Bytes received from peers"),
                ("bad_frames", "Messages that could not be decoded"),
            )
        }
        self._seen: dict[tuple[int, str], float] = {}

    def update(self, ledger: Ledger, peers: PeerBook, plain: Mapping[str, float]) -> None:
        """Copies the numbers; `plain` has one for each unlabelled counter."""
        for state, count in ledger.register.num_by_state().items():
            self._tickets.labels(state).set(count)
        for reason, count in ledger.drops.items():
            self._raise(self._drops, reason, count)
        for verdict, count in ledger.statistics.verdicts.items():
            self._raise(self._samples, verdict, count)
        for lag, count in ledger.statistics.lag_histogram.items():
            self._raise(self._trained, str(lag), count)
        for name, counter in self._plain.items():
            self._raise(counter, "", plain[name])
        for role in Role:
            self._peers.labels(role.value).set(len(peers.of(role)))
        for of, step in zip(
            _STEPS, (ledger.trainer_step, ledger.committed_step + 1, ledger.recorder.step), strict=True
        ):
            self._steps.labels(of).set(step)
        self._bound.set(ledger.bound.max_staleness)
        self._version.set(ledger.versions.newest)
        self._bytes.set(ledger.store.num_bytes)
        self._free.set(sum(max(0, server.free_samples) for server in ledger.book.servers.values()))
        self._due.set(ledger.recorder.num_due)
        if (curriculum := ledger.prompts.curriculum) is not None:
            for of, rate in zip(
                _PROMPTS, (curriculum.issued_solve_rate, curriculum.mean_solve_rate), strict=True
            ):
                self._solve_rate.labels(of).set(rate)

    def _raise(self, counter: Counter, label: str, value: float) -> None:
        key = (id(counter), label)
        if (more := value - self._seen.get(key, 0.0)) > 0:
            (counter.labels(label) if label else counter).inc(more)
            self._seen[key] = value


_PROMPTS = ("issued", "all")
_STEPS = ("completed", "committed", "recording")
