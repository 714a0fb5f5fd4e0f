"""Where the HTTP servers of sessions, routers and score servers listen, and their URLs."""

from __future__ import annotations

import socket

from areal_like.errors import ConfigError
from areal_like.wire.sockets import bound_socket

BACKLOG = 1024
"""Most connections that wait to be accepted."""
_LARGEST_PORT = 65535


def listening(host: str, port: int, index: int, *, setting: str) -> socket.socket:
    """Returns a socket whose connections the kernel queues from now on, instead of refusing them.

    `port`: the configured one; 0: the kernel chooses. `index`: number of this process, added to it.
    `setting`: name of the setting `host`. Raises ConfigError if the address cannot be bound.
    """
    of_port = setting.removesuffix("host") + "port"
    used_port = port and port + index
    if used_port > _LARGEST_PORT:
        raise ConfigError(
            f"{of_port}={port} + {index} (this server's number) is above {_LARGEST_PORT}: use a smaller "
            f"{of_port}"
        )
    try:
        listener = bound_socket(host, used_port)
        listener.listen(BACKLOG)
    except OSError as error:
        change = f"{of_port} to a port that is free (0: the kernel chooses one)"
        if not port:
            change = f"{setting} to an address of this machine"
        problem = f"cannot bind {setting}={host}, port {used_port} ({error.strerror or error})"
        raise ConfigError(f"{problem}: set {change}") from None
    return listener


def url_of(listener: socket.socket, *, host: str, advertise_host: str, is_tls: bool) -> str:
    """Returns the URL by which other machines reach a socket. `host`: what it is bound to; `advertise_host`:
    the host to show, empty: that one."""
    shown = advertise_host or (socket.gethostname() if host in ("0.0.0.0", "::") else host)
    shown = f"[{shown}]" if ":" in shown else shown
    return f"{'https' if is_tls else 'http'}://{shown}:{listener.getsockname()[1]}"
