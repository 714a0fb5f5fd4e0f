"""The operator's control of a running buffer: `POST /control/<verb>` with a JSON object.

    drop {"tickets": [17, 23]}           removes recorded tickets: all of them, or none
    unfence {"name": "rollout-0"}        takes a name from its process; the next new one gets it
    cordon, uncordon {"server": "rollout-0"}    stops granting a rollout server new leases; resumes it
    set {"trainer.lr": 1e-5, ...}        changes settings from the next step on (tables/live_settings.py), or
                                         requests an evaluation or a checkpoint: {"evaluate": "now"}
    pause, resume {}                     stops granting leases of training tickets; resumes it
    drain_server {"server": "rollout-0"} tells a rollout server to leave, over its own connection: the HTTP
                                         address in a hello is whatever the peer wrote there

Each raises UserError for invalid input. Changes are durable before the reply. `drop_offline` and
`unfence_offline` are for the ledger of a job whose buffer is not running (`python -m buffer --drop 17,23`,
`--unfence NAME`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from areal_like.config import Config
from areal_like.config.common import NAME
from areal_like.errors import ConfigError, RefusedError, UserError
from areal_like.runtime.logs import follow_level
from areal_like.shards import Shard
from areal_like.wire.fingerprint import as_number, dataset_fingerprint
from areal_like.wire.messages.hello import Drain, Role
from buffer.ledger.ledger import Ledger
from buffer.ledger.operator_changes import Change
from buffer.ledger.recovery import recover
from buffer.service.outbox import Outbox
from buffer.service.peers import ConnectedPeers
from buffer.service.registration import Registration
from buffer.settings import LedgerSettings
from buffer.storage.durable import open_store
from buffer.tables.incarnations import TRAINER

log = logging.getLogger(__name__)

_MAX_SETTINGS = 16
_TEXTS = (str, int, float)
T = TypeVar("T")
Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Operations:
    """The verbs of one buffer."""

    def __init__(
        self,
        ledger: Ledger,
        peers: ConnectedPeers,
        outbox: Outbox,
        registration: Registration,
        *,
        changing: Callable[[], contextlib.AbstractContextManager[None]],
        changed: Callable[[], None],
    ) -> None:
        """`changing`: a context in which an error of the ledger ends the job.

        `changed`: sends the consequences.
        """
        self._ledger = ledger
        self._peers = peers
        self._outbox = outbox
        self._registration = registration
        self._changing, self._changed = changing, changed

    @property
    def verbs(self) -> dict[str, Verb]:
        return {
            "drop": self._drop,
            "unfence": self._unfence,
            "drain_server": self._drain_server,
            "cordon": functools.partial(self._set_cordoned, True),
            "uncordon": functools.partial(self._set_cordoned, False),
            "set": self._set,
            "pause": functools.partial(self._set_paused, True),
            "resume": functools.partial(self._set_paused, False),
        }

    async def _drop(self, body: dict[str, Any]) -> dict[str, Any]:
        ticket_ids = body.get("tickets")
        if (
            not isinstance(ticket_ids, list)
            or not ticket_ids
            or not all(type(ticket_id) is int for ticket_id in ticket_ids)
        ):
            raise UserError('want {"tickets": [ID, ...]}')
        await self._changed_by(
            lambda: self._ledger.operator.poison(ticket_ids),
            announce=lambda _: log.warning("an operator dropped tickets %s", ticket_ids),
            refusal="ticket {} {}",
        )
        return {"dropped": ticket_ids}

    async def _unfence(self, body: dict[str, Any]) -> dict[str, Any]:
        name = fenced_name(body.get("name"))
        if name not in self._ledger.state.incarnations:
            raise UserError(f"no process of this run has had the name {name}")
        change = await self._changed_by(
            lambda: self._registration.unfence(name, unix_s=time.time()),
            announce=lambda change: log.warning("an operator unfenced %s: %s", name, change),
        )
        return {"unfenced": name, "change": change}

    async def _drain_server(self, body: dict[str, Any]) -> dict[str, Any]:
        peer = self._peers.named(str(body.get("server")))
        if peer is None or peer.hello.role is not Role.ROLLOUT:
            raise UserError(self._no_server(body.get("server")))
        if not self._outbox.send(peer.route, Drain()):
            raise UserError(f"{peer.hello.name} is not connected: end its process")
        log.info("an operator drains %s", peer.hello.name)
        return {"draining": peer.hello.name}

    def _no_server(self, name: Any) -> str:
        servers = ", ".join(sorted(peer.hello.name for peer in self._peers.of(Role.ROLLOUT))) or "none"
        return f"{str(name)[:80]!r} is not a registered rollout server (registered: {servers})"

    async def _set_cordoned(self, is_cordoned: bool, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("server")
        peer = self._peers.named(name) if isinstance(name, str) else None
        is_known = peer is not None and peer.hello.role is Role.ROLLOUT
        if not isinstance(name, str) or not (is_known or name in self._ledger.state.holds.cordoned):
            raise UserError(self._no_server(name))
        has_changed = await self._changed_by(
            lambda: self._ledger.operator.set_cordoned(name, is_cordoned, unix_s=time.time()),
            announce=lambda _: log.warning(
                "an operator %s %s", "cordons" if is_cordoned else "uncordons", name
            ),
        )
        return {"server": name, "changed": has_changed}

    async def _set(self, body: dict[str, Any]) -> dict[str, Any]:
        if not 0 < len(body) <= _MAX_SETTINGS or not all(type(value) in _TEXTS for value in body.values()):
            raise UserError('want {KEY: VALUE, ...}, as {"trainer.lr": 1e-5, "evaluate": "now"}')
        wanted = {key: str(value) for key, value in body.items()}
        changes = await self._changed_by(
            lambda: self._ledger.operator.change_settings(wanted, unix_s=time.time()),
            announce=self._announce_settings,
        )
        return {"changes": [dataclasses.asdict(change) for change in changes]}

    def _announce_settings(self, changes: Sequence[Change]) -> None:
        for change in changes:
            log.warning("an operator sets %s=%s, step %d", change.key, change.value, change.step)
        follow_level(self._ledger.state.live.log_level)

    async def _set_paused(self, is_paused: bool, _: dict[str, Any]) -> dict[str, Any]:
        has_changed = await self._changed_by(
            lambda: self._ledger.operator.set_paused(is_paused, unix_s=time.time()),
            announce=lambda _: log.warning("an operator %s the run", "pauses" if is_paused else "resumes"),
        )
        return {"paused": is_paused, "changed": has_changed}

    async def _changed_by(
        self, change: Callable[[], T], *, announce: Callable[[T], None], refusal: str = "{}: {}"
    ) -> T:
        """The result of a change, when it is durable. Raises UserError if the ledger refuses the change.

        `announce`: logs the result. It is called at once, because the change takes effect at once, and a full
        disk may delay its durability for hours.
        """
        made: list[T] = []
        reason = "the job has failed: see the buffer's log"
        with self._changing():
            try:
                made.append(change())
            except RefusedError as error:
                reason = refusal.format(*error.args)
        if not made:
            raise UserError(reason)
        announce(made[0])
        self._changed()
        durable = asyncio.Event()
        self._ledger.state.store.when_durable(durable.set)
        await durable.wait()
        return made[0]


def fenced_name(name: Any) -> str:
    """The ledger's name of a role that an operator names. Raises UserError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError('want {"name": NAME} of a rollout server, or of the trainer')
    return TRAINER if name.startswith(f"{TRAINER}-") else name


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
    """Takes a name from the process that holds it: the next new process gets the name.

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

    def settle(error: Exception | None = None) -> None:
        if durable.done():  # cancelled by the time limit below
            return
        if error is None:
            durable.set_result(None)
        else:
            durable.set_exception(error)

    with contextlib.closing(open_store(config, on_error=settle, shard=shard)) as store:
        ledger = recover(
            LedgerSettings.from_config(config, shard),
            store,
            now_s=loop.time(),
            dataset=as_number(dataset_fingerprint(config)),
            ignoring=ignoring,
        )
        change(ledger)
        store.when_durable(settle)
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await durable
        except TimeoutError:
            raise ConfigError(
                store.write_blocked_reason or f"the ledger was not written within {_WRITE_TIMEOUT_S:g} s"
            ) from None
