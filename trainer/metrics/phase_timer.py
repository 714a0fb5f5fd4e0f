"""Seconds of one optimizer step by phase, for its metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from trainer.distributed.place import Place

T = TypeVar("T")


class PhaseTimer:
    """Adds up wall time by phase, from its creation on."""

    def __init__(self, phases: Iterable[str], *, place: Place | None = None) -> None:
        """`phases`: all names; a phase in which no time was spent is reported as 0. `place`: is told."""
        self._place = place or Place()
        self._start = time.perf_counter()
        self._spent = dict.fromkeys(phases, 0.0)

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Counts the time of a block."""
        start, outer = time.perf_counter(), self._place.phase
        self._place.enter(phase.removesuffix("_s"))
        try:
            yield
        finally:
            self._spent[phase] += time.perf_counter() - start
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
        """Seconds of each phase, and `step_s` since the creation."""
        return {**self._spent, "step_s": time.perf_counter() - self._start}
