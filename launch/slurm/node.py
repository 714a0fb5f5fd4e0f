"""Starts one role on a node of Slurm: `python -m launch.slurm.node ROLE RUN`, from the batch script job.sh.

It waits until the role can begin, chooses the addresses of this node, and becomes the daemon (exec), so that
signals reach the daemon itself. What a role waits for:

    buffer    the lock of its ledger: on a node that Slurm has given up a buffer may still work
    trainer   the buffer; then a trainer of an earlier start of the job loses its name
    rollout   the buffer

Each start of a rollout job has a name of its own, so a server on a lost node does no harm: as long as it
reaches the job its samples count, and it ends with the run. `end RUN` drains the other jobs of a run, when
the buffer or the trainer is given up. `address RUN` prints the address of this node.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.hosts import is_loopback
from areal_like.paths import BUILT_MODELS, RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import PARENT_PID, keep_files_private
from areal_like.wire.addresses import buffer_lookup
from launch.observation.reach import RunningJob
from launch.run_directory.rundir import find_run
from launch.slurm.scheduler import end_job, jobs_in_queue, node_address
from launch.slurm.script import DRAINED, ROLES, job_name

_BUFFER_LIMIT_S = 600.0
"""Longest wait for the buffer. The trainer's job and the rollout jobs begin after that of the buffer."""
_UNFENCE_LIMIT_S = 60.0
_TICK_S = 0.5
_TELL_S = 30.0
_SIOCGIFADDR = 0x8915
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
"""Ports of `trainer.rendezvous`, by the number of the job."""


def main(argv: Sequence[str]) -> int:
    """Becomes the daemon; returns an exit code only without one."""
    if len(argv) != 2 or argv[0] not in (*ROLES, "end", "address"):
        sys.stderr.write(f"usage: python -m launch.slurm.node {'|'.join(ROLES)}|end|address RUN\n")
        return 2
    verb, run = argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DRAINED))
    keep_files_private()
    try:
        paths = RunPaths(find_run(run).resolve())
        config = load_config(["--config", str(paths.config)])
        if verb == "end":
            end_others(config, paths, own=int(os.environ["SLURM_JOB_ID"]))
        elif verb == "address":
            sys.stdout.write(own_address(os.environ) + "\n")
        else:
            start(verb, config, paths, os.environ)
    except UserError as error:
        sys.stderr.write(f"{verb}: {error}\n")
        return 2
    except ArealError as error:
        sys.stderr.write(f"{verb}: {error}\n")
        return 1
    return 0


def start(role: str, config: Config, paths: RunPaths, environment: Mapping[str, str]) -> None:
    """Waits, and replaces this process by the daemon. Raises ArealError at the limit of a wait."""
    settings = role_settings(role, environment, address=own_address(environment))
    if role == "buffer":
        _prepare_model(config, paths)
        _wait_for_ledger(paths)
    else:
        _wait_for_buffer(config)
    if role == "trainer" and is_restart(environment):
        _take_name(paths)
    name = ["--name", server_name(environment)] if role == "rollout" else []
    module = "rollout_server" if role == "rollout" else role
    threads = {"trainer": config.trainer.num_threads, "rollout": config.rollout.num_threads}.get(role, 1)
    _become([module, "--config", str(paths.config), *name, *settings], num_threads=threads)


def role_settings(role: str, environment: Mapping[str, str], *, address: str) -> list[str]:
    """The settings of one role that depend on the node."""
    common = [f'daemon.http_host="{address}"', "daemon.advertise_host=''"]
    if role == "buffer":
        return [*common, f'buffer.host="{address}"', "buffer.advertise_host=''"]
    if role == "rollout":
        return [*common, f'rollout.host="{address}"', "rollout.advertise_host=''"]
    num_nodes, index = int(environment["SLURM_JOB_NUM_NODES"]), int(environment.get("SLURM_NODEID", "0"))
    first = environment["AREAL_LIKE_FIRST_ADDRESS"] if num_nodes > 1 else address
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _NUM_PORTS
    several = [f"trainer.host_index={index}", f'trainer.rendezvous="{first}:{port}"'] if num_nodes > 1 else []
    # Only rank 0 binds weights.host, and it is on the first node.
    return [*common, f'weights.host="{first}"', f"trainer.num_hosts={num_nodes}", *several]


