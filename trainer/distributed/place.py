"""The current phase of a rank, for its error messages, its log and /status. Pure: it has no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic


@dataclass(kw_only=True)
class RankPhase:
    """Written by the training thread; other threads only read it.

    When a block fails, its phase is kept, so that an error message can name it.
    """

    phase: str = "starting"
    """Phase of a step (`wait`, `compute`, `reduce`, `update`), or an activity between steps."""
    step: int = 0
    """Completed optimizer steps."""
    microbatch: int = 0
    """Number of micro-batches started in this step; 0 outside of the micro-batches."""
    since_s: float = field(default_factory=monotonic)
    """Start of the phase, monotonic clock."""

    entered_s: float = field(default_factory=monotonic)
    """Start of the phase; unlike `since_s`, a micro-batch does not change it."""
    on_leave: Callable[[str, int, float], None] = field(default=lambda phase, step, since_s: None)
    """Called with the phase that ends, its step and its start."""

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Starts a phase; with `step`, also sets the number of completed steps."""
        self.on_leave(self.phase, self.step, self.entered_s)
        if step is not None:
            self.step, self.microbatch = step, 0
        self.phase, self.since_s = phase, monotonic()
        self.entered_s = self.since_s

    def next_microbatch(self) -> None:
        """Begins the next micro-batch of the step."""
        self.microbatch += 1
        self.since_s = monotonic()

    def __str__(self) -> str:
        return f"step {self.step}, micro-batch {self.microbatch}, {self.phase}"
