"""Addresses of services in settings. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def problem_of_address(url: str, *, key_variable: str) -> str:
    """Returns what is wrong with a service's address, or with sending a key to it; empty: nothing.

    The text does not repeat the address, which may have a password.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or "@" in parts.netloc or parts.fragment:
        return (
            "url: want http://host:port/path or https://host/path, without a user name or password: put "
            "a key into an environment variable and name it with key_variable"
        )
    if key_variable and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        return "key_variable: a key is sent only over https, or to this machine"
    return ""
