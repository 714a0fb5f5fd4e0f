"""Scaling a running job by hand: `areal-like rollout`, `areal-like drain`, `areal-like restart`.

A server that joins is a child of the shell's command and not of the launcher: it is nobody's to restart, may be on another machine, and
ends with Ctrl-C, when it is drained, or when its run is over. Where the run's directory can be seen that is known from its lock, which the
launcher's daemons hold to the last; elsewhere it waits for its buffer until somebody ends it, as every server does.

A trainer is replaced by the launcher, who owns it: the command leaves an order in the run's directory and waits until it is taken.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.command_line import load_config
from areal_like.runtime.daemon import read_endpoint
from areal_like.runtime.process import PARENT_PID
from areal_like.shards import all_shards
from areal_like.wire.addresses import buffer_addresses
from launch.commands.run import StopSignals
from launch.local_job.child import ROOT
from launch.local_job.observe import fetch_json, post_json
from launch.local_job.rundir import find_run, is_over, order_file

_TICK_S = 0.2
_TAKEN_WITHIN_S = 10.0
_OF_THE_RUN = ("trainer.groups_per_step", "trainer.num_steps")
"""Settings of the trainer that the buffer fills steps by."""


def join(run: str, settings: Sequence[str], *, buffer: str = "", name: str = "") -> int:
    """Runs one more rollout server for a job until it ends; returns its exit code.

    `run`: name or directory of a run that can be seen from here, or nothing; then `buffer` (host:port; of several shards, of the first) and
    all settings are needed. Raises ConfigError before anything was started.
    """
    paths = RunPaths(find_run(run)) if run else None
    arguments = (
        ["--config", str(paths.config), f"runs_dir={paths.root.resolve().parent}", *settings]
        if paths
        else list(settings)
    )
    arguments += buffer_settings(load_config(arguments), paths, buffer)
    config = load_config(arguments)
    addresses = ", ".join(address.removeprefix("tcp://") for address in buffer_addresses(config))
    if paths is not None and is_over(paths):
        raise ConfigError(f"{paths.root}: this run is over; start it again with resume=latest")
    name = name or _free_name(RunPaths.of(config))
    environment = os.environ | {
        PARENT_PID: str(os.getpid()),
        "OMP_NUM_THREADS": str(config.rollout.num_threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    stops = StopSignals()
    server = subprocess.Popen(
        [sys.executable, "-m", "rollout_server", "--name", name, *arguments],
        env=environment,
        start_new_session=True,
    )
    sys.stdout.write(
        f"{name} joins the job at {addresses}; Ctrl-C, or `areal-like drain {run or 'RUN'} {name}`, ends it\n"
    )
    sys.stdout.flush()
    num_obeyed = 0
    while (code := server.poll()) is None:
        if stops.count > num_obeyed or (num_obeyed == 0 and paths is not None and is_over(paths)):
            num_obeyed += 1
            server.send_signal(signal.SIGTERM if num_obeyed == 1 else signal.SIGKILL)
        time.sleep(_TICK_S)
    return code if code >= 0 else 1


def drain(run: str, name: str) -> int:
    """Asks one rollout server to end: no new leases, what it holds is returned. Returns 0 when it has left. Raises ConfigError."""
    paths = RunPaths(find_run(run))
    config = load_config(["--config", str(paths.config)])
    servers = servers_of(config, paths)
    if name not in servers:
        known = ", ".join(sorted(servers)) or "none is running"
        raise ConfigError(f"drain: {paths.root.name} has no rollout server {name!r} (servers: {known})")
    try:
        post_json(servers[name], "/control/drain", {})
    except OSError as error:
        raise ConfigError(
            f"drain: {name} does not answer at {servers[name]} ({error}): send SIGTERM to its process, or let its machine be reached "
            "(daemon.http_host)"
        ) from None
    deadline_s = time.monotonic() + config.daemon.drain_timeout_s
    while time.monotonic() < deadline_s:
        if name not in servers_of(config, paths):
            sys.stdout.write(f"{name} has left\n")
            return 0
        time.sleep(_TICK_S)
    raise ArealError(f"drain: {name} was told to leave, but is still registered")


def restart(run: str, role: str, settings: Sequence[str]) -> int:
    """Has a job's trainer replaced by one with other settings, while its servers generate. Returns 0 when the launcher has begun."""
    paths = RunPaths(find_run(run))
    if role != "trainer":
        raise ConfigError(
            f"restart: {role!r} cannot be restarted alone, only `trainer`; servers are drained and joined"
        )
    if any(not setting.startswith("trainer.") for setting in settings):
        raise ConfigError(
            "restart: only trainer.* settings may change while the other roles go on with theirs"
        )
    if fixed := [setting for setting in settings if setting.partition("=")[0] in _OF_THE_RUN]:
        raise ConfigError(
            f"restart: {fixed[0]} is the buffer's too: stop the run and go on with resume=latest {fixed[0]}"
        )
    load_config(["--config", str(paths.config), *settings])
    if is_over(paths):
        raise ConfigError(
            f"restart: {paths.root} is not being run by a launcher; start the trainer yourself with resume=latest"
        )
    write_json(order_file(paths), {"role": role, "settings": list(settings)})
    deadline_s = time.monotonic() + _TAKEN_WITHIN_S
    while order_file(paths).exists():
        if time.monotonic() > deadline_s:
            order_file(paths).unlink(missing_ok=True)
            raise ConfigError(
                f"restart: the launcher of {paths.root.name} does not take the order; is it closing, or still starting?"
            )
        time.sleep(_TICK_S)
    sys.stdout.write("the trainer finishes its step, writes a checkpoint, and is started again\n")
    return 0


