"""Prometheus metrics of one daemon: all names have one prefix, all values are in base units.

Every labeled series starts at zero, so that Prometheus can compute its rate from the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

PREFIX = "areal"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one daemon.

    Each has its own registry, so that a test can run several daemons in one process.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

    def counter(self, name: str, doc: str, *, label: str = "", values: Sequence[str] = ()) -> Counter:
        """A counter `areal_<name>_total`, with at most one label whose values are known."""
        return self.counter_of(name, doc, {label: values} if label else {})

    def counter_of(self, name: str, doc: str, labels: Mapping[str, Sequence[str]]) -> Counter:
        """A counter `areal_<name>_total` with the values of each of its labels."""
        counter = Counter(f"{PREFIX}_{name}", doc, list(labels), registry=self.registry)
        for values in itertools.product(*labels.values()) if labels else ():
            counter.labels(*values)
        return counter

    def gauge(self, name: str, doc: str, *, label: str = "", values: Sequence[str] = ()) -> Gauge:
        """A gauge `areal_<name>`."""
        gauge = Gauge(f"{PREFIX}_{name}", doc, [label] if label else [], registry=self.registry)
        for value in values:
            gauge.labels(value)
        return gauge

    def gauge_of(self, name: str, doc: str, labels: Sequence[str], values: Iterable[Sequence[str]]) -> Gauge:
        """A gauge `areal_<name>` with several labels; `values`: the combinations that exist."""
        gauge = Gauge(f"{PREFIX}_{name}", doc, labels, registry=self.registry)
        for combination in values:
            gauge.labels(*combination)
        return gauge

    def histogram(self, name: str, doc: str, *, buckets: Sequence[float]) -> Histogram:
        """A histogram `areal_<name>`."""
        return Histogram(f"{PREFIX}_{name}", doc, buckets=buckets, registry=self.registry)

    def exposition(self) -> bytes:
        """The body of /metrics, in Prometheus' text format."""
        return generate_latest(self.registry)
