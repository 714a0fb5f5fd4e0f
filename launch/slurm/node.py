"""One role on a node of Slurm: `python -m launch.slurm.node ROLE RUN`, from the batch script job.sh.

`end RUN` drains the other jobs of a run, when one that it needs is given up; `finish RUN` drains the
score servers and routers of a finished run. `address RUN` prints the address of this node.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.hosts import is_loopback
from areal_like.paths import RunPaths
from launch.nodes.start import (
    ALL_ROLES,
    SIDE_ROLES,
    RolePlace,
    address_of_interface,
    exit_code_of,
    read_run,
    start,
)
from launch.slurm.jobs import jobs_of
from launch.slurm.scheduler import end_job, node_address


def main(argv: Sequence[str]) -> int:
    """Replaces this process by the daemon; returns an exit code only if that fails."""
    verbs = {"end": ALL_ROLES, "finish": SIDE_ROLES}
    if len(argv) != 2 or argv[0] not in (*ALL_ROLES, *verbs, "address"):
        sys.stderr.write(f"usage: python -m launch.slurm.node {'|'.join((*ALL_ROLES, *verbs))}|address RUN\n")
        return 2
    verb, run = argv

    def body() -> None:
        paths, config = read_run(run)
        if verb in verbs:
            end_others(config, paths, verbs[verb], own=int(os.environ["SLURM_JOB_ID"]))
        elif verb == "address":
            sys.stdout.write(own_address(os.environ) + "\n")
        else:
            start(verb, config, paths, place_of(os.environ, address=own_address(os.environ)))

    return exit_code_of(verb, body)


def place_of(environment: Mapping[str, str], *, address: str) -> RolePlace:
    """The place of this process according to Slurm's environment. `address`: the address of this node."""
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    return RolePlace(
        address=address,
        job=f"j{environment['SLURM_JOB_ID']}",
        number=int(environment["SLURM_JOB_ID"]),
        num_starts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        num_nodes=num_nodes,
        index=int(environment.get("SLURM_NODEID", "0")),
        first_address=environment["AREAL_LIKE_FIRST_ADDRESS"] if num_nodes > 1 else "",
    )


def own_address(environment: Mapping[str, str]) -> str:
    """A numeric address of this node that other nodes can reach.

    Raises ConfigError if the node's name resolves to loopback, or for an unknown interface.
    """
    interface = environment.get("AREAL_LIKE_INTERFACE", "")
    if interface:
        return address_of_interface(interface)
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


def end_others(config: Config, paths: RunPaths, roles: Sequence[str], *, own: int) -> None:
    """Drains or cancels the other jobs of these roles, so that no allocation is held idle."""
    for job in jobs_of(config, paths, *roles):
        if job.job_id != own:
            sys.stdout.write(f"job {job.job_id} ({job.name}) ends too\n")
            end_job(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
