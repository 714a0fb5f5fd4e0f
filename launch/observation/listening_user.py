"""Which user's process listens at an address of this machine.

A killed daemon leaves its endpoint file, and another user's process may get its port. Linux shows the user of
every listening socket, also to other users.
"""

from __future__ import annotations

import ipaddress
import struct
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"
"""State of a listening socket."""
_ANY = (ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::"))


def may_belong_to(address: str, user: int) -> bool:
    """False if no process of this user listens at `host:port`, where that is an address of loopback.

    True for other addresses, and on systems without these tables: nothing is known there.
    """
    host, _, port = address.rpartition(":")
    try:
        parsed = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        return True
    if not (parsed.is_loopback or parsed.is_unspecified) or not _TABLES[0].exists():
        return True
    ends = {f"{_as_shown(each)}:{int(port):04X}" for each in (parsed, *_ANY)}
    users = [
        int(fields[7])
        for table in _TABLES
        if table.exists()
        for fields in map(str.split, table.read_text().splitlines()[1:])
        if fields[3] == _LISTEN and fields[1] in ends
    ]
    return bool(users) and all(found == user for found in users)


def _as_shown(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """In words of 32 bits, each in this machine's byte order."""
    packed = address.packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words)
