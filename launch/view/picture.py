"""The view on a terminal: reward curve, lag histogram, rates, tickets and daemons, redrawn in place."""

from __future__ import annotations

import time
from collections import Counter

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from areal_like.config import Config
from areal_like.terminal_text import harmless
from launch.formatting import fixed, rate
from launch.observation.observer import Observation
from launch.view.plot import curve
from launch.view.speed import Eta, recent_mean, tokens_per_s_trained
from launch.view.status import daemon_table, tickets_line


class LiveView:
    """A `View` that redraws the picture in place; notices scroll above it."""

    def __init__(self, config: Config, console: Console, *, interval_s: float = 0.5) -> None:
        self._config, self._console, self._interval_s = config, console, interval_s
        self._due_s = 0.0
        self._eta = Eta(num_steps=config.trainer.num_steps)
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Redraws once per `interval_s`, to leave CPU time to the engine and the trainer."""
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


def picture(
    seen: Observation, *, config: Config, eta: Eta, phase: str, detail: str, width: int
) -> RenderableType:
    """The whole live view at one moment; `width`: width of the terminal, in characters."""
    num_done = seen.last_step + 1
    progress = Table.grid(expand=True)  # a ProgressBar by itself ends without a newline
    progress.add_row(ProgressBar(total=config.trainer.num_steps, completed=num_done))
    parts: list[RenderableType] = [_headline(num_done, config, eta, phase=phase, detail=detail), progress]
    if seen.steps:
        left = max(24, (width - 6) * 3 // 5)
        middle = Table.grid(expand=True, padding=(0, 1))
        middle.add_column(width=left)
        middle.add_column(ratio=1)
        middle.add_row(_reward_panel(seen, width=left), _lag_panel(seen, config=config))
        parts += [middle, _rates(seen)]
    if seen.buffer:
        parts.append(tickets_line(seen))
        if why := seen.cause:
            parts.append(Text(why, style="yellow"))
    if seen.daemons:
        # The picture is redrawn in place, so wrapped reasons must not make it taller than the terminal.
        parts.append(daemon_table(list(seen.daemons.values()), width=width, one_line=True))
    return Group(*parts)


def _headline(num_done: int, config: Config, eta: Eta, *, phase: str, detail: str) -> Table:
    headline = Table.grid(expand=True, padding=(0, 1))
    headline.add_column(ratio=1)
    headline.add_column(justify="right")
    title = Text.assemble(
        (config.name, "bold"),
        f"  {phase}",
        (f"  {detail}" if detail else "", "yellow"),
        overflow="ellipsis",
        no_wrap=True,
    )
    steps = f"step {num_done}/{config.trainer.num_steps}"
    speed = f"  {eta.steps_per_s:.1f} steps/s  ETA {eta}" if eta.steps_per_s else ""
    headline.add_row(title, f"{steps}{speed}")
    return headline


def _reward_panel(seen: Observation, *, width: int) -> Panel:
    progress = seen.progress
    low, high = progress.reward_low, progress.reward_high
    lines = curve(progress.rewards, width=max(8, width - 12), height=6, low=low, high=high)
    labels = [f"{high:6.2f} ", *[" " * 7] * (len(lines) - 2), f"{low:6.2f} "]
    held_out = "" if progress.eval_reward is None else f" · held-out {progress.eval_reward:.2f}"
    title = f"reward {recent_mean(seen, 'reward_mean') or 0.0:.2f}{held_out}"
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
        grid.add_row(f"{lag:>2}", Bar(1.0, 0.0, share, width=14, color="cyan"), f"{share:4.0%}")
    bound = (seen.steps[-1] if seen.steps else {}).get("max_staleness", cap)
    return Panel(grid, title=f"trained lag, at most {bound}", title_align="left")


def _rates(seen: Observation) -> Text:
    mfu = recent_mean(seen, "mfu")
    items = [
        ("generated", f"{rate(seen.tokens_per_s_generated)} tok/s"),
        ("trained", f"{rate(tokens_per_s_trained(seen))} tok/s"),
        ("MFU", "-" if mfu is None else f"{mfu:.0%}"),
        ("lag", fixed(recent_mean(seen, "lag_mean"))),
        ("ess", fixed(recent_mean(seen, "ess_ratio"))),
        ("loss", fixed(recent_mean(seen, "loss"), digits=4)),
        ("length", fixed(recent_mean(seen, "response_length_mean"), digits=1)),
    ]
    known = [(name, value) for name, value in items if value.split()[0] != "-"]  # `-`: a missing value
    return Text("  ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in known)
