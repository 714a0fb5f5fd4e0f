"""Ends connections to a machine that is gone, and chooses the interface on which the ranks meet.

A process that dies closes its connections, and the ranks that wait for it fail at once. A machine that loses
power or network does not close them: gloo would wait for its time limit, which is an hour for a rank that may
be waiting for groups. TCP itself can distinguish a machine that is gone from a process that is stopped or
slow: the kernel acknowledges packets for the process. gloo has no setting for that, so the option is set on
its sockets.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from areal_like.security.binding import resolves_to_loopback

GONE_S = 30
"""Seconds without an acknowledgement from the other machine after which a connection is ended."""
_SIOCGIFADDR = 0x8915


class RankConnections:
    """The TCP connections of this process at construction: those of gloo, after the rendezvous of the ranks.

    Linux only; on other systems it has none.
    """

    def __init__(self) -> None:
        self._peers: dict[int, Any] = {}
        """File descriptor -> address of the other end."""
        if sys.platform == "linux":
            for path in list(Path("/proc/self/fd").iterdir()):
                self._peers |= {int(path.name): peer for _, peer in _connected(int(path.name))}

    def end_when_dead(self) -> None:
        """Makes the kernel end a connection whose other machine is gone, after `GONE_S`."""
        for fd in self._peers:
            for connection, _ in _connected(fd):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in (
                    (socket.TCP_KEEPIDLE, GONE_S // 3),
                    (socket.TCP_KEEPINTVL, GONE_S // 6),
                    (socket.TCP_KEEPCNT, 4),
                    (socket.TCP_USER_TIMEOUT, 1000 * GONE_S),
                ):
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def end(self) -> None:
        """Ends them now, so that ranks that wait for this one fail. gloo has no call for that."""
        for fd, before in self._peers.items():
            for connection, peer in _connected(fd):
                if peer == before:
                    connection.shutdown(socket.SHUT_RDWR)


def _connected(fd: int) -> Iterator[tuple[socket.socket, Any]]:
    """(a second descriptor of it, address of the other end) if `fd` is a TCP connection; else nothing."""
    try:
        connection = socket.socket(fileno=os.dup(fd))
    except OSError:  # not a socket, or closed in the meantime
        return
    with connection, contextlib.suppress(OSError):  # not connected, or not any more
        is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
        if is_tcp and connection.type == socket.SOCK_STREAM:
            yield connection, connection.getpeername()


def choose_interface(master: str) -> None:
    """Makes gloo use the interface that leads to rank 0's machine, unless GLOO_SOCKET_IFNAME is set.

    gloo would use the address of the machine's own name, which is a loopback address on many systems.
    """
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = "lo" if resolves_to_loopback(master) else interface_towards(master)
        if name:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str) -> str:
    """Name of the interface with the IPv4 address from which `host` is reached; empty if there is none."""
    import fcntl

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # chooses a route and sends nothing
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an IPv4 address
                    request = struct.pack("256s", name.encode()[:15])
                    found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                    if socket.inet_ntoa(found[20:24]) == address:
                        return name
    except OSError:
        pass
    return ""
