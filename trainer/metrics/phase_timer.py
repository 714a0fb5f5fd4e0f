"""Seconds of one optimizer step by phase, for its metrics.

On a CPU the clock is the host's. Kernels of a GPU run after the host has asked for them, so there a phase
lasts from one event in the stream to another: the GPU's own time, read at the end of the step and never in
the middle of it, where it would stall the GPU.
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
    """Marks moments and tells later how far apart they are."""

    def mark(self) -> Any:
        """This moment. Must not wait."""

    def seconds(self, spans: Iterable[tuple[Any, Any]]) -> list[float]:
        """The seconds from the first to the second mark of each pair. May wait."""


class HostClock:
    """Time of the host."""

    def mark(self) -> float:
        """This moment."""
        return time.perf_counter()

    def seconds(self, spans: Iterable[tuple[float, float]]) -> list[float]:
        """Differences."""
        return [end - start for start, end in spans]


class CudaClock:
    """Time of the current stream of a GPU: a mark is an event, and is reached after the work before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """An event behind all work that the stream has been given."""
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
        """`phases`: all names; a phase in which no time was spent is reported as 0. `place`: is told.

        `clock`: of the phases; None: the host's.
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

        Waits for the work of a GPU: call it at the end of a step.
        """
        spent = {phase: sum(self._clock.seconds(spans)) for phase, spans in self._spans.items()}
        return {**spent, "step_s": time.perf_counter() - self._start}
