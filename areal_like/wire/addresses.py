"""Addresses of the buffer's shards: the address that a shard binds, and the address that peers connect to."""

from __future__ import annotations

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.shards import Shard, all_shards
from areal_like.wire.channel import tcp_address


def buffer_port(config: Config, shard: Shard) -> int:
    """The port that this shard listens on; 0: any free port."""
    buffer = config.buffer
    return buffer.ports[shard.index] if buffer.ports else buffer.port and buffer.port + shard.index


def buffer_host(config: Config, shard: Shard) -> str:
    """The address that this shard binds."""
    return config.buffer.host.replace("{shard}", str(shard.index))


def reachable_host(config: Config, shard: Shard) -> str:
    """The address at which peers reach this shard."""
    return config.buffer.advertise_host.replace("{shard}", str(shard.index)) or buffer_host(config, shard)


def buffer_addresses(config: Config) -> list[str]:
    """`tcp://host:port` of each shard. Raises ConfigError if the configuration does not fix the ports."""
    shards = all_shards(config.buffer.num_shards)
    if not all(buffer_port(config, shard) for shard in shards):
        raise ConfigError(
            "buffer.port is 0, so the buffer cannot be found: set the port that the buffer was started with"
        )
    return [tcp_address(reachable_host(config, shard), buffer_port(config, shard)) for shard in shards]
