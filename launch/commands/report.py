"""`areal-like report RUN`: writes one HTML page about a run, or about two of them (launch/report/).

It reads files only: the run may be running, finished or crashed, and its directory may be a copy.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from areal_like.errors import ArealError
from launch.commands.completion import installed_version
from launch.commands.output import private_file
from launch.commands.parser import RUN, argument, command
from launch.report.page import page
from launch.report.run import read_run
from launch.run_directory.rundir import find_run
from launch.samples.choosing import transcripts
from launch.samples.reading import Selection
from launch.samples.transcripts import Transcript


@command(
    "report",
    "Write one HTML page about a run that is running, has ended or has failed: figures, charts, drops, "
    "events, messages and samples.",
    RUN,
    argument("--against", metavar="OTHER", help="a second run, shown in the same charts"),
    argument("--out", metavar="FILE", help="the page (RUN/report.html); - for stdout"),
    examples=["report myrun", "report myrun --against other --out both.html"],
)
def main(args: argparse.Namespace) -> int:
    """Writes the page. Raises ConfigError without such a run, or if the file cannot be written."""
    roots = [find_run(args.run)] + ([find_run(args.against)] if args.against else [])
    runs = [read_run(root) for root in roots]
    samples: list[Transcript] | str
    try:
        _, samples = transcripts(roots[0], Selection())
    except (ArealError, OSError) as error:
        samples = str(error)
    text = page(runs, samples=samples, now_s=time.time(), version=installed_version())
    if args.out == "-":
        sys.stdout.write(text)
        return 0
    out = Path(args.out) if args.out else roots[0] / "report.html"
    with private_file(out, verb="report") as file:
        file.write(text.encode())
    print(f"{out} ({len(text.encode()) / 1e6:.1f} MB): open it in a browser")
    return 0
