"""The engine's Prometheus series, read from the engine's own counters when scraped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from areal_like.runtime.metrics import PREFIX, SECONDS
from rollout_server.engine.loop import EngineLoop
from rollout_server.engine.weights.updater import WeightUpdater

_COUNTERS = {
    "generated_tokens": ("generated_tokens", "Tokens sampled"),
    "prefilled_tokens": ("prefilled_tokens", "Context tokens computed"),
    "copied_tokens": ("copied_tokens", "Context tokens whose KV was copied and not computed"),
    "shared_prefixes": ("shared_prefixes", "Sequences whose context was already computed"),
    "continued_prefixes": ("continued_prefixes", "Sequences that began with kept KV"),
    "steps": ("steps", "Decode steps"),
    "busy_seconds": ("busy_s", "Time inside steps"),
    "idle_seconds": ("idle_s", "Time with no runnable sequence"),
    "stall_seconds": ("stall_s", "Time from stopping for new weights to the next token"),
    "weight_updates": ("updates", "Weight updates activated"),
    "weight_update_failures": ("failed_updates", "Weight updates refused"),
    "weight_update_seconds": ("update_s", "Time from opening updates to activating them"),
}
"""Series -> its key in `numbers`, and its help text."""
_GAUGES = {
    "running": ("running", "Sequences being decoded"),
    "waiting": ("waiting", "Sequences in the queue"),
    "kv_rows": ("rows", "KV rows"),
    "kv_rows_used": ("running", "KV rows in use"),
    "kept_tokens": ("kept_tokens", "Tokens whose KV is kept for later turns"),
    "kept_states": ("kept_states", "Recurrent states kept for later turns"),
    "kv_bytes": ("kv_bytes", "Memory of the rows' keys and values"),
    "state_bytes": ("state_bytes", "Memory of the rows' recurrent states"),
    "threads": ("threads", "CPU threads of a forward pass"),
    "paused": ("paused", "1 while generation is paused"),
    "weight_version": ("weight_version", "Active version, -1 if it is not a number"),
}


def numbers(loop: EngineLoop, updater: WeightUpdater) -> dict[str, float | bool | str]:
    """The engine's load and its counts of weight updates: `load` in /server_info."""
    return dataclasses.asdict(loop.load()) | {
        "updates": updater.num_updates,
        "failed_updates": updater.num_failures,
        "update_s": updater.update_s,
    }


class EngineCollector(Collector):
    """Collects `areal_engine_*` from one engine."""

    def __init__(self, loop: EngineLoop, updater: WeightUpdater) -> None:
        self._loop = loop
        self._updater = updater

    def collect(self) -> Iterable[Metric]:
        """All series."""
        found = numbers(self._loop, self._updater)
        version = str(found["weight_version"])
        found["weight_version"] = int(version) if version.isdigit() else -1
        for name, (key, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_engine_{name}", text, value=float(found[key]))
        for name, (key, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}_engine_{name}", text, value=float(found[key]))


def watch_latencies(loop: EngineLoop, registry: CollectorRegistry) -> None:
    """Adds the latency histograms of sequences to the registry."""

    def seconds(name: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}_engine_{name}_seconds", text, buckets=SECONDS, registry=registry)

    loop.on_first_token = seconds("first_token", "Time from a sequence's request to its first token").observe
    loop.on_end = seconds("sequence", "Time from a sequence's request to its end").observe
