"""Which address to bind and which to tell others."""

from __future__ import annotations

from areal_like.channel import tcp_address
from areal_like.config import Config
from areal_like.errors import ConfigError


def buffer_address(config: Config) -> str:
    """The one configured address. Raises ConfigError when its port is still open."""
    if config.buffer.port == 0:
        raise ConfigError("buffer.port is 0, so nobody can find the buffer: set the port that the buffer was started with")
    return tcp_address(config.buffer.advertise_host or config.buffer.host, config.buffer.port)
