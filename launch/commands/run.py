"""`areal-like run`: runs a local job in its run directory, handles stop signals and shows a view."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from areal_like.ledger_place import network_warning
from areal_like.runtime.process import keep_files_private
from areal_like.runtime.signals import request_reopen
from launch.commands.configuration import CONFIG_FILE, file_and_settings
from launch.commands.foreground import StopSignals, in_directory, print_lines
from launch.commands.parser import SETTINGS, argument, command, flag
from launch.local_job.job import LocalJob
from launch.run_directory.dry_run import described
from launch.run_directory.kept_settings import left_out
from launch.run_directory.open_run import open_run
from launch.view.lasting import LastingView, output_may_be_gone
from launch.view.picture import LiveView
from launch.view.plain import PlainView
from launch.view.summary import show_summary


class _ShowSettings(argparse.Action):
    """Prints the common settings (`--help`) or all (`--help-all`) and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        from launch.settings_help import help_text

        width = max(80, shutil.get_terminal_size().columns)
        sys.stdout.write(parser.format_help() + "\n")
        sys.stdout.write(help_text(width=width, everything=option_string == "--help-all"))
        parser.exit()


@command(
    "run",
    "Run a whole job on this machine: a buffer, rollout servers and a trainer, in the new directory "
    "runs/NAME. Ctrl-C shuts it down cleanly; resume=latest continues it. Settings are key=value; "
    "section=NAME chooses a preset.",
    argument("-h", "--help", action=_ShowSettings, nargs=0, help="this, and the main settings"),
    argument("--help-all", action=_ShowSettings, nargs=0, help="this, and all settings"),
    CONFIG_FILE,
    flag(
        "--dry-run",
        "say which directory and settings the run would have, and whether objective, trackers, task and "
        "checkpoint accept them; nothing is written or started",
    ),
    SETTINGS,
    examples=[
        "run name=mine model=smollm2 task=adding trainer.num_steps=200",
        "run name=mine resume=latest",
        "run name=mine resume=latest trainer.lr=1e-5 --dry-run",
        "run --config runs/mine/config.yaml name=again seed=1",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Runs the job to its end; returns its exit code. Raises ConfigError before any process was started."""
    argv = file_and_settings(args)
    if not args.dry_run:
        return run_local(argv)
    for line in described(open_run(argv, is_dry=True)):
        print(line)
    return 0


def run_local(argv: Sequence[str]) -> int:
    """Runs the job with these command line arguments; returns its exit code."""
    keep_files_private()
    run = open_run(argv)
    started_unix_s = time.time()
    console = Console(stderr=False)
    with in_directory(run):
        stops = StopSignals(on_hangup=request_reopen)
        print_lines(console, filter(None, (*run.announcement, network_warning(run.config))))
        if run.is_finished:
            show_summary(run, console, since_unix_s=0.0)
            return 0
        view = LastingView(
            LiveView(run.config, console) if console.is_terminal else PlainView(run.config, console)
        )
        with contextlib.closing(view):
            job = LocalJob(run, view=view, num_stops=lambda: stops.count)
            exit_code = job.run()
            names_a_log = any(str(run.paths.logs) in line for line in job.failure)
            if exit_code == 2 and not job.has_begun and not names_a_log:
                run.remove_if_created()
            not_kept = left_out(run.paths)
    with output_may_be_gone():
        if exit_code != 2:
            if exit_code != 1 and not job.is_finished:
                console.print("the run was drained", highlight=False)
            show_summary(run, console, since_unix_s=started_unix_s)
    with output_may_be_gone():
        for line in job.failure:
            sys.stderr.write(f"{line}\n")
        if not_kept:
            print_lines(console, [f"config.yaml stays as it was, without {not_kept}"])
    return exit_code
