"""The view for a log file or a pipe: prints a line every few seconds."""

from __future__ import annotations

import time

from rich.console import Console

from areal_like.config import Config
from areal_like.terminal_text import harmless
from launch.observation.observer import Observation, find_number, find_table
from launch.view.formatting import fixed, rate
from launch.view.speed import Eta, recent_mean, tokens_per_s_trained


class PlainView:
    """A `View` that prints time-stamped lines."""

    def __init__(self, config: Config, console: Console, *, interval_s: float = 5.0) -> None:
        self._config, self._console, self._interval_s = config, console, interval_s
        self._due_s = 0.0
        self._last = ""
        self._eta = Eta(num_steps=config.trainer.num_steps)

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Prints a line every `interval_s`, unless it would repeat the last one."""
        self._eta.see(seen.last_step)
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        is_training = seen.steps and not detail
        line = self._line(seen) if is_training else phase_line(seen, phase=phase, detail=detail)
        if line != self._last:
            self._last = line
            self.notice(line)

    def _line(self, seen: Observation) -> str:
        return plain_line(seen, config=self._config, eta=self._eta)

    def notice(self, text: str) -> None:
        """Prints one line with the time of day."""
        line = f"{time.strftime('%H:%M:%S')} {harmless(text)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Does nothing: there is no drawing to end."""


def phase_line(seen: Observation, *, phase: str, detail: str) -> str:
    """What a job that does not train waits for."""
    return "  ".join(filter(None, (f"{phase}: {detail}" if detail else phase, seen.cause)))


def plain_line(seen: Observation, *, config: Config, eta: Eta) -> str:
    """The state of training on one line."""
    dropped = find_number(find_table(seen.buffer, "tickets"), "dropped")
    mfu = recent_mean(seen, "mfu")
    parts = [
        f"step {seen.last_step + 1}/{config.trainer.num_steps}",
        f"reward {fixed(recent_mean(seen, 'reward_mean'))}",
        "" if seen.progress.eval_reward is None else f"held-out {seen.progress.eval_reward:.2f}",
        f"lag {fixed(recent_mean(seen, 'lag_mean'))} (max {seen.progress.lag_max:.0f})",
        f"generated {rate(seen.tokens_per_s_generated)} tok/s",
        f"trained {rate(tokens_per_s_trained(seen))} tok/s",
        "" if mfu is None else f"MFU {mfu:.0%}",
        f"dropped {dropped:.0f}" if dropped is not None else "",
        f"ETA {eta}",
        seen.cause,
    ]
    return "  ".join(filter(None, parts))
