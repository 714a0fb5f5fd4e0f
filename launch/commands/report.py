"""`areal-like report RUN`: writes one HTML page about a run, or about two of them (launch/report/).

It reads files only: the run may go on, have ended or have crashed, and its directory may be a copy.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from areal_like.errors import ConfigError
from launch.commands.parser import Parser, add_run
from launch.commands.version import installed_version
from launch.report.page import page
from launch.report.run import read_run
from launch.report.samples import read_samples
from launch.run_directory.rundir import find_run


def add_arguments(parser: Parser) -> None:
    """RUN, the run to compare it with, and where the page goes."""
    parser.describe(
        "Write one HTML page about a run that goes on, has ended or has failed: figures, charts, drops, "
        "events, messages and samples.",
        "report myrun",
        "report myrun --against other --out both.html",
    )
    add_run(parser)
    parser.add_argument("--against", metavar="OTHER", help="a second run, shown in the same charts")
    parser.add_argument("--out", metavar="FILE", help="the page (RUN/report.html); - for stdout")


def main(args: argparse.Namespace) -> int:
    """Writes the page. Raises ConfigError without such a run, or if the file cannot be written."""
    roots = [find_run(args.run)] + ([find_run(args.against)] if args.against else [])
    runs = [read_run(root) for root in roots]
    text = page(runs, samples=read_samples(roots[0]), now_s=time.time(), version=installed_version())
    if args.out == "-":
        sys.stdout.write(text)
        return 0
    out = Path(args.out) if args.out else roots[0] / "report.html"
    try:
        _write(out, text)
    except OSError as error:
        raise ConfigError(f"report: {out} cannot be written: {error.strerror}; name another --out") from None
    print(f"{out} ({len(text.encode()) / 1e6:.1f} MB): open it in a browser")
    return 0


def _write(path: Path, text: str) -> None:
    """The page contains samples and settings: a new file is readable by its owner only."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
