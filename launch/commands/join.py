"""`areal-like rollout RUN --join`: runs one more rollout server for a running job.

The server is a child of this command and not of the job's launcher: it is not restarted, it may run on
another machine, and it ends on Ctrl-C, when it is drained, or when its run is over. On a machine that sees
the run's directory, the run is over when no process holds the directory's lock: the launcher and all of its
daemons hold it. On other machines the server waits for its buffer until a user ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import PARENT_PID
from areal_like.shards import all_shards
from areal_like.wire.addresses import buffer_addresses
from launch.commands.configuration import RUNNING_JOB, running_job
from launch.commands.foreground import StopSignals, environment_of
from launch.commands.parser import argument, command
from launch.run_directory.rundir import is_over
from launch.run_files import read_object

_TICK_S = 0.2


@command(
    "rollout",
    "Run one more rollout server for a running job, until it is drained, the run ends or Ctrl-C. On a "
    "machine that cannot see the run's directory, give --buffer and all of the job's settings, its name "
    "included.",
    argument("--join", action="store_true", required=True, help="join a running job"),
    argument(
        "--buffer",
        metavar="HOST:PORT",
        default="",
        help="the stream of the first shard's buffer: buffer.host and buffer.port",
    ),
    argument("--name", metavar="NAME", default="", help="of the server; by default a free one"),
    *RUNNING_JOB,
    examples=[
        "rollout myrun --join rollout.engine_device=cuda:1",
        "rollout --join --buffer node7:5555 --config job.yaml name=myrun",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Runs one more rollout server for a job until it ends; returns its exit code. Raises ConfigError before
    it starts the server."""
    paths, arguments = running_job("rollout", args)
    arguments += buffer_settings(load_config(arguments), paths, args.buffer)
    config = load_config(arguments)
    addresses = ", ".join(address.removeprefix("tcp://") for address in buffer_addresses(config))
    if config.daemon.http_port and not any(each.startswith("daemon.http_port=") for each in arguments):
        arguments = [*arguments, "daemon.http_port=0"]  # the job's own daemons use the configured ports
    name = args.name or free_name(RunPaths.of(config))
    threads = {PARENT_PID: str(os.getpid()), "OMP_NUM_THREADS": str(config.rollout.least_threads)}
    stops = StopSignals()
    server = subprocess.Popen(
        [sys.executable, "-m", "rollout_server", "--name", name, *arguments],
        env=environment_of(**threads),
        start_new_session=True,
    )
    ends = f"Ctrl-C, or `areal-like drain {args.run if paths else 'RUN'} {name}`, ends it"
    print(f"{name} joins the job at {addresses}; {ends}", flush=True)
    return _wait(server, paths, stops=stops)


def buffer_settings(config: Config, paths: RunPaths | None, given: str) -> list[str]:
    """Settings with the addresses of a job's buffers, for a server that joins it.

    `given`: host:port of the stream of the first shard's buffer. If it is empty, `paths` (the run's
    directory) is needed. Raises ConfigError when the addresses cannot be found.
    """
    if given:
        host, _, port = given.rpartition(":")
        if not (host and port.isdecimal()):
            raise ConfigError(f"--buffer {given}: expected host:port")
        return [
            f'buffer.host="{host.strip("[]")}"',
            "buffer.discovery=address",
            "buffer.advertise_host=''",
            f"buffer.port={port}",
            "buffer.ports=[]",
        ]
    if paths is not None and config.buffer.discovery == "run_dir":
        return []
    if paths is None:
        raise ConfigError(
            "rollout --join: there is no buffer to join; name a running job, or give --buffer host:port"
        )
    ports = []
    for shard in all_shards(config.buffer.num_shards):
        endpoint = read_object(paths.endpoints / f"{shard.name}.json")
        if "stream" not in endpoint:
            raise ConfigError(
                f"rollout --join: {shard.name} of {paths.root.name} is not running: start the job first"
            )
        ports.append(str(endpoint["stream"]).rpartition(":")[2])
    return [f"buffer.ports=[{','.join(ports)}]"]


def _wait(server: subprocess.Popen[bytes], paths: RunPaths | None, *, stops: StopSignals) -> int:
    """Waits for the server, and ends it on a stop signal or when its run is over; returns its exit code.

    The first stop signal or the end of the run sends SIGTERM, a later stop signal SIGKILL.
    """
    num_obeyed = 0
    while (code := server.poll()) is None:
        if stops.count > num_obeyed or (num_obeyed == 0 and paths is not None and is_over(paths)):
            num_obeyed += 1
            server.send_signal(signal.SIGTERM if num_obeyed == 1 else signal.SIGKILL)
        time.sleep(_TICK_S)
    return code if code >= 0 else 1


def free_name(paths: RunPaths, *, role: str = "rollout") -> str:
    """A name that no server of the run and this role has; the creation of its log file reserves it.

    On a machine that does not see the run's directory, the name contains the host's name and the process id.
    """
    if not paths.endpoints.is_dir():
        # `p` before the number: a plain number at the end would be read as the server's index.
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:40]
        return f"{role}-{host}-p{os.getpid()}"
    for number in itertools.count():
        name = f"{role}-{number}"
        if not (paths.endpoints / f"{name}.json").exists():
            paths.logs.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                (paths.logs / f"{name}.log").touch(exist_ok=False)
                return name
    raise AssertionError("itertools.count ended")
