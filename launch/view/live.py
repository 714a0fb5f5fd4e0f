"""The view on a terminal: a picture of the job that is redrawn in place."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live

from areal_like.config import Config
from areal_like.terminal_text import harmless
from launch.observation.observer import Observation
from launch.view.picture import picture
from launch.view.speed import Eta


class LiveView:
    """A `View` that redraws the picture in place; notices scroll above it."""

    def __init__(self, config: Config, console: Console, *, interval_s: float = 0.5) -> None:
        self._config, self._console, self._interval_s = config, console, interval_s
        self._due_s = 0.0
        self._eta = Eta(num_steps=config.trainer.num_steps)
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Redraws once per `interval_s`; more often would take CPU time from the engine and the trainer."""
        self._eta.see(seen.last_step)
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        width = self._console.width
        drawn = picture(seen, config=self._config, eta=self._eta, phase=phase, detail=detail, width=width)
        self._live.update(drawn, refresh=True)

    def notice(self, text: str) -> None:
        """Prints one line above the picture."""
        self._live.console.print(harmless(text), markup=False, highlight=False)

    def close(self) -> None:
        """Ends the redrawing; the last picture stays on the screen."""
        self._live.stop()
