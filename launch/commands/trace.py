"""`areal-like trace RUN`: what all daemons did when, as one trace for Perfetto (launch/trace/).

It reads the files in RUN/spans, which daemons always write, so nothing has to be turned on first.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from launch.commands.output import private_file
from launch.commands.parser import RUN, argument, command, seconds
from launch.run_directory.rundir import find_run
from launch.trace.perfetto import events, window
from launch.trace.reading import Process, read_processes


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected A:B with A below B, got {text!r}")
    return int(first), int(last)


def _part(parser: argparse._ActionsContainer) -> None:
    """Adds the part of the run to show: one of two options."""
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--last", metavar="SECONDS", type=seconds(0.001, 1e9), help="only the last seconds: 60s, 5m or 60"
    )
    part.add_argument("--steps", metavar="A:B", type=_steps, help="while the trainer ran steps A to B - 1")


@command(
    "trace",
    "Write a trace for https://ui.perfetto.dev that shows what every daemon of a run did and when, on one "
    "clock: steps, samples, pushes, checkpoints, evaluations and the ledger's writes.",
    RUN,
    argument("--out", metavar="FILE", help="the trace (RUN/trace.json.gz)"),
    _part,
    examples=["trace myrun", "trace myrun --steps 100:110 --out steps.json.gz"],
)
def main(args: argparse.Namespace) -> int:
    """Writes the trace. Raises ConfigError if nothing was recorded, or the file cannot be written."""
    root = find_run(args.run)
    processes = read_processes(RunPaths(root).spans)
    if not processes:
        raise ConfigError(
            f"trace: {root} has no spans: its daemons have not started, or run with daemon.trace_mb=0, or on "
            "machines that do not share this directory"
        )
    ends = window(processes, last_s=args.last, steps=args.steps)
    if ends is None:
        raise ConfigError(
            f"trace: no span of steps {args.steps[0]} to {args.steps[1] - 1} is kept: only the newest are "
            "(daemon.trace_mb)"
        )
    out = Path(args.out) if args.out else root / "trace.json.gz"
    num_events = _write(out, processes, ends)
    print(f"{out}: {num_events:,} events in {ends[1] - ends[0]:.1f} s of {len(processes)} processes")
    for process in processes:
        if process.rtt_s is not None and abs(process.offset_s) > max(0.05, process.rtt_s):
            print(
                f"  corrected: the clock of {process.daemon} on {process.host} is off by "
                f"{-process.offset_s:.3f} s"
            )
    print("  (open it at https://ui.perfetto.dev or in chrome://tracing)")
    return 0


def _write(path: Path, processes: list[Process], ends: tuple[float, float]) -> int:
    """Writes the file, compressed if its name ends in .gz; returns the number of events."""
    num_events = 0
    with private_file(path, verb="trace") as raw:
        file = gzip.GzipFile(filename="", fileobj=raw, mode="wb") if path.suffix == ".gz" else raw
        head = {"displayTimeUnit": "ms", "otherData": {"first_unix_s": round(ends[0], 6)}}
        file.write(json.dumps(head)[:-1].encode() + b', "traceEvents": [')
        for event in events(processes, first_s=ends[0], last_s=ends[1]):
            file.write((b",\n" if num_events else b"\n") + json.dumps(event).encode())
            num_events += 1
        file.write(b"]}\n")
        if file is not raw:
            file.close()
    return num_events
