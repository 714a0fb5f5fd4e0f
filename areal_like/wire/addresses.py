"""Addresses of the buffer's shards: the address that a shard binds, and the address that peers connect to."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from areal_like.shards import Shard, all_shards
from areal_like.wire.channel import tcp_address
from areal_like.wire.limits import MAX_ADDRESS_CHARS

_LOOK_S = 0.05
"""Pause between two looks for an address that is not there yet."""
_LIMIT_S = 600.0
"""Longest wait for an address: a buffer that starts reads its ledger first."""
_STREAM = re.compile(r"tcp://[A-Za-z0-9._:%\[\]-]+:[0-9]{1,5}")


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
    """`tcp://host:port` of each shard.

    Raises ConfigError if the configuration does not fix the ports, ArealError if the buffer is looked up in
    the run's directory and is not there.
    """
    shards = all_shards(config.buffer.num_shards)
    if config.buffer.discovery == "run_dir":
        return [_found(config, shard) for shard in shards]
    if not all(buffer_port(config, shard) for shard in shards):
        raise ConfigError(
            "buffer.port is 0, so the buffer cannot be found: set the port that the buffer was started with"
        )
    return [tcp_address(reachable_host(config, shard), buffer_port(config, shard)) for shard in shards]


def buffer_lookup(config: Config, index: int) -> Callable[[], str | None] | None:
    """A function that looks up the current address of shard `index`; None if the address is a setting.

    The function returns None while no buffer has written an address.
    """
    if config.buffer.discovery != "run_dir":
        return None
    shard = all_shards(config.buffer.num_shards)[index]
    file = RunPaths.of(config).endpoints / f"{shard.name}.json"

    def look_up() -> str | None:
        try:
            address = json.loads(file.read_text())["stream"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        is_valid = isinstance(address, str) and len(address) <= MAX_ADDRESS_CHARS
        return address if is_valid and _STREAM.fullmatch(address) else None

    return look_up


async def wait_for_addresses(config: Config, *, gives_up: Callable[[], bool] = lambda: False) -> None:
    """Waits until every shard has written its address, or `gives_up` is true.

    Returns at once if the addresses are settings. Raises ArealError after _LIMIT_S.
    """
    deadline_s = time.monotonic() + _LIMIT_S
    for index in range(config.buffer.num_shards):
        look_up = buffer_lookup(config, index)
        while look_up is not None and look_up() is None and not gives_up():
            if time.monotonic() > deadline_s:
                buffer_addresses(config)  # raises
            await asyncio.sleep(_LOOK_S)


def _found(config: Config, shard: Shard) -> str:
    look_up = buffer_lookup(config, shard.index)
    assert look_up is not None
    address = look_up()
    if address is None:
        raise ArealError(
            f"{shard.name} has written no address into {RunPaths.of(config).endpoints}: start it first "
            "(buffer.discovery=run_dir needs a directory that all machines share)"
        )
    return address
