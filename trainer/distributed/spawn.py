"""Starts the trainer ranks of one machine, in place of `torchrun`.

torchrun's rendezvous listens on every interface and unpickles received data, and its exit code does not
distinguish a drain from a failure. Here the ranks meet at a store whose socket this process binds to one
address (loopback, or on machine 0 of several its own) and passes to rank 0. SIGTERM and SIGINT are passed on
to the ranks; when one rank fails the others get SIGTERM. The machines do not supervise one another: the ranks
detect a failure by their connections.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from areal_like.config import Config
from areal_like.errors import ConfigError, UserError
from areal_like.security.binding import require_loopback_or_keys

STORE_FD = "AREAL_LIKE_STORE_FD"
"""Environment variable of the ranks: the file descriptor of the store's listening socket for rank 0, -1 for
others."""
_POLL_S = 0.05
_PORT_WAIT_S = 60.0
_TERMINATE_S = 10.0
"""Time between the SIGTERM that the other ranks get when one rank has failed, and their SIGKILL."""


def start_ranks(
    argv: Sequence[str],
    *,
    world_size: int,
    module: str = "trainer",
    drain_code: int = 0,
    num_hosts: int = 1,
    host_index: int = 0,
    rendezvous: str = "",
) -> int:
    """Runs `python -m MODULE` once for each rank of this machine.

    Returns 0, `drain_code` if the ranks have drained (they end with it), or the exit code of the first rank
    that failed (128 + N if signal N killed it). `num_hosts`, `host_index` and `rendezvous` are as in
    `TrainerConfig`. Raises ConfigError if machine 0 cannot listen at `rendezvous`.
    """
    num_here = world_size // num_hosts
    first = host_index * num_here
    host, port = "127.0.0.1", 0
    if rendezvous:
        host, _, text = rendezvous.rpartition(":")
        host, port = host.strip("[]"), int(text)
    with contextlib.ExitStack() as stack:
        listening = None
        if host_index == 0:
            listening = stack.enter_context(_listen(host, port))
            port = listening.getsockname()[1]
        master = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        ranks = [
            _start_rank(
                master | {"RANK": str(first + local), "LOCAL_RANK": str(local)},
                [module, *argv],
                listening=listening if first + local == 0 else None,
            )
            for local in range(num_here)
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


def start_ranks_of(config: Config, argv: Sequence[str], *, module: str = "trainer") -> int:
    """`start_ranks` with the ranks, machines and exit code of `config`; reports a mistake on stderr."""
    trainer = config.trainer
    try:
        if trainer.num_hosts > 1:
            host = trainer.rendezvous.rpartition(":")[0]
            require_loopback_or_keys(config.security, host, setting="trainer.rendezvous")
        return start_ranks(
            argv,
            world_size=trainer.world_size,
            module=module,
            drain_code=config.daemon.exit_code_on_drain,
            num_hosts=trainer.num_hosts,
            host_index=trainer.host_index,
            rendezvous=trainer.rendezvous if trainer.num_hosts > 1 else "",
        )
    except UserError as error:
        sys.stderr.write(f"{module}: {error}\n")
        return 2


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]], drain_code: int) -> int:
    """Exit code of a rank that failed; 0 if none has.

    A rank that was killed (negative code) comes first: the others fail because their connections to it broke.
    """
    codes = (code for rank in ranks if (code := rank.poll()) and code != drain_code)
    return min(codes, key=lambda code: code > 0, default=0)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket at this address; waits for a port that ranks of an earlier start still have."""
    end_s = time.monotonic() + _PORT_WAIT_S
    while True:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end_s:
                raise ConfigError(
                    f"trainer.rendezvous={host}:{port}: machine 0 cannot listen there ({error.strerror}); "
                    "name an address of the machine with trainer.host_index=0 and a free port"
                ) from None
        time.sleep(0.5)


def _start_rank(
    variables: dict[str, str], command: Sequence[str], *, listening: socket.socket | None
) -> subprocess.Popen[bytes]:
    environment = os.environ | variables
    inherited = [listening.fileno()] if listening is not None else []
    environment[STORE_FD] = str(inherited[0] if inherited else -1)
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, pass_fds=inherited)
