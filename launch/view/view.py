"""What a person sees of a run: a live picture on a terminal, a plain line every few seconds elsewhere.

Both draw the same `Observation` and leave out what is not there. They are redrawn from the launcher's main loop, twice a second, because
on a laptop the cores belong to the engine and the trainer.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from areal_like.config import Config
from launch.local_job.observe import DaemonView, Observation, find_number, find_table
from launch.view.plot import bar, curve

log = logging.getLogger(__name__)


class View(Protocol):
    """Where the launcher shows what happens."""

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Called about ten times a second; draws when it is time to."""

    def notice(self, text: str) -> None:
        """Says one thing that has happened."""

    def close(self) -> None:
        """Ends the drawing and leaves the terminal as it was."""


class PlainView:
    """Lines for a log file or a pipe."""

    def __init__(self, config: Config, console: Console, *, interval_s: float = 5.0) -> None:
        self._config, self._console, self._interval_s = config, console, interval_s
        self._due_s = 0.0
        self._last = ""
        self._eta = Eta(num_steps=config.trainer.num_steps)

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """A line every `interval_s`, if it says anything new."""
        self._eta.see(last_step(seen))
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        is_training = seen.steps and not detail
        line = (
            plain_line(seen, config=self._config, eta=self._eta)
            if is_training
            else f"{phase}: {detail}"
            if detail
            else phase
        )
        if line != self._last:
            self._last = line
            self.notice(line)

    def notice(self, text: str) -> None:
        """One time-stamped line."""
        self._console.print(
            f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Nothing to end."""


class LiveView:
    """The picture on a terminal, below whatever notices scroll by."""

    def __init__(self, config: Config, console: Console, *, interval_s: float = 0.5) -> None:
        self._config, self._console, self._interval_s = config, console, interval_s
        self._due_s = 0.0
        self._eta = Eta(num_steps=config.trainer.num_steps)
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Draws every `interval_s`."""
        self._eta.see(last_step(seen))
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._due_s = now_s + self._interval_s
            self._live.update(
                picture(
                    seen,
                    config=self._config,
                    eta=self._eta,
                    phase=phase,
                    detail=detail,
                    width=self._console.width,
                ),
                refresh=True,
            )

    def notice(self, text: str) -> None:
        """One line above the picture."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the last picture standing."""
        self._live.stop()


@contextlib.contextmanager
def unless_seen_by_nobody() -> Iterator[None]:
    """What is printed inside may find that its terminal or pipe is gone: nothing then, for a job does not end because nobody looks."""
    try:
        yield
    except (OSError, SystemExit):  # of rich, for a broken pipe
        log.warning("the terminal or pipe is gone: the run goes on unseen")


class LastingView:
    """A view that outlives the terminal or pipe it is drawn on."""

    def __init__(self, view: View) -> None:
        self._view: View | None = view

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """See View."""
        self._draw(lambda view: view.update(seen, phase=phase, detail=detail))

    def notice(self, text: str) -> None:
        """See View."""
        self._draw(lambda view: view.notice(text))

    def close(self) -> None:
        """See View."""
        self._draw(lambda view: view.close())

    def _draw(self, draw: Callable[[View], None]) -> None:
        if (view := self._view) is not None:
            self._view = None
            with unless_seen_by_nobody():
                draw(view)
                self._view = view


class Eta:
    """Steps a second over the last stretch, and the time that the rest will take."""

    def __init__(self, *, num_steps: int, window: int = 60) -> None:
        self._num_steps = num_steps
        self._seen: deque[tuple[float, int]] = deque(maxlen=window)
        self._step = -1

    def see(self, step: int) -> None:
        """Notes the time at which a step was first seen; -1: none is there yet."""
        if step != self._step:
            self._step = step
            self._seen.append((time.monotonic(), step))

    @property
    def steps_per_s(self) -> float | None:
        """None until two steps were seen."""
        if len(self._seen) < 2:
            return None
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    def __str__(self) -> str:
        rate = self.steps_per_s
        return "-" if not rate else duration(max(0, self._num_steps - 1 - self._step) / rate)


def picture(
    seen: Observation, *, config: Config, eta: Eta, phase: str, detail: str, width: int
) -> RenderableType:
    """The whole live view at one moment."""
    num_done = last_step(seen) + 1
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(ratio=1)
    head.add_column(justify="right")
    rate = eta.steps_per_s
    head.add_row(
        Text.assemble(
            (config.name, "bold"),
            f"  {phase}",
            (f"  {detail}" if detail else "", "yellow"),
            overflow="ellipsis",
            no_wrap=True,
        ),
        f"step {num_done}/{config.trainer.num_steps}  {rate:.1f} steps/s  ETA {eta}"
        if rate
        else f"step {num_done}/{config.trainer.num_steps}",
    )
    progress = Table.grid(expand=True)  # a ProgressBar by itself ends in no newline
    progress.add_row(ProgressBar(total=config.trainer.num_steps, completed=num_done))
    parts: list[RenderableType] = [head, progress]
    if seen.steps:
        left = max(24, (width - 6) * 3 // 5)
        middle = Table.grid(expand=True, padding=(0, 1))
        middle.add_column(width=left)
        middle.add_column(ratio=1)
        middle.add_row(_reward_panel(seen, width=left), _lag_panel(seen, config=config))
        parts += [middle, _rates(seen)]
    if seen.buffer:
        parts.append(tickets_line(seen))
    if seen.daemons:
        parts.append(daemon_table(list(seen.daemons.values()), width=width))
    return Group(*parts)


def _reward_panel(seen: Observation, *, width: int) -> Panel:
    progress = seen.progress
    low, high = progress.reward_low, progress.reward_high
    lines = curve(progress.rewards, width=max(8, width - 12), height=6, low=low, high=high)
    labels = [f"{high:6.2f} ", *[" " * 7] * (len(lines) - 2), f"{low:6.2f} "]
    held_out = "" if progress.eval_reward is None else f" · held-out {progress.eval_reward:.2f}"
    title = f"reward {_recent(seen, 'reward_mean') or 0.0:.2f}{held_out}"
    return Panel(
        Text("\n".join(label + line for label, line in zip(labels, lines, strict=True)), style="green"),
        title=title,
        title_align="left",
    )


def _lag_panel(seen: Observation, *, config: Config) -> Panel:
    counts: Counter[int] = Counter()
    for row in seen.steps:
        for lag, count in (row.get("lag_histogram") or {}).items():
            counts[int(lag)] += count
    total = counts.total() or 1
    cap = config.staleness_cap
    lags = range(cap + 1) if cap <= 5 else sorted(lag for lag, _ in counts.most_common(6))
    grid = Table.grid(padding=(0, 1))
    for lag in lags:
        share = counts[lag] / total
        grid.add_row(f"{lag:>2}", Text(bar(share, width=14), style="cyan"), f"{share:4.0%}")
    bound = (seen.steps[-1] if seen.steps else {}).get("max_staleness", cap)
    return Panel(grid, title=f"trained lag, at most {bound}", title_align="left")


def _rates(seen: Observation) -> Text:
    items = [
        ("generated", f"{number(seen.tokens_per_s_generated)} tok/s"),
        ("trained", f"{number(tokens_per_s_trained(seen))} tok/s"),
        ("lag", f"{_written(_recent(seen, 'lag_mean'))}"),
        ("ess", f"{_written(_recent(seen, 'ess_ratio'))}"),
        ("loss", f"{_written(_recent(seen, 'loss'), digits=4)}"),
        ("length", f"{_written(_recent(seen, 'response_length_mean'), digits=1)}"),
    ]
    return Text("  ").join(
        Text.assemble((f"{name} ", "dim"), value) for name, value in items if not value.startswith("-")
    )


def tickets_line(seen: Observation) -> Text:
    """Tickets by state, then what was dropped and why."""
    drops = {reason: count for reason, count in find_table(seen.buffer, "drops").items() if count}
    states = find_table(seen.buffer, "tickets")
    text = Text.assemble(("tickets ", "dim"))
    text.append("  ".join(f"{state} {count:,}" for state, count in states.items() if isinstance(count, int)))
    if drops:
        text.append(
            f"  ({', '.join(f'{reason} {count:,}' for reason, count in drops.items())})", style="yellow"
        )
    return text


def daemon_table(daemons: list[DaemonView], *, width: int) -> Table:
    """One line a daemon; `width` in characters decides how much of the two long columns is shown."""
    room = max(9, (width - 48) // 2)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for heading in ("daemon", "state", "version", "queue", "heartbeat", "waiting on"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for daemon in daemons:
        status = daemon.status or {}
        reason = daemon.not_ready
        state = str(status.get("state") or ("ready" if not reason else "not ready"))
        waits = status.get("waiting_on") or {}
        longest = max(waits.items(), key=lambda item: item[1], default=None)
        table.add_row(
            daemon.name,
            Text(
                _cut(state if not reason or reason == state else f"{state}: {reason}", room),
                style="yellow" if reason else "green",
            ),
            str(_first(status, "weights_version", "version", "newest_version")),
            str(_first(status, "queue", "ready", "running", "in_flight")),
            f"{time.monotonic() - daemon.seen_s:.0f} s ago" if daemon.seen_s else "never",
            _cut(f"{longest[0]} {longest[1]:.1f} s" if longest else "", room),
        )
    return table


def plain_line(seen: Observation, *, config: Config, eta: Eta) -> str:
    """The state of training on one line."""
    dropped = find_number(find_table(seen.buffer, "tickets"), "dropped")
    parts = [
        f"step {last_step(seen) + 1}/{config.trainer.num_steps}",
        f"reward {_written(_recent(seen, 'reward_mean'))}",
        "" if seen.progress.eval_reward is None else f"held-out {seen.progress.eval_reward:.2f}",
        f"lag {_written(_recent(seen, 'lag_mean'))} (max {seen.progress.lag_max:.0f})",
        f"generated {number(seen.tokens_per_s_generated)} tok/s",
        f"trained {number(tokens_per_s_trained(seen))} tok/s",
        f"dropped {dropped:.0f}" if dropped is not None else "",
        f"ETA {eta}",
    ]
    return "  ".join(filter(None, parts))


def tokens_per_s_trained(seen: Observation) -> float | None:
    """Throughput over the last steps, waiting included; None until there are two."""
    rows = [row for row in seen.steps if "time_unix_s" in row and "tokens_trained" in row]
    rows = [row for row in rows if row["time_unix_s"] > rows[-1]["time_unix_s"] - 60]  # not across a resume
    if len(rows) < 2 or rows[-1]["time_unix_s"] <= rows[0]["time_unix_s"]:
        return None
    return float(
        sum(row["tokens_trained"] for row in rows[1:]) / (rows[-1]["time_unix_s"] - rows[0]["time_unix_s"])
    )


def last_step(seen: Observation) -> int:
    """Index of the newest finished step; -1 before the first."""
    return int(seen.steps[-1]["step"]) if seen.steps else -1


def duration(seconds: float) -> str:
    """`3:07`, `1:02:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float | None) -> str:
    """A rate in three digits or so: `940`, `12.3k`."""
    if value is None:
        return "-"
    return (
        f"{value:.0f}" if value < 1000 else f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"
    )


def _recent(seen: Observation, key: str) -> float | None:
    values = [float(row[key]) for row in seen.steps if isinstance(row.get(key), (int, float))]
    return sum(values) / len(values) if values else None


def _written(value: float | None, *, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _first(status: dict[str, Any], *keys: str) -> Any:
    for key in keys:
        value = find_number(status, key)
        if value is not None:
            return f"{value:.0f}"
    return ""
