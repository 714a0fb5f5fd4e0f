"""`areal-like router RUN`: one address for agents, in front of all rollout servers of a running job."""

from __future__ import annotations

import argparse

from areal_like.config.common import NAME, NAME_RULE
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.commands.configuration import RUNNING_JOB, running_job
from launch.commands.foreground import become
from launch.commands.join import free_name
from launch.commands.parser import argument, command


@command(
    "router",
    "Give external agents one address for all rollout servers of a running job, until Ctrl-C or SIGTERM. "
    "`run` with sessions.num_routers starts routers itself; this is for clusters and other machines. On a "
    "machine that cannot see the run's directory, give --config and the settings with which the buffer is "
    "found: buffer.advertise_host (or buffer.host) and daemon.http_port.",
    argument("--name", metavar="NAME", default="", help="of the router; by default a free one"),
    *RUNNING_JOB,
    examples=[
        "router myrun sessions.router_port=7700",
        "router --config job.yaml name=myrun sessions.router_host=0.0.0.0 security.keys=keys",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Becomes the router. Raises ConfigError for a wrong setting."""
    paths, settings = running_job("router", args, "buffer.discovery=run_dir", "daemon.http_port=0")
    if paths is None and args.config is None:
        raise ConfigError("router: give either RUN or --config FILE with the settings of the job")
    config = load_config(settings)
    if args.name and not NAME.fullmatch(args.name):
        raise ConfigError(f"--name {args.name[:80]}: {NAME_RULE}")
    name = args.name or free_name(RunPaths.of(config), role="router")
    endpoint = RunPaths.of(config).endpoints / f"{name}.json"
    print(f"{name}: its address is in {endpoint}; Ctrl-C ends it", flush=True)
    become("rollout_server.router", "--name", name, *settings, num_threads=1)
