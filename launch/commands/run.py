"""`areal-like run`: a local job with its run directory, its signals and its view."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from areal_like.runtime.daemon import JsonFormatter
from launch.commands.parser import add_settings
from launch.commands.stop_signals import StopSignals
from launch.local_job.job import LocalJob
from launch.local_job.open_run import open_run
from launch.view.lasting import LastingView, output_may_be_gone
from launch.view.live import LiveView
from launch.view.plain import PlainView
from launch.view.summary import show_summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and settings; the help shows the settings."""
    parser.add_argument("-h", "--help", action=_ShowSettings, nargs=0)
    parser.add_argument("--help-all", action=_ShowSettings, nargs=0)
    parser.add_argument("--config", metavar="FILE")
    add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the job to its end; returns its exit code. Raises ConfigError before anything was started."""
    config = [] if args.config is None else ["--config", args.config]
    return run_local([*config, *args.settings])


def run_local(argv: Sequence[str]) -> int:
    """Runs the job that these words of a command line describe."""
    run = open_run(argv)
    started_unix_s = time.time()
    console = Console(stderr=False)
    handler = logging.FileHandler(run.paths.logs / "launcher.log")
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=run.config.daemon.log_level, handlers=[handler], force=True)
    stops = StopSignals()
    for line in run.announcement:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    view = LastingView(
        LiveView(run.config, console) if console.is_terminal else PlainView(run.config, console)
    )
    job = LocalJob(run, view=view, num_stops=lambda: stops.count)
    try:
        exit_code = job.run()
    finally:
        view.close()
        run.close()
    with output_may_be_gone():
        if exit_code != 2:
            show_summary(run, console, since_unix_s=started_unix_s)
    with output_may_be_gone():
        for line in job.failure:
            sys.stderr.write(f"{line}\n")
    return exit_code


class _ShowSettings(argparse.Action):
    """Prints the common settings (`--help`) or all (`--help-all`) and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        sys.stdout.write(settings_text(everything=option_string == "--help-all"))
        parser.exit()


def settings_text(*, everything: bool) -> str:
    """The help of `areal-like run`: each setting with its default and meaning."""
    from launch.settings_help import COMMON, all_keys, choices

    width = max(80, shutil.get_terminal_size().columns)
    lines = [
        "areal-like run key=value ...: runs a whole job on this machine and writes runs/<name>/",
        "--config FILE: begins with the settings of a config.yaml, for instance that of another run",
        "",
    ]
    lines += [f"  {section}={'|'.join(names)}" for section, names in choices().items()]
    lines.append("  task._target_=my_module.MyTask: a class of your own (objective and advantage alike)")
    group = None
    for key in all_keys():
        if not everything and key.path not in COMMON:
            continue
        section = key.path.rpartition(".")[0]
        lines += [""] * (section != group)
        group = section
        name = f"  {key.path}={key.default}".ljust(37)
        lines += textwrap.wrap(f"{name} {key.text}", width=width, subsequent_indent=" " * 38)
    own = (
        "Settings of a task, objective or advantage are the fields of its class: objective.cap=8 "
        "(docs/objectives.md)."
    )
    lines += ["", own if everything else "run --help-all shows every key."]
    return "\n".join(lines) + "\n"
