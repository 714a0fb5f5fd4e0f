"""A view that tolerates the loss of its terminal or pipe, so that the job continues without it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from launch.local_job.display import View
from launch.observation.observer import Observation

log = logging.getLogger(__name__)


@contextlib.contextmanager
def output_may_be_gone() -> Iterator[None]:
    """Ignores the errors of printing to a terminal or pipe that no longer exists."""
    try:
        yield
    except (OSError, SystemExit):  # SystemExit: raised by rich for a broken pipe
        log.warning("the terminal or pipe is gone: the run continues without output")


class LastingView:
    """A view that does nothing once its terminal or pipe is gone."""

    def __init__(self, view: View) -> None:
        self._view: View | None = view

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Draws the newest state."""
        self._draw(lambda view: view.update(seen, phase=phase, detail=detail))

    def notice(self, text: str) -> None:
        """Shows one event."""
        self._draw(lambda view: view.notice(text))

    def close(self) -> None:
        """Ends the drawing."""
        self._draw(lambda view: view.close())

    def _draw(self, draw: Callable[[View], None]) -> None:
        if (view := self._view) is not None:
            self._view = None
            with output_may_be_gone():
                draw(view)
                self._view = view