def buffer_settings(config: Config, paths: RunPaths | None, given: str) -> list[str]:
    """Settings that say where a job's buffers are, for a server that joins it. Raises ConfigError when that is not known."""
    if given:
        host, _, port = given.rpartition(":")
        if not (host and port.isdecimal()):
            raise ConfigError(f"--buffer {given}: want host:port")
        return [
            f'buffer.host="{host.strip("[]")}"',
            "buffer.advertise_host=''",
            f"buffer.port={port}",
            "buffer.ports=[]",
        ]
    if paths is None:
        raise ConfigError(
            "rollout --join: no running buffer is known; name a running job, or give --buffer host:port"
        )
    ports = []
    for shard in all_shards(config.buffer.num_shards):
        endpoint = read_endpoint(paths.endpoints / f"{shard.name}.json")
        if endpoint is None or "stream" not in endpoint:
            raise ConfigError(
                f"rollout --join: the {shard.name} of {paths.root.name} is not running; is the job?"
            )
        ports.append(str(endpoint["stream"]).rpartition(":")[2])
    return [f"buffer.ports=[{','.join(ports)}]"]


def _free_name(paths: RunPaths) -> str:
    """A name that no server of the run has, taken by its log file. Machines that do not see the run's directory name themselves."""
    if not paths.endpoints.is_dir():
        return f"rollout-{socket.gethostname()}-p{os.getpid()}"  # no number at its end, which would be taken for the server's
    names = (f"rollout-{number}" for number in itertools.count())
    return next(
        name
        for name in names
        if not (paths.endpoints / f"{name}.json").exists() and _made(paths.logs / f"{name}.log")
    )


def _made(path: Path) -> bool:
    """Whether an empty file was made there; False when there was one."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def servers_of(config: Config, paths: RunPaths) -> dict[str, str]:
    """Name -> address of the HTTP plane of every rollout server that a buffer of the job knows. Raises ConfigError when none answers."""
    endpoints = [
        read_endpoint(paths.endpoints / f"{shard.name}.json")
        for shard in all_shards(config.buffer.num_shards)
    ]
    answers = [
        status
        for endpoint in endpoints
        if endpoint and (status := fetch_json(str(endpoint.get("http", "")), "/status"))
    ]
    if not answers:
        raise ConfigError(f"{paths.root}: its buffer does not answer; is the job running?")
    return {
        str(peer["name"]): str(peer["http"])
        for status in answers
        for peer in status.get("peers", [])
        if peer.get("role") == "rollout"
    }
