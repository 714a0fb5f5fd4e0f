"""`areal-like drain RUN SERVER`: ends one rollout server of a running job.

The buffer tells the server, over the connection that the server has with it.
"""

from __future__ import annotations

import argparse
import sys
import time

from areal_like.errors import ArealError, ConfigError
from launch.commands.parser import Parser
from launch.commands.running_job import add_job, add_server, job_of
from launch.observation.reach import RunningJob

_TICK_S = 0.2


def add_arguments(parser: Parser) -> None:
    """The job and SERVER."""
    parser.describe(
        "End one rollout server of a running job: it takes no new leases, finishes or returns those it "
        "holds, and exits. The command waits for that, at most daemon.drain_timeout_s.",
        "drain myrun rollout-1",
    )
    add_job(parser)
    add_server(parser)


def main(args: argparse.Namespace) -> int:
    """Returns 0 when the server has left."""
    drain(job_of(args), args.server)
    sys.stdout.write(f"{args.server} has left\n")
    return 0


def drain(job: RunningJob, name: str) -> None:
    """Asks one rollout server to end, and waits: it takes no new leases and returns those it holds.

    Raises ConfigError when there is no such server or it cannot be reached, ArealError when it does not leave
    within `daemon.drain_timeout_s`.
    """
    servers = job.servers()
    if name not in servers:
        known = ", ".join(sorted(servers)) or "none is running"
        raise ConfigError(f"drain: {job.short_name} has no rollout server {name!r} (servers: {known})")
    # Each shard knows the server, and one message is enough. The server's own HTTP address is not used: it is
    # whatever the server said in its hello.
    try:
        job.post("drain_server", {"server": name})
    except ConfigError as error:
        raise ConfigError(f"drain: {name} cannot be told to leave ({error})") from None
    timeout_s = job.config.daemon.drain_timeout_s
    deadline_s = time.monotonic() + timeout_s
    while name in job.servers():
        if time.monotonic() > deadline_s:
            raise ArealError(f"drain: {name} did not leave within {timeout_s:g} s")
        time.sleep(_TICK_S)
