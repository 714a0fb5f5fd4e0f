"""The arguments of commands that talk to a running job: RUN, or `--buffer` from any other machine."""

from __future__ import annotations

import argparse

from areal_like.errors import ConfigError
from launch.commands.parser import RUN, Argument, Parser, argument, group
from launch.observation.reach import RunningJob

_REMOTE = group(
    "a job whose directory this machine cannot see",
    argument(
        "--buffer",
        metavar="HOST:PORT",
        action="append",
        default=[],
        help="instead of RUN: address of the buffer's HTTP server (daemon.http_host, daemon.http_port); once "
        "for each shard",
    ),
    argument("--keys", metavar="DIR", default="", help="with --buffer: has operator.token or monitor.token"),
    argument("--tls-certificate", metavar="FILE", default="", help="with --buffer: security.tls_certificate"),
)
SERVER = argument("server", metavar="SERVER", help="the rollout server's name, as rollout-1")


def _add_job(parser: argparse._ActionsContainer) -> None:
    _REMOTE(parser)
    if isinstance(parser, Parser) and parser.names_buffer:
        parser.set_defaults(run=None)
    else:
        RUN(parser)


JOB: Argument = _add_job
"""RUN, or `--buffer` with the keys. With `--buffer` there is no RUN."""


def job_of(args: argparse.Namespace) -> RunningJob:
    """The job that the arguments of `JOB` name. Raises ConfigError."""
    if args.buffer:
        return RunningJob.at(args.buffer, keys=args.keys, tls_certificate=args.tls_certificate)
    if args.keys or args.tls_certificate:
        raise ConfigError(
            "--keys and --tls-certificate are for --buffer: the run's own settings name its keys"
        )
    return RunningJob.in_directory(args.run)
