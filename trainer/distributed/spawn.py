"""Starts all trainer ranks of one machine, in place of `torchrun`.

torchrun's rendezvous listens on every interface and unpickles what it receives. Here the ranks meet at a
store whose socket this process binds to loopback and passes to rank 0. SIGTERM and SIGINT are passed on to
the ranks; when one rank fails the others get SIGTERM. A job on several machines needs torchrun itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

STORE_FD = "AREAL_LIKE_STORE_FD"
"""Environment variable of the ranks: the file descriptor of the store's listening socket for rank 0, -1 for
others."""
_POLL_S = 0.05
_TERMINATE_S = 10.0
"""Time between the SIGTERM that the other ranks get when one rank has failed, and their SIGKILL."""


def start_ranks(argv: Sequence[str], *, world_size: int, module: str = "trainer", drain_code: int = 0) -> int:
    """Runs `python -m MODULE` once for each rank.

    Returns 0, `drain_code` if the ranks have drained (they end with it), or the exit code of the first rank
    that failed (128 + N if signal N killed it).
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        ranks = [
            _start_rank(rank, world_size, [module, *argv], port=port, listening=listening)
            for rank in range(world_size)
        ]

    def pass_on(number: int, _: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, pass_on)
    failed = 0
    end_by_s = float("inf")
    while any(rank.poll() is None for rank in ranks):
        if not failed and (failed := _first_failure(ranks, drain_code)):
            end_by_s = time.monotonic() + _TERMINATE_S
            pass_on(signal.SIGTERM, None)
        if time.monotonic() > end_by_s:
            for rank in ranks:
                rank.kill()
        time.sleep(_POLL_S)
    failed = failed or _first_failure(ranks, drain_code)
    if not failed and any(rank.returncode for rank in ranks):
        return drain_code
    return failed if failed >= 0 else 128 - failed


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]], drain_code: int) -> int:
    """Exit code of a rank that failed; 0 if none has.

    A rank that was killed (negative code) comes first: the others fail because their connections to it broke.
    """
    codes = (code for rank in ranks if (code := rank.poll()) and code != drain_code)
    return min(codes, key=lambda code: code > 0, default=0)


def _start_rank(
    rank: int, world_size: int, command: Sequence[str], *, port: int, listening: socket.socket
) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = os.environ | {key: str(value) for key, value in variables.items()}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    inherited = [listening.fileno()] if rank == 0 else []
    environment[STORE_FD] = str(inherited[0] if inherited else -1)
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, pass_fds=inherited)
