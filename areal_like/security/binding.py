"""Refuses to bind an address that other machines can reach, unless the job has keys."""

from __future__ import annotations

import ipaddress
import socket

from areal_like.config import SecurityConfig
from areal_like.errors import ConfigError


def require_loopback_or_keys(security: SecurityConfig, host: str, *, setting: str) -> None:
    """Raises ConfigError if `host`, the value of `setting`, may not be bound. Call it before every bind.

    Names are resolved, because a name may mean any address. A name that does not resolve is refused too: `*`
    and the names of network interfaces are addresses for libzmq.
    """
    if security.keys or security.insecure or is_loopback(host):
        return
    raise ConfigError(
        f"{setting}={host} is not a loopback address: other machines may reach it, and the job has no keys; "
        "make them with `areal-like keys init DIR` and set security.keys=DIR (or security.insecure=true, and "
        "everyone who reaches the port can change the run)"
    )


def is_loopback(host: str) -> bool:
    """True if `host` has addresses and all of them are loopback addresses."""
    plain = host.strip("[]").partition("%")[0]
    try:
        return ipaddress.ip_address(plain).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(plain or "*", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)
