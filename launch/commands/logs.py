"""`areal-like logs RUN [ROLE ...]`: logs of a run's daemons and engines, merged by time (launch/logs/)."""

from __future__ import annotations

import argparse
import heapq
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.terminal_text import harmless, harmless_name
from launch.commands.parser import RUN, argument, command
from launch.logs.files import LEVELS, Entry, LogFiles, complete_bytes, find_sources, since_time
from launch.logs.following import Follower
from launch.run_directory.rundir import find_run

_NUM_LAST = 200
_POLL_S = 0.3


@command(
    "logs",
    "Show the logs of a run's daemons and engines, merged by time: the last 200 lines, the last N, or those "
    "since TIME.",
    RUN,
    argument(
        "roles", metavar="ROLE", nargs="*", default=[], help="trainer, rollout, rollout-1, ...; default: all"
    ),
    argument("-f", "--follow", action="store_true", help="follow the logs until Ctrl-C, across rotations"),
    argument("--since", metavar="TIME", help="10m, 2h, 1d, 12:30, or 2026-01-31T12:30"),
    argument(
        "--level",
        metavar="LEVEL",
        choices=LEVELS,
        type=str.upper,
        default=LEVELS[0],
        help=f"lowest level shown: {', '.join(LEVELS)}",
    ),
    argument("-n", "--lines", type=int, metavar="N", help=f"the last N lines ({_NUM_LAST})"),
    examples=["logs myrun", "logs myrun trainer rollout-1 --since 10m --level WARNING", "logs myrun -f"],
)
def main(args: argparse.Namespace) -> int:
    """Prints the entries. Raises ConfigError without such a run, or without a log of these roles."""
    logs = RunPaths(find_run(args.run)).logs
    if args.lines is not None and args.lines < 0:
        raise ConfigError(f"logs: -n {args.lines}: use 0 or more")
    since_unix_s = None
    if args.since is not None:
        try:
            since_unix_s = since_time(args.since, now_unix_s=time.time())
        except ValueError:
            raise ConfigError(
                f"logs: --since {args.since}: use 90s, 10m, 2h, 1d, 12:30 or 2026-01-31T12:30"
            ) from None
    sources = find_sources(logs, args.roles)
    if not sources and not args.follow:
        known = ", ".join(sorted({source.name for source in find_sources(logs, [])})) or "none"
        raise ConfigError(
            f"logs: {logs} has no log of {' or '.join(args.roles) or 'a daemon'} (logs: {known})"
        )
    default = None if since_unix_s is not None else _NUM_LAST
    num_last = default if args.lines is None else min(args.lines, sys.maxsize)
    # Determined before anything is shown: the follower then shows everything that is appended meanwhile,
    # once.
    shown = {source.files[-1]: complete_bytes(source.files[-1]) for source in sources} if args.follow else {}
    try:
        _show(_chosen(sources, shown, level=args.level, since_unix_s=since_unix_s, num_last=num_last))
        if args.follow:
            _follow(lambda: find_sources(logs, args.roles), starts=shown, level=args.level)
    except KeyboardInterrupt:
        return 0
    return 0


def _chosen(
    sources: Sequence[LogFiles],
    ends: Mapping[Path, int],
    *,
    level: str,
    since_unix_s: float | None,
    num_last: int | None,
) -> Iterable[Entry]:
    # With a level, the last lines of that level may be anywhere, so whole files are read, in order and with
    # bounded memory.
    num_read = num_last if level == LEVELS[0] and since_unix_s is None else None
    streams = (source.entries(since_unix_s=since_unix_s, num_last=num_read, ends=ends) for source in sources)
    entries = (entry for entry in heapq.merge(*streams) if entry.is_at_least(level))
    return entries if num_last is None else deque(entries, maxlen=num_last)


def _follow(find: Callable[[], list[LogFiles]], *, starts: dict[Path, int], level: str) -> None:
    follower = Follower(find, starts=starts)
    try:
        while True:
            _show(entry for entry in follower.poll() if entry.is_at_least(level))
            time.sleep(_POLL_S)
    finally:
        follower.close()


def _show(entries: Iterable[Entry]) -> None:
    for entry in entries:
        first, *others = entry.text.split("\n")
        stamp = time.strftime("%m-%d %H:%M:%S", time.localtime(entry.unix_s))
        millis = int(entry.unix_s * 1000) % 1000
        origin = harmless_name(f"{entry.source} {entry.level}")
        sys.stdout.write(f"{stamp}.{millis:03} {origin} {harmless(first)}\n")
        for line in others:
            sys.stdout.write(f"    {harmless(line)}\n")
    sys.stdout.flush()
