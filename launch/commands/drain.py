"""`areal-like drain RUN SERVER`: ends one rollout server of a running job.

The buffer tells the server, over the connection that the server has with it.
"""

from __future__ import annotations

import argparse
import sys
import time

from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.commands.parser import add_run
from launch.commands.running_job import ask_buffers, servers_of
from launch.run_directory.rundir import find_run

_TICK_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and SERVER."""
    add_run(parser)
    parser.add_argument("server", metavar="SERVER", help="its name, e.g. rollout-1")


def main(args: argparse.Namespace) -> int:
    """Returns 0 when the server has left."""
    return drain(args.run, args.server)


def drain(run: str, name: str) -> int:
    """Asks one rollout server to end: it takes no new leases and returns those it holds.

    Returns 0 when it has left. Raises ConfigError when there is no such server or it cannot be reached,
    ArealError when it does not leave within `daemon.drain_timeout_s`.
    """
    paths = RunPaths(find_run(run))
    config = load_config(["--config", str(paths.config)])
    servers = servers_of(config, paths)
    if name not in servers:
        known = ", ".join(sorted(servers)) or "none is running"
        raise ConfigError(f"drain: {paths.root.name} has no rollout server {name!r} (servers: {known})")
    # Each shard knows the server, and one message is enough. The server's own HTTP address is not used: it is
    # whatever the server said in its hello.
    try:
        ask_buffers(config, paths, "/control/drain_server", {"server": name})
    except ConfigError as error:
        raise ConfigError(f"drain: {name} cannot be told to leave ({error})") from None
    deadline_s = time.monotonic() + config.daemon.drain_timeout_s
    while time.monotonic() < deadline_s:
        if name not in servers_of(config, paths):
            sys.stdout.write(f"{name} has left\n")
            return 0
        time.sleep(_TICK_S)
    raise ArealError(f"drain: {name} did not leave within {config.daemon.drain_timeout_s:g} s")
