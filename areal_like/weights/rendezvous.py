"""The key-value store in which the ranks of a weight group find each other.

    rank 0           open_store() -> server, client, port -> every rank joined -> the server is closed
    other ranks      torch's TCPStore client

The store listens only on `weights.host`, at a port of `weights.port_range`. torch's TCPStore has neither a
password nor a memory limit: anyone who reaches the port can read, write and delete. gloo reads the addresses
of the other ranks from the store, and a malformed one ends the process (a segmentation fault in torch 2.13).
So every value of a group over gloo carries a message authentication code. Its key travels in `FormGroup`, and
a rank that reads a value without the right code fails the rendezvous and keeps running.

Left out: authentication for NCCL, which checks the length of the one value that it reads, and whose watchdog
thread reads the store in C++. SGLang's receivers know no key.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from areal_like.errors import ConfigError, WeightSyncError, first_line

_dist: Any = dist  # torch exports stores at run time, but its type stubs lack them
_MAC_BYTES = hashlib.sha256().digest_size


class AuthenticatedStore(_dist.Store):  # type: ignore[misc]
    """A store whose values end with the HMAC-SHA256 of their key and value.

    torch calls the methods, from the thread that forms the group.
    """

    def __init__(self, inner: Any, secret: bytes) -> None:
        super().__init__()
        self._inner = inner
        self._secret = secret

    def set(self, key: str, value: bytes) -> None:
        self._inner.set(key, value + self._code(key, value))

    def get(self, key: str) -> bytes:
        """Waits for a value and reads it. Raises WeightSyncError if a rank of the group did not write it."""
        raw = bytes(self._inner.get(key))
        value = raw[:-_MAC_BYTES]
        if len(raw) < _MAC_BYTES or not hmac.compare_digest(raw[-_MAC_BYTES:], self._code(key, value)):
            raise WeightSyncError("a process that is not in the weight group changed its rendezvous")
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._inner.wait(keys, *([] if timeout is None else [timeout]))

    def _code(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._secret, f"{len(key)}:{key}".encode() + value, "sha256")


def open_store(*, host: str, ports: Sequence[int], timeout_s: float) -> tuple[Any, Any, int]:
    """The server of a store on `host`, rank 0's client of it, and its port: the first free one of `ports`.

    We bind the listening socket and pass it to torch. So the store listens only on `host` (torch's own socket
    listens on every address), and no other process can take the port in between. Raises ConfigError if `host`
    cannot be bound, WeightSyncError if every port is taken.
    """
    listener = _listen(host, ports)
    port: int = listener.getsockname()[1]
    timeout = timedelta(seconds=timeout_s)
    try:
        server = _dist.TCPStore(
            host,
            port,
            None,
            True,
            timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=True,
        )
        # Rank 0 is a client of the store like the other ranks, so that closing the server ends every
        # rendezvous at once, including rank 0's own in another thread.
        return server, _dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False), port
    except RuntimeError as error:
        raise WeightSyncError(f"no store on {host}:{port}: {first_line(error)}") from None


def _listen(host: str, ports: Sequence[int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1024)
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"cannot listen on {host}:{port}: {error.strerror}: "
                    "set weights.host to an address of the machine of trainer rank 0"
                ) from None
    raise WeightSyncError(
        f"every port of weights.port_range={ports[0]}-{ports[-1]} is taken on {host}: use a larger range"
    )
