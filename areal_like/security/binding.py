"""Refuses to bind an address that other machines can reach, unless the job has keys."""

from __future__ import annotations

import socket

from areal_like.config import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.hosts import is_loopback


def require_loopback_or_keys(security: SecurityConfig, host: str, *, setting: str) -> None:
    """Raises ConfigError if `host`, the value of `setting`, may not be bound. Call it before every bind.

    Names are resolved, because a name may mean any address. A name that does not resolve is refused too: `*`
    and the names of network interfaces are addresses for libzmq.
    """
    if security.keys or security.insecure or resolves_to_loopback(host):
        return
    raise ConfigError(
        f"{setting}={host} is not a loopback address: other machines may reach it, and the job has no keys; "
        "make them with `areal-like keys init DIR` and set security.keys=DIR (or security.insecure=true, and "
        "everyone who reaches the port can change the run)"
    )


def admits_only_this_machine(security: SecurityConfig, host: str) -> bool:
    """True without keys on a loopback address: then no peer is expected from another machine."""
    return resolves_to_loopback(host) and not (security.keys or security.insecure)


def resolves_to_loopback(host: str) -> bool:
    """True if `host` has addresses and all of them are loopback addresses."""
    if is_loopback(host):
        return True
    try:
        found = socket.getaddrinfo(host.strip("[]") or "*", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(is_loopback(str(entry[4][0])) for entry in found)