def server_name(environment: Mapping[str, str]) -> str:
    """The name of a rollout server: of its job, and of the job's start.

    It does not end with a plain number, which would choose GPUs: Slurm has chosen those of the job.
    """
    return f"rollout-j{environment['SLURM_JOB_ID']}r{environment.get('SLURM_RESTART_COUNT', '0')}"


def is_restart(environment: Mapping[str, str]) -> bool:
    """True if Slurm has started this job before."""
    return environment.get("SLURM_RESTART_COUNT", "0") != "0"


def own_address(environment: Mapping[str, str]) -> str:
    """A numeric address of this node that other nodes reach.

    Raises ConfigError if the node's name means only this machine, or for an unknown interface.
    """
    interface = environment.get("AREAL_LIKE_INTERFACE", "")
    if interface:
        return _address_of_interface(interface)
    node = environment["SLURMD_NODENAME"]
    given = node_address(node)
    try:
        return str(ipaddress.ip_address(given))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(given, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"the address of node {node}, {given}, does not resolve ({error.strerror}): submit with "
            "--interface NAME"
        ) from None
    addresses = sorted({str(entry[4][0]) for entry in found}, key=lambda each: (":" in each, each))
    reachable = [each for each in addresses if not is_loopback(each)]
    if not reachable:
        raise ConfigError(
            f"the address of node {node}, {given}, resolves to {', '.join(addresses)} there, which other "
            "nodes cannot reach: submit with --interface NAME"
        )
    return reachable[0]


def _address_of_interface(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            answer = fcntl.ioctl(one.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"--interface {interface}: no IPv4 address on {socket.gethostname()} ({error.strerror}; it "
                f"has {known})"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def end_others(config: Config, paths: RunPaths, *, own: int) -> None:
    """Drains or cancels the other jobs of the run, so that no allocation is held for nothing."""
    for job in jobs_in_queue(paths.root, [job_name(config, role) for role in ROLES]):
        if job.job_id != own:
            sys.stdout.write(f"job {job.job_id} ({job.name}) ends too\n")
            end_job(job)


def _prepare_model(config: Config, paths: RunPaths) -> None:
    if config.model.path not in BUILT_MODELS or (paths.built_model / "config.json").exists():
        return
    command = [sys.executable, "-m", "trainer.prepare_model", "--config", str(paths.config)]
    code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    if code:
        error = UserError if code == 2 else ArealError
        raise error(f"the model was not prepared (exit code {code})")


def _wait_for_ledger(paths: RunPaths) -> None:
    """Waits while another buffer has the ledger: it serves the run, and its file leads peers to it."""
    lock = paths.ledger / "lock"

    def is_free() -> bool:
        try:
            file = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True

    _wait(is_free, what=f"another buffer has {paths.ledger}; this one takes over when it has ended")


def _wait_for_buffer(config: Config) -> None:
    look_up = buffer_lookup(config, 0)
    if look_up is None:
        raise ConfigError("buffer.discovery=address: a job of Slurm needs buffer.discovery=run_dir")
    what = f"no buffer has written its address into {RunPaths.of(config).endpoints}"
    _wait(lambda: look_up() is not None, what=what, limit_s=_BUFFER_LIMIT_S)


def _take_name(paths: RunPaths) -> None:
    """Takes the trainer's name from the process of an earlier start, whose allocation is over.

    It may still work where Slurm does not reach its node. Without an operator's token the buffer decides: the
    earlier one keeps the name while it answers.
    """
    until_s = time.monotonic() + _UNFENCE_LIMIT_S
    while True:
        try:
            RunningJob.in_directory(str(paths.root)).post_all("unfence", {"name": "trainer"})
        except ConfigError as error:
            if time.monotonic() < until_s and "does not answer" in str(error):
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
