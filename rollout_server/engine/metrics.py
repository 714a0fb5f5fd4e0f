"""The engine's Prometheus series, read from the engine's own counters when scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from areal_like.runtime.metrics import PREFIX, SECONDS
from rollout_server.engine.loop import EngineLoop, Load
from rollout_server.engine.weights.updater import WeightUpdater


class EngineCollector(Collector):
    """Collects `areal_engine_*` from one engine."""

    def __init__(self, loop: EngineLoop, updater: WeightUpdater) -> None:
        self._loop = loop
        self._updater = updater

    def collect(self) -> Iterable[Metric]:
        """All series."""
        load = self._loop.load()
        for name, doc, value in [*_counters_of_load(load), *_counters_of_updates(self._updater)]:
            yield CounterMetricFamily(f"{PREFIX}_engine_{name}", doc, value=value)
        for name, doc, value in _gauges(load):
            yield GaugeMetricFamily(f"{PREFIX}_engine_{name}", doc, value=value)


def watch_latencies(loop: EngineLoop, registry: CollectorRegistry) -> None:
    """Adds the latency histograms of sequences to the registry."""
    first = Histogram(
        f"{PREFIX}_engine_first_token_seconds",
        "Time from a sequence's request to its first token",
        buckets=SECONDS,
        registry=registry,
    )
    whole = Histogram(
        f"{PREFIX}_engine_sequence_seconds",
        "Time from a sequence's request to its end",
        buckets=SECONDS,
        registry=registry,
    )
    loop.on_first_token, loop.on_end = first.observe, whole.observe


def update_numbers(updater: WeightUpdater) -> dict[str, float]:
    """Returns the weight update counters, keyed as in `load` of /server_info."""
    return {
        "updates": updater.num_updates,
        "failed_updates": updater.num_failures,
        "update_s": updater.update_s,
    }


def _counters_of_load(load: Load) -> list[tuple[str, str, float]]:
    """Name, help text and value of each counter."""
    return [
        ("generated_tokens", "Tokens sampled", load.generated_tokens),
        ("prefilled_tokens", "Context tokens computed", load.prefilled_tokens),
        ("copied_tokens", "Context tokens whose KV was copied and not computed", load.copied_tokens),
        ("shared_prefixes", "Sequences whose context was already computed", load.shared_prefixes),
        ("continued_prefixes", "Sequences that began with kept KV", load.continued_prefixes),
        ("steps", "Decode steps", load.steps),
        ("busy_seconds", "Time inside steps", load.busy_s),
        ("idle_seconds", "Time with no runnable sequence", load.idle_s),
        ("stall_seconds", "Time from stopping for new weights to the next token", load.stall_s),
    ]


def _counters_of_updates(updater: WeightUpdater) -> list[tuple[str, str, float]]:
    """Name, help text and value of each counter."""
    return [
        ("weight_updates", "Weight updates activated", updater.num_updates),
        ("weight_update_failures", "Weight updates refused", updater.num_failures),
        ("weight_update_seconds", "Time from opening updates to activating them", updater.update_s),
    ]


def _gauges(load: Load) -> list[tuple[str, str, float]]:
    """Name, help text and value of each gauge."""
    version = int(load.weight_version) if load.weight_version.isdigit() else -1
    return [
        ("running", "Sequences being decoded", load.running),
        ("waiting", "Sequences in the queue", load.waiting),
        ("kv_rows", "KV rows", load.rows),
        ("kv_rows_used", "KV rows in use", load.running),
        ("kept_tokens", "Tokens whose KV is kept for later turns", load.kept_tokens),
        ("paused", "1 while generation is paused", int(load.paused)),
        ("weight_version", "Active version, -1 if it is not a number", version),
    ]
