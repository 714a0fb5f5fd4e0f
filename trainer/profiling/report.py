"""Summarizes a profile's traces: time by named part of a step, and the operations that take the most time.

It is a JSON file next to the traces, so that a command without torch can print it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainer.profiling.ranges import PREFIX

TOP_OPERATIONS = 30
_S = 1e-6  # the profiler counts microseconds


@dataclass(kw_only=True)
class _Sum:
    calls: int = 0
    cpu_s: float = 0.0
    device_s: float = 0.0


@dataclass(kw_only=True)
class ProfileReport:
    """Sums over the recorded steps of one rank."""

    id: str
    rank: int
    device: str
    num_asked: int
    """Number of requested steps."""
    steps: list[int] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    """Names of the files, one for each step."""
    error: str = ""
    """Why fewer steps were recorded than requested."""
    _ranges: dict[str, _Sum] = field(default_factory=dict)
    _operations: dict[str, _Sum] = field(default_factory=dict)

    def add(self, step: int, *, trace: str, averages: Iterable[Any]) -> None:
        """Adds a step. `averages`: `key_averages()` of torch's profiler."""
        self.steps.append(step)
        self.traces.append(trace)
        for average in averages:
            is_range = average.key.startswith(PREFIX)
            sums = self._ranges if is_range else self._operations
            one = sums.setdefault(average.key.removeprefix(PREFIX), _Sum())
            one.calls += average.count
            one.cpu_s += _S * (average.cpu_time_total if is_range else average.self_cpu_time_total)
            one.device_s += _S * (average.device_time_total if is_range else average.self_device_time_total)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON. Times of parts include nested parts, times of operations do not include nested
        ones.

        `operations`: those that take the most time, on the device if there is one, else on the CPU.
        """
        has_device = any(one.device_s for one in self._operations.values())

        def rows(sums: dict[str, _Sum]) -> list[dict[str, Any]]:
            ordered = sorted(
                sums.items(), key=lambda item: -(item[1].device_s if has_device else item[1].cpu_s)
            )
            return [
                {"name": name, "calls": one.calls, "cpu_s": one.cpu_s, "device_s": one.device_s}
                for name, one in ordered
            ]

        return {
            "id": self.id,
            "rank": self.rank,
            "device": self.device,
            "num_asked": self.num_asked,
            "steps": self.steps,
            "traces": self.traces,
            "error": self.error,
            "ranges": rows(self._ranges),
            "operations": rows(self._operations)[:TOP_OPERATIONS],
        }
