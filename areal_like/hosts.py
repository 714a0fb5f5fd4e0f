"""Host names and addresses."""

from __future__ import annotations

import ipaddress

LOOPBACK = "127.0.0.1"
"""The only address that an engine binds: its requests come only from its rollout server, on the same
machine."""


def is_loopback(host: str) -> bool:
    """True for `localhost` and for numeric addresses of loopback; other names are not resolved."""
    plain = host.strip("[]").partition("%")[0]
    try:
        return plain.lower() == "localhost" or ipaddress.ip_address(plain).is_loopback
    except ValueError:
        return False
