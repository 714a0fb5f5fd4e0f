"""Starts one role of a run on a node that a scheduler has chosen: waits, then execs the daemon.

An actor of Ray runs `python -m launch.nodes.start ROLE RUN PLACE`, with the place as JSON; jobs of Slurm run
`launch.slurm.node`.

The daemon has the scheduler's process as its parent, so that signals reach the daemon itself. Each role
waits:

    buffer    for the lock of its ledger: a buffer may still work on a node that the scheduler has given up
    trainer   for the buffer; then the trainer of an earlier start loses its name
    others    for the buffer

Each start of a rollout server has a new name, so a server on a lost node does no harm: its samples count as
long as it reaches the job, and it ends with the run. Score servers and routers keep their names: the newest
start is the one that is found.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from areal_like.built_model import is_built
from areal_like.config import Config
from areal_like.config.episode import SessionsConfig
from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.hosts import is_loopback
from areal_like.paths import BUILT_MODELS, RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import PARENT_PID, keep_files_private
from areal_like.wire.addresses import buffer_lookup
from launch.local_job.specs import DRAINED
from launch.observation.reach import RunningJob
from launch.run_directory.rundir import find_run, is_locked

ROLES = ("buffer", "trainer", "rollout")
SIDE_ROLES = ("scorer", "router")
"""Roles that a run has if its settings ask for them. They do not know when the run is finished, so who
supervises them ends them."""
ALL_ROLES = (*ROLES, *SIDE_ROLES)
_MODULES = {
    "buffer": "buffer",
    "trainer": "trainer",
    "rollout": "rollout_server",
    "scorer": "rollout_server.scoring",
    "router": "rollout_server.router",
}
_BUFFER_LIMIT_S = 600.0
"""Longest wait for the buffer. The trainer and the rollout servers start after it."""
_UNFENCE_LIMIT_S = 60.0
_TICK_S = 0.5
_TELL_S = 30.0
_SIOCGIFADDR = 0x8915
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
"""Ports of `trainer.rendezvous`, by the number of the job."""


@dataclass(frozen=True, kw_only=True)
class RolePlace:
    """Where a role is started."""

    address: str
    """Numeric address of this node at which the other nodes reach it."""
    job: str
    """The scheduler's name for this start: letters and a number."""
    number: int
    """Chooses the trainer's port; the same on all nodes of one start."""
    num_starts: int = 0
    """Earlier starts of the same job."""
    num_nodes: int = 1
    """Nodes of the trainer."""
    index: int = 0
    """Index of this node among them."""
    first_address: str = ""
    """Address of the first of several nodes."""

    def name_of(self, role: str) -> str:
        """The name of the daemon; empty for the buffer and the trainer, which are named after their roles.

        It does not end with a plain number, which would choose GPUs and ports: the scheduler has chosen those
        of the job.
        """
        if role == "rollout":
            return f"rollout-{self.job}r{self.num_starts}"
        return f"{role}-{self.job}" if role in SIDE_ROLES else ""


def read_run(run: str) -> tuple[RunPaths, Config]:
    """Paths and settings of a run, by name or directory. Raises ConfigError."""
    paths = RunPaths(find_run(run).resolve())
    return paths, load_config(["--config", str(paths.config)])


def exit_code_of(what: str, run: Callable[[], None]) -> int:
    """Runs the body of a start and returns its exit code; one line on stderr if it fails.

    SIGTERM ends it with DRAINED.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DRAINED))
    keep_files_private()
    try:
        run()
    except UserError as error:
        sys.stderr.write(f"{what}: {error}\n")
        return 2
    except ArealError as error:
        sys.stderr.write(f"{what}: {error}\n")
        return 1
    return 0


def start(role: str, config: Config, paths: RunPaths, place: RolePlace) -> None:
    """Waits, and replaces this process by the daemon. Raises ArealError at the limit of a wait."""
    if role == "buffer":
        _prepare_model(config, paths)
        _wait_for_ledger(paths)
    else:
        _wait_for_buffer(config)
    if role == "trainer" and place.num_starts:
        _take_name(paths)
    name = ["--name", own] if (own := place.name_of(role)) else []
    threads = {
        "trainer": config.trainer.least_threads,
        "rollout": config.rollout.least_threads,
        "scorer": config.scorer.num_threads,
    }.get(role, 1)
    settings = role_settings(role, place, config.sessions)
    _become([_MODULES[role], "--config", str(paths.config), *name, *settings], num_threads=threads)


def role_settings(role: str, place: RolePlace, sessions: SessionsConfig) -> list[str]:
    """The settings of one role that depend on the node.

    External agents and routers are on other machines, so what serves them binds the node's address, unless
    the user has chosen one.
    """
    address = place.address
    common = [f'daemon.http_host="{address}"', "daemon.advertise_host=''"]
    if role == "rollout" and is_loopback(sessions.host):
        common.append(f'sessions.host="{address}"')
    if role == "router" and is_loopback(sessions.router_host):
        common.append(f'sessions.router_host="{address}"')
    if role == "router":
        return common
    if role != "trainer":
        return [*common, f'{role}.host="{address}"', f"{role}.advertise_host=''"]
    first = place.first_address if place.num_nodes > 1 else address
    port = _FIRST_PORT + place.number % _NUM_PORTS
    several = [f"trainer.host_index={place.index}", f'trainer.rendezvous="{first}:{port}"']
    # Only rank 0 binds weights.host, and it is on the first node.
    hosts = [f'weights.host="{first}"', f"trainer.num_hosts={place.num_nodes}"]
    return [*common, *hosts, *(several if place.num_nodes > 1 else [])]


def address_of_interface(interface: str) -> str:
    """The IPv4 address of a network interface of this node. Raises ConfigError without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            found = fcntl.ioctl(one.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"--interface {interface}: no IPv4 address on {socket.gethostname()} ({error.strerror}; it "
                f"has {known})"
            ) from None
    return socket.inet_ntoa(found[20:24])


