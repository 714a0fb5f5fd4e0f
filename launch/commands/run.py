"""`areal-like run`: runs a local job in its run directory, handles stop signals and shows a view."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from areal_like.disks.ledger_place import network_warning
from areal_like.errors import ConfigError
from areal_like.runtime.command_line import add_config_option
from areal_like.runtime.logs import configure_launcher_log
from areal_like.runtime.process import keep_files_private
from areal_like.runtime.signals import handle_log_signals, request_reopen
from launch.commands.parser import Parser, add_settings
from launch.commands.stop_signals import StopSignals
from launch.local_job.job import LocalJob
from launch.run_directory.dry_run import described
from launch.run_directory.kept_settings import left_out
from launch.run_directory.open_run import open_run
from launch.view.lasting import LastingView, output_may_be_gone
from launch.view.picture import LiveView
from launch.view.plain import PlainView
from launch.view.summary import show_summary


def add_arguments(parser: Parser) -> None:
    """`--config FILE` and settings; the help shows the settings."""
    parser.describe(
        "Run a whole job on this machine: a buffer, rollout servers and a trainer, in the new directory "
        "runs/NAME. Ctrl-C stops it in order; resume=latest continues it. Settings are key=value; "
        "section=NAME chooses a preset.",
        "run",
        "run name=mine model=smollm2 task=adding trainer.num_steps=200",
        "run name=mine resume=latest",
        "run name=mine resume=latest trainer.lr=1e-5 --dry-run",
        "run --config runs/mine/config.yaml name=again seed=1",
    )
    parser.add_argument("-h", "--help", action=_ShowSettings, nargs=0, help="this, and the main settings")
    parser.add_argument("--help-all", action=_ShowSettings, nargs=0, help="this, and all settings")
    add_config_option(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say which directory and settings the run would have, and whether a checkpoint accepts them; "
        "nothing is written or started",
    )
    add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the job to its end; returns its exit code. Raises ConfigError before any process was started."""
    config = [] if args.config is None else ["--config", args.config]
    if args.dry_run:
        lines = list(described(open_run([*config, *args.settings], is_dry=True)))
        sys.stdout.write("\n".join([*lines, ""]))
        return 0
    return run_local([*config, *args.settings])


def run_local(argv: Sequence[str]) -> int:
    """Runs the job with these command line arguments; returns its exit code."""
    keep_files_private()
    run = open_run(argv)
    keep_files_private(run.paths.root)
    started_unix_s = time.time()
    console = Console(stderr=False)
    configure_launcher_log(run.paths, run.config.daemon)
    # Stacks only into the log: stderr is the user's terminal.
    handle_log_signals(to_stderr=False, hangup=False)
    stops = StopSignals(on_hangup=request_reopen)
    for line in filter(None, (*run.announcement, network_warning(run.config))):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if run.is_finished:
        run.close()
        show_summary(run, console, since_unix_s=0.0)
        return 0
    view = LastingView(
        LiveView(run.config, console) if console.is_terminal else PlainView(run.config, console)
    )
    not_kept = ""
    try:
        job = LocalJob(run, view=view, num_stops=lambda: stops.count)
        exit_code = job.run()
        names_a_log = any(str(run.paths.logs) in line for line in job.failure)
        if exit_code == 2 and not job.has_begun and not names_a_log:
            run.remove_if_created()
        not_kept = left_out(run.paths)
    except ConfigError:
        run.remove_if_created()
        raise
    finally:
        view.close()
        run.close()
    with output_may_be_gone():
        if exit_code != 2:
            if exit_code != 1 and not job.is_finished:
                console.print("the run was drained", highlight=False)
            show_summary(run, console, since_unix_s=started_unix_s)
    with output_may_be_gone():
        for line in job.failure:
            sys.stderr.write(f"{line}\n")
        if not_kept:
            line = f"config.yaml stays as it was, without {not_kept}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return exit_code


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
