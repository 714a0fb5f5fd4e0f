"""Drops tickets from the ledger of a job whose buffer is not running (`python -m buffer --drop`)."""

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

_WRITE_TIMEOUT_S = 30.0
"""Longest wait for the write: the disk may be full, or another program may have locked the ledger file."""


def drop_offline(config: Config, ticket_ids: Sequence[int], shard: Shard) -> None:
    """Drops the tickets that belong to this shard, with reason `poison`: all of them, or none.

    Raises ConfigError if one of them may not be dropped, UserError if the ledger is in use.
    """
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
            # A damaged trajectory may be the reason for dropping its ticket.
            ignoring=ticket_ids,
        )
        try:
            ledger.poison(ticket_ids)
        except RefusedError as error:
            raise ConfigError("ticket {} {}".format(*error.args)) from None
        store.when_durable(lambda: durable.set_result(None))
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await durable
        except TimeoutError:
            raise ConfigError(
                store.write_blocked_reason or f"the ledger was not written within {_WRITE_TIMEOUT_S:g} s"
            ) from None
