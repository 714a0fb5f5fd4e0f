"""The view for a log file or a pipe: prints a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from areal_like.config import Config
from areal_like.paths import RunPaths
from areal_like.terminal_text import harmless
from launch.formatting import fixed, rate
from launch.observation.observer import Observation, find_number, find_table
from launch.run_files import read_object
from launch.view.speed import Eta, recent_mean, tokens_per_s_trained

Line = Callable[[Observation, Config, Eta], str]
"""Returns the state of a job on one line; empty before there is anything to show."""


def plain_line(seen: Observation, config: Config, eta: Eta) -> str:
    """The line of training with rewards."""
    if not seen.steps:
        return ""
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


def offline_line(seen: Observation, config: Config, eta: Eta) -> str:
    """The line of training on rows. The number of steps is known when the trainer has read the rows."""
    if not seen.steps:
        return ""
    eta.num_steps = read_object(RunPaths.of(config).rows).get("num_steps", 0)
    row = seen.steps[-1]
    held_out = [step["eval_loss"] for step in seen.steps if "eval_loss" in step]
    parts = [
        f"step {seen.last_step + 1}/{eta.num_steps}",
        f"epoch {row.get('epoch', 0):.2f}",
        f"loss {fixed(recent_mean(seen, 'loss'), digits=4)}",
        f"accuracy {fixed(recent_mean(seen, 'accuracy'))}" if "accuracy" in row else "",
        f"held-out {held_out[-1]:.4f}" if held_out else "",
        f"lr {row.get('lr', 0):.2e}",
        f"learned {rate(tokens_per_s_trained(seen))} tok/s",
        f"ETA {eta}",
    ]
    return "  ".join(filter(None, parts))


def evaluation_line(seen: Observation, config: Config, eta: Eta) -> str:
    """The line of an evaluation: prompts evaluated and left."""
    tickets = find_table(seen.buffer, "tickets")
    issued, done, failed = (find_number(tickets, name) or 0 for name in ("issued", "evaluated", "dropped"))
    if not issued:
        return ""
    note = f" ({failed:.0f} failed)" if failed else ""
    speed = rate(seen.tokens_per_s_generated)
    return f"evaluated {done + failed:.0f} of {issued:.0f} prompts{note}, {speed} tok/s"


class PlainView:
    """A `View` that prints time-stamped lines."""

    def __init__(
        self, config: Config, console: Console, *, line: Line = plain_line, interval_s: float = 5.0
    ) -> None:
        self._config, self._console, self._line, self._interval_s = config, console, line, interval_s
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
        line = "" if detail else self._line(seen, self._config, self._eta)
        line = line or phase_line(seen, phase=phase, detail=detail)
        if line != self._last:
            self._last = line
            self.notice(line)

    def notice(self, text: str) -> None:
        """Prints one line with the time of day."""
        line = f"{time.strftime('%H:%M:%S')} {harmless(text)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Does nothing: there is no drawing to end."""


def phase_line(seen: Observation, *, phase: str, detail: str) -> str:
    """The line of a job that does not train: the phase and what the job waits for."""
    return "  ".join(filter(None, (f"{phase}: {detail}" if detail else phase, seen.cause)))
