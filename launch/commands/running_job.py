"""The arguments of commands that speak with a running job: RUN, or `--buffer` from any other machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from areal_like.errors import ConfigError
from launch.commands.parser import Parser, add_run
from launch.observation.observer import DaemonView
from launch.observation.reach import RunningJob
from launch.report.ended import Ended, read_end
from launch.run_directory.rundir import is_over


def add_job(parser: Parser) -> None:
    """RUN, or `--buffer` with the keys. With `--buffer` there is no RUN."""
    remote = parser.add_argument_group("a job whose directory this machine does not see")
    remote.add_argument(
        "--buffer",
        metavar="HOST:PORT",
        action="append",
        default=[],
        help="instead of RUN: address of the buffer's HTTP server (daemon.http_host, daemon.http_port); once "
        "for each shard",
    )
    remote.add_argument(
        "--keys", metavar="DIR", default="", help="with --buffer: has operator.token or monitor.token"
    )
    remote.add_argument(
        "--tls-certificate", metavar="FILE", default="", help="with --buffer: security.tls_certificate"
    )
    if parser.names_buffer:
        parser.set_defaults(run=None)
    else:
        add_run(parser)


def add_server(parser: Parser) -> None:
    """The positional SERVER."""
    parser.add_argument("server", metavar="SERVER", help="the rollout server's name, as rollout-1")


def job_of(args: argparse.Namespace) -> RunningJob:
    """The job that the arguments of `add_job` name. Raises ConfigError."""
    if args.buffer:
        return RunningJob.at(args.buffer, keys=args.keys, tls_certificate=args.tls_certificate)
    if args.keys or args.tls_certificate:
        raise ConfigError(
            "--keys and --tls-certificate are for --buffer: the run's own settings name its keys"
        )
    return RunningJob.in_directory(args.run)


def end_of(job: RunningJob, daemons: Mapping[str, DaemonView]) -> Ended | None:
    """How the run has ended; None while it goes on, and where its directory cannot be seen.

    `daemons`: of the job now. Killed ones have left their addresses. One without an answer that was started
    by hand may also be stopped.
    """
    if job.paths is None or any(view.status is not None for view in daemons.values()):
        return None
    return read_end(job.paths.root) if not daemons or is_over(job.paths) else None


def end_text(job: RunningJob, end: Ended | None) -> str:
    """What a command says that finds no daemon: how the run has ended, and what to do next."""
    return "\n".join([f"{job.name}: no daemon is running", *(end.lines() if end is not None else [])]) + "\n"
