"""What an operator may do to the ledger of a job that is not running."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from areal_like.config import Config
from areal_like.errors import ConfigError, RefusedError
from areal_like.shards import Shard
from areal_like.wire.fingerprint import as_number, dataset_fingerprint
from buffer.ledger.recovery import recover
from buffer.settings import LedgerSettings
from buffer.storage.durable import open_store

_PATIENCE_S = 30.0
"""With a full disk, or a ledger that another program holds."""


def drop_offline(config: Config, ticket_ids: Sequence[int], shard: Shard) -> None:
    """Poisons a shard's tickets: all of its own among them, or none. Raises ConfigError if one may not be, or the ledger is in use."""
    if config.buffer.durability == "none":
        raise ConfigError("buffer.durability=none: a stopped buffer has no ledger to drop tickets from")
    asyncio.run(_drop(config, ticket_ids, shard))


async def _drop(config: Config, ticket_ids: Sequence[int], shard: Shard) -> None:
    loop = asyncio.get_running_loop()
    durable: asyncio.Future[None] = loop.create_future()
    with contextlib.closing(open_store(config, on_error=durable.set_exception, shard=shard)) as store:
        ledger = recover(
            LedgerSettings.from_config(config, shard),
            store,
            now_s=loop.time(),
            dataset=as_number(dataset_fingerprint(config)),
            ignoring=ticket_ids,  # they may be dropped because their trajectories are damaged
        )
        try:
            ledger.poison(ticket_ids)
        except RefusedError as error:
            raise ConfigError("ticket {} {}".format(*error.args)) from None
        store.when_durable(lambda: durable.set_result(None))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await durable
        except TimeoutError:
            raise ConfigError(
                store.health or f"the ledger was not written within {_PATIENCE_S:g} s"
            ) from None
