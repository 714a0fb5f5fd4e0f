"""The interface through which the launcher shows a running job (implemented in launch/view/)."""

from __future__ import annotations

from typing import Protocol

from launch.observation.observer import Observation


class View(Protocol):
    """A display of one running job."""

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Called about ten times per second; draws once per drawing interval."""

    def notice(self, text: str) -> None:
        """Shows one event."""

    def close(self) -> None:
        """Ends the drawing and leaves the terminal as it was."""
