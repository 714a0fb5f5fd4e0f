"""The listening TCP ports of processes, from /proc."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True)
class Port:
    """One listening socket."""

    pid: int
    host: str
    number: int


def listening_ports(pids: Iterable[int]) -> list[Port]:
    """Every TCP port on which one of these processes listens."""
    sockets = {
        inode: (host, number)
        for table in ("tcp", "tcp6")
        for inode, host, number in _listening_sockets(table)
    }
    found = {Port(pid, *sockets[inode]) for pid in pids for inode in _inodes(pid) if inode in sockets}
    return sorted(found, key=lambda port: (port.number, port.pid))


def _listening_sockets(table: str) -> Iterable[tuple[int, str, int]]:
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTEN:
            address, _, number = fields[1].rpartition(":")
            yield int(fields[9]), _host(address), int(number, 16)


def _host(address: str) -> str:
    """An address of /proc/net/tcp: hexadecimal words of 32 bits, each in the byte order of this machine."""
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


def _inodes(pid: int) -> set[int]:
    found = set()
    with contextlib.suppress(OSError):  # the process has ended
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except OSError:  # closed meanwhile
                continue
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found
