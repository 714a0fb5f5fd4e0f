"""The Prometheus series of a router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from areal_like.runtime.metrics import SECONDS, Metrics
from rollout_server.router.table import Retry

_GAUGES = {
    "servers": "Rollout servers that can be asked.",
    "sessions": "Sessions whose server is remembered.",
    "claims": "Claims that wait.",
    "pending": "Requests at rollout servers, claims included.",
    "streams": "Responses that are being passed on in pieces.",
}


class Outcome(StrEnum):
    """What became of a request: the label of `areal_router_requests_total`."""

    PASSED = "passed"
    """The client got a server's response, whatever its status."""
    REFUSED = "refused"
    """The router refused it: no such route, or a malformed claim."""
    BUSY = "busy"
    """There were too many requests: status 429 or 503."""
    UNSERVED = "unserved"
    """No session waited in time, or no server could be reached or continued the session: 429 or 503."""
    BROKEN = "broken"
    """A server's response broke off after its beginning, or was none that a rollout server sends."""
    GONE = "gone"
    """The client disconnected first."""


class RouterSeries:
    """Counts what one router does."""

    def __init__(self, metrics: Metrics) -> None:
        requests = metrics.counter(
            "router_requests", "Requests of agents, by outcome.", label="outcome", values=list(Outcome)
        )
        self._requests = {outcome: requests.labels(outcome.value) for outcome in Outcome}
        self._retries = metrics.counter(
            "router_retries", "Requests that were sent again, by reason.", label="reason", values=list(Retry)
        )
        self._seconds = metrics.histogram(
            "router_request_seconds",
            "Time from a request's arrival to the begin of its response.",
            buckets=SECONDS,
        )
        self._gauges = {
            name: metrics.gauge(f"router_{name}", description) for name, description in _GAUGES.items()
        }

    def show(self, values: Mapping[str, Callable[[], float]]) -> None:
        """Sets the functions that return the gauges' values: one for each of `_GAUGES`."""
        for name, gauge in self._gauges.items():
            gauge.set_function(values[name])

    def ended(self, outcome: Outcome) -> None:
        """A request is over."""
        self._requests[outcome].inc()

    def retried(self, reason: Retry) -> None:
        """A request is sent again."""
        self._retries.labels(reason.value).inc()

    def began(self, *, after_s: float) -> None:
        """A response begins."""
        self._seconds.observe(after_s)
