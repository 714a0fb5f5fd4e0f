"""Measures the seconds of one optimizer step by phase, for its metrics.

On a CPU the clock is the host's. A GPU runs kernels asynchronously, so there a phase lasts from one event in
the stream to another. These times are read at the end of the step, because reading them earlier would stall
the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from trainer.distributed.place import RankPhase
from trainer.profiling.ranges import named_range

T = TypeVar("T")


class Clock(Protocol):
    """Marks points in time, and later gives the seconds between them."""

    def mark(self) -> Any:
        """Returns a mark of the current time. Must not block."""

    def seconds(self, spans: Iterable[tuple[Any, Any]]) -> list[float]:
        """The seconds from the first to the second mark of each pair. May block."""


class HostClock:
    """Time of the host."""

    def mark(self) -> float:
        """The current time."""
        return time.perf_counter()

    def seconds(self, spans: Iterable[tuple[float, float]]) -> list[float]:
        """The differences of the marks."""
        return [end - start for start, end in spans]


class CudaClock:
    """Time of a GPU's current stream: a mark is an event that is reached after the work queued before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Records an event after all work that is in the stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, spans: Iterable[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        """Waits for the stream, then reads the events."""
        torch.cuda.current_stream(self._device).synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in spans]


def clock_of(device: torch.device) -> Clock:
    """The clock of the work on this device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class PhaseTimer:
    """Adds up time by phase, from its creation on."""

    def __init__(
        self, phases: Iterable[str], *, place: RankPhase | None = None, clock: Clock | None = None
    ) -> None:
        """`phases`: all names; a phase in which no time was spent is reported as 0. `place`: gets the
        current phase.

        `clock`: measures the phases; None: the host's clock.
        """
        self._place = place or RankPhase()
        self._clock = clock or HostClock()
        self._start = time.perf_counter()
        self._spans: dict[str, list[tuple[Any, Any]]] = {phase: [] for phase in phases}

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Counts the time of a block."""
        name, spans = phase.removesuffix("_s"), self._spans[phase]
        start, outer = self._clock.mark(), self._place.phase
        self._place.enter(name)
        try:
            with named_range(name):
                yield
        finally:
            spans.append((start, self._clock.mark()))
        self._place.enter(outer)  # not after an error, whose message names the phase

    def timed(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Counts the time that an iterator takes to produce its items."""
        iterator = iter(items)
        while True:
            with self.span(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, and `step_s` since the creation, by the host's clock.

        It synchronizes with a GPU: call it at the end of a step.
        """
        spent = {phase: sum(self._clock.seconds(spans)) for phase, spans in self._spans.items()}
        return {**spent, "step_s": time.perf_counter() - self._start}
