"""What an operator may do to the ledger of a job whose buffer is not running.

`python -m buffer --drop 17,23` and `--unfence NAME`; the same operations on a running buffer are in
`operations.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from areal_like.config import Config
from areal_like.errors import ConfigError, RefusedError
from areal_like.shards import Shard
from areal_like.wire.fingerprint import as_number, dataset_fingerprint
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.service.operations import fenced_name
from buffer.settings import LedgerSettings
from buffer.storage.durable import open_store

_WRITE_TIMEOUT_S = 30.0
"""Longest wait for the write: the disk may be full, or another program may have locked the ledger file."""


def drop_offline(config: Config, ticket_ids: Sequence[int], shard: Shard) -> None:
    """Drops the tickets that belong to this shard, with reason `poison`: all of them, or none.

    Raises ConfigError if one of them may not be dropped, UserError if the ledger is in use.
    """

    def drop(ledger: Ledger) -> None:
        try:
            ledger.operator.poison(ticket_ids)
        except RefusedError as error:
            raise ConfigError("ticket {} {}".format(*error.args)) from None

    # A damaged trajectory may be the reason for dropping its ticket.
    asyncio.run(_change(config, shard, drop, ignoring=ticket_ids))


def unfence_offline(config: Config, name: str, shard: Shard) -> None:
    """Takes a name from the process that has it: the next new process gets the name.

    Raises UserError if no process has had the name, or if the ledger is in use.
    """

    def unfence(ledger: Ledger) -> None:
        key = fenced_name(name)
        if key not in ledger.state.incarnations:
            raise ConfigError(f"no process of this run has had the name {key}")
        ledger.operator.unfence(key, unix_s=time.time())

    asyncio.run(_change(config, shard, unfence))


async def _change(
    config: Config, shard: Shard, change: Callable[[Ledger], None], *, ignoring: Sequence[int] = ()
) -> None:
    """Opens the ledger, changes it and waits until that is durable."""
    if config.buffer.durability == "none":
        raise ConfigError("buffer.durability=none: a stopped buffer has no ledger that could be changed")
    loop = asyncio.get_running_loop()
    durable: asyncio.Future[None] = loop.create_future()
    with contextlib.closing(open_store(config, on_error=durable.set_exception, shard=shard)) as store:
        ledger = recover(
            LedgerSettings.from_config(config, shard),
            store,
            now_s=loop.time(),
            dataset=as_number(dataset_fingerprint(config)),
            ignoring=ignoring,
        )
        change(ledger)
        store.when_durable(lambda: durable.set_result(None))
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await durable
        except TimeoutError:
            raise ConfigError(
                store.write_blocked_reason or f"the ledger was not written within {_WRITE_TIMEOUT_S:g} s"
            ) from None
