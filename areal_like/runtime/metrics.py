"""Prometheus metrics of one daemon: all names have one prefix, all values are in base units.

Every labeled series starts at zero, so that Prometheus can compute its rate from the start.
"""

from __future__ import annotations

import itertools
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "areal"
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
"""Buckets of durations in seconds: half a decade each, from a disk write to the longest generation."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# `_created`, the start time of a counter, would double the number of series, and is not used.
disable_created_metrics()  # type: ignore[no-untyped-call]


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
        return self.gauge_of(name, doc, [label] if label else [], [(value,) for value in values])

    def gauge_of(self, name: str, doc: str, labels: Sequence[str], values: Iterable[Sequence[str]]) -> Gauge:
        """A gauge `areal_<name>` with several labels; `values`: the combinations that exist."""
        gauge = Gauge(f"{PREFIX}_{name}", doc, labels, registry=self.registry)
        for combination in values:
            gauge.labels(*combination)
        return gauge

    def histogram(
        self, name: str, doc: str, *, buckets: Sequence[float], label: str = "", values: Sequence[str] = ()
    ) -> Histogram:
        """A histogram `areal_<name>`, with at most one label whose values are known."""
        labels = [label] if label else []
        histogram = Histogram(f"{PREFIX}_{name}", doc, labels, buckets=buckets, registry=self.registry)
        for value in values:
            histogram.labels(value)
        return histogram

    def exposition(self) -> bytes:
        """The body of /metrics, in Prometheus' text format."""
        return generate_latest(self.registry)


class DaemonSeries(Collector):
    """The series that every daemon has, read when they are requested."""

    def __init__(self, directory: Path, *, not_ready: Callable[[], str]) -> None:
        """`directory`: of the run. `not_ready`: why the daemon is not ready; empty if it is."""
        self._directory = directory
        self._not_ready = not_ready
        self._versions = {
            "version": _version("areal-like"),
            "torch": _version("torch"),
            "python": platform.python_version(),
        }

    def collect(self) -> Iterable[Metric]:
        """Build, readiness and free disk space."""
        build = GaugeMetricFamily(
            f"{PREFIX}_build_info", "Versions of the daemon; always 1", labels=list(self._versions)
        )
        build.add_metric(list(self._versions.values()), 1.0)
        yield build
        is_ready = float(not self._not_ready())
        yield GaugeMetricFamily(
            f"{PREFIX}_ready", "1 while /readyz responds with 200, else 0", value=is_ready
        )
        try:
            free = shutil.disk_usage(self._directory).free
        except OSError:
            return
        yield GaugeMetricFamily(
            f"{PREFIX}_disk_free_bytes",
            "Bytes that the file system of the run's directory has left",
            value=free,
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