def _prepare_model(config: Config, paths: RunPaths) -> None:
    if config.model.path not in BUILT_MODELS or is_built(config):
        return
    command = [sys.executable, "-m", "trainer.prepare_model", "--config", str(paths.config)]
    code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    if code:
        error = UserError if code == 2 else ArealError
        raise error(f"the model was not prepared (exit code {code})")


def _wait_for_ledger(paths: RunPaths) -> None:
    """Waits while another buffer has the ledger: that buffer serves the run, and peers find its endpoint
    file."""
    what = f"another buffer has {paths.ledger}; this one takes over when it has ended"
    _wait(lambda: not is_locked(paths.ledger / "lock"), what=what)


def _wait_for_buffer(config: Config) -> None:
    look_up = buffer_lookup(config, 0)
    if look_up is None:
        raise ConfigError("buffer.discovery=address: a submitted run needs buffer.discovery=run_dir")
    what = f"no buffer has written its address into {RunPaths.of(config).endpoints}"
    _wait(lambda: look_up() is not None, what=what, limit_s=_BUFFER_LIMIT_S)


def _take_name(paths: RunPaths) -> None:
    """Takes the trainer's name from the process of an earlier start that the scheduler has given up.

    That process may still run if the scheduler cannot reach its node. Without an operator's token the buffer
    decides: the earlier process keeps the name while it responds.
    """
    until_s = time.monotonic() + _UNFENCE_LIMIT_S
    while True:
        try:
            RunningJob.in_directory(str(paths.root)).post_all("unfence", {"name": "trainer"})
        except ConfigError as error:
            if time.monotonic() < until_s and "does not respond" in str(error):
                time.sleep(_TICK_S)
                continue
            sys.stdout.write(f"trainer: the name is not taken from an earlier process: {error}\n")
        return


def _wait(is_done: Callable[[], bool], *, what: str, limit_s: float | None = None) -> None:
    """Waits with a line on stdout every half minute. Raises ArealError at the limit."""
    started_s = told_s = time.monotonic()
    while not is_done():
        now_s = time.monotonic()
        if limit_s is not None and now_s - started_s > limit_s:
            raise ArealError(f"waited {limit_s:.0f} s: {what}")
        if told_s == started_s or now_s - told_s > _TELL_S:
            told_s = max(now_s, started_s + 1e-6)
            bound = "" if limit_s is None else f" of at most {limit_s:.0f} s"
            sys.stdout.write(f"waiting ({now_s - started_s:.0f} s{bound}): {what}\n")
            sys.stdout.flush()
        time.sleep(_TICK_S)


def _become(words: Sequence[str], *, num_threads: int) -> None:
    sys.stdout.flush()
    environment = os.environ | {PARENT_PID: str(os.getppid())}
    environment.setdefault("OMP_NUM_THREADS", str(num_threads))
    command = [sys.executable, "-m", *words]
    os.execve(command[0], command, environment)


def main(argv: Sequence[str]) -> int:
    """Replaces this process by the daemon; returns an exit code only if that fails."""
    if len(argv) != 3 or argv[0] not in ALL_ROLES:
        sys.stderr.write(f"usage: python -m launch.nodes.start {'|'.join(ALL_ROLES)} RUN PLACE\n")
        return 2
    role, run, place = argv

    def body() -> None:
        paths, config = read_run(run)
        start(role, config, paths, RolePlace(**json.loads(place)))

    return exit_code_of(role, body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
