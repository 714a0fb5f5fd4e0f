"""A buffer with keys, as a process: what each key may do, and a key that is revoked or renewed meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from areal_like.errors import DeadlineError, RefusedError
from areal_like.security.administration import add_key, revoke_key, rotate_keys
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyDirectory, KeyRole
from areal_like.wire.channel import Link
from areal_like.wire.fingerprint import dataset_fingerprint
from areal_like.wire.messages.consumer import Directory, GetRunCounters, RunCounters, StartTraining
from areal_like.wire.messages.hello import Hello, Refused, Welcome
from areal_like.wire.messages.producer import HeartbeatAck, Leases
from buffer.service.peers import PeerKeys
from tests.support import warm_start
from tests.support.buffer_harness import (
    ROOT,
    BufferProcess,
    FakeTrainer,
    lie_until_refused,
    running_buffer,
    trainer_hello,
    wait_for_hello_required,
)
from tests.support.fake_producer import hello as server_hello
from tests.support.keys import keyed_link, keyring, new_keys
from tests.support.ledger_simulation import heartbeat
from tests.support.quick import only_in_chaos
from tests.support.waiting import HANG_LIMIT_S


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = new_keys(tmp_path / "keys")
    add_key(path, "gpu-7", KeyRole.ROLLOUT)
    return path


@pytest.fixture
def buffer(tmp_path: Path, keys: Path) -> Iterator[BufferProcess]:
    with running_buffer(tmp_path, security={"keys": str(keys)}) as process:
        yield process


class Peer:
    """A connection with a key, whose keyring the test refreshes."""

    def __init__(self, link: Link, ring: Keyring, inbox: list[Any]) -> None:
        self.link, self.ring, self.inbox = link, ring, inbox

    async def beat(self, *, free: int = 8, leases: tuple[int, ...] = ()) -> Any:
        """Sends a server's heartbeat and returns the reply."""
        return await self.link.call(heartbeat(free=free, leases=leases), timeout_s=HANG_LIMIT_S)

    def received(self, kind: type) -> list[Any]:
        return [message for message in self.inbox if isinstance(message, kind)]


@asynccontextmanager
async def connected(
    buffer: BufferProcess, path: Path, role: KeyRole, *, name: str = "", hello: Hello | None = None
) -> AsyncIterator[Peer]:
    """A connection of this key, registered if there is a `hello`."""
    inbox: list[Any] = []
    ring = keyring(path, role, name=name)
    link = keyed_link(buffer.address, ring, handler=inbox.append)
    try:
        if hello is not None:
            assert isinstance(await link.call(hello, timeout_s=HANG_LIMIT_S), Welcome)
        yield Peer(link, ring, inbox)
    finally:
        link.close()


def server(buffer: BufferProcess, name: str = "rollout-0", **changes: Any) -> Hello:
    return server_hello(name, dataset=dataset_fingerprint(buffer.config), **changes)


async def refused(link: Link, message: Any) -> str:
    """The field and reason with which a request is refused."""
    with pytest.raises(RefusedError) as error:
        await link.call(message, timeout_s=HANG_LIMIT_S)
    return str(error.value)


async def until(condition: Callable[[], object], *, timeout_s: float = HANG_LIMIT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_key_acts_only_in_its_role(buffer: BufferProcess, keys: Path) -> None:
    async def body() -> None:
        async with connected(buffer, keys, KeyRole.ROLLOUT) as thief:
            # With the incarnation that /status shows, as an attacker would.
            forged = trainer_hello(buffer.config, rank=77, name="trainer-77")
            assert "key role" in await refused(thief.link, forged)
            reason = await refused(thief.link, trainer_hello(buffer.config))
            assert "rollout of role rollout is not a trainer's" in reason
        async with connected(buffer, keys, KeyRole.TRAINER) as trainer:
            assert "key role" in await refused(trainer.link, server(buffer))
            welcome = await trainer.link.call(trainer_hello(buffer.config), timeout_s=HANG_LIMIT_S)
            assert isinstance(welcome, Welcome)
            await trainer.link.call(StartTraining(step=0), timeout_s=HANG_LIMIT_S)
            counters = await trainer.link.call(GetRunCounters(), timeout_s=HANG_LIMIT_S)
            assert isinstance(counters, RunCounters)
        status = buffer.status()
        assert status["refused_frames"] == 3 and status["refused_handshakes"] == 0
        assert [peer["name"] for peer in status["peers"]] == ["trainer-0"]
        buffer.wait_status(lambda _: "areal_refused_frames_total 3.0" in buffer.get("/metrics"))

    asyncio.run(body())


def test_operators_and_strangers_do_not_connect(buffer: BufferProcess, keys: Path, tmp_path: Path) -> None:
    async def body() -> None:
        links = [
            keyed_link(buffer.address, None),
            keyed_link(buffer.address, keyring(keys, KeyRole.OPERATOR)),
            keyed_link(buffer.address, keyring(new_keys(tmp_path / "other"), KeyRole.TRAINER)),
        ]
        calls = (link.call(trainer_hello(buffer.config), timeout_s=1) for link in links)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [DeadlineError] * 3
        async with connected(buffer, keys, KeyRole.ROLLOUT, hello=server(buffer)) as good:
            assert isinstance(await good.beat(), HeartbeatAck)
        status = buffer.wait_status(lambda status: status["refused_handshakes"] >= 3)
        assert status["bad_frames"] == 0
        for link in links:
            link.close()

    asyncio.run(body())


def test_a_message_with_another_key_is_refused(buffer: BufferProcess, keys: Path) -> None:
    """Also one that a process with another key sends under the routing id of a registered peer."""

    async def body() -> None:
        async with connected(buffer, keys, KeyRole.ROLLOUT, hello=server(buffer)) as good:
            route = good.link._routing_id
            assert isinstance(await good.beat(), HeartbeatAck)
        async with connected(buffer, keys, KeyRole.ROLLOUT, name="gpu-7") as thief:
            thief.link._routing_id = route
            thief.link._reopen()
            with pytest.raises(RefusedError, match="rollout-0 registered with the key rollout, not gpu-7"):
                await thief.beat()
            # Nor does it get the name by registering.
            assert "key name" in await refused(thief.link, server(buffer))
        assert buffer.status()["refused_frames"] == 2

    asyncio.run(body())


def test_a_name_belongs_to_the_key_that_registered_it(buffer: BufferProcess, keys: Path) -> None:
    async def body() -> None:
        async with connected(buffer, keys, KeyRole.ROLLOUT, hello=server(buffer)) as owner:
            await owner.beat()
        async with connected(buffer, keys, KeyRole.ROLLOUT, name="gpu-7") as other:
            reason = await refused(other.link, server(buffer))
            assert "rollout-0 was registered with the key rollout, not gpu-7" in reason
            assert isinstance(await other.link.call(server(buffer, "gpu-7"), timeout_s=HANG_LIMIT_S), Welcome)
            # The name is free again when its key is not valid any more.
            revoke_key(keys, "rollout")
            await until(lambda: all(peer["key"] == "gpu-7" for peer in buffer.status()["peers"]))
            hello = server(buffer)
            assert isinstance(await other.link.call(hello, timeout_s=HANG_LIMIT_S), Welcome)

    asyncio.run(body())


def test_a_refused_server_says_hello_again(buffer: BufferProcess, keys: Path) -> None:
    """The job goes on, and the refused server's key does not count as a wrong one."""

    async def body() -> None:
        again = server(buffer, "gpu-7")
        async with (
            connected(buffer, keys, KeyRole.TRAINER, hello=trainer_hello(buffer.config)) as rank,
            connected(buffer, keys, KeyRole.ROLLOUT, hello=server(buffer)) as good,
            connected(buffer, keys, KeyRole.ROLLOUT, name="gpu-7", hello=again) as bad,
        ):
            assert "refused for good" in await lie_until_refused(bad.link)
            assert "conduct" in await refused(bad.link, again)
            bad.link.send(heartbeat(free=8))
            await wait_for_hello_required(bad.inbox)
            await until(
                lambda: [entry.name for entry in rank.received(Directory)[-1].servers] == ["rollout-0"]
            )
            assert isinstance(await good.beat(), HeartbeatAck)
            assert "conduct" in await refused(bad.link, again)
        status = buffer.status()
        assert "gpu-7" not in [peer["name"] for peer in status["peers"]]
        assert status["refused_frames"] == 0

    asyncio.run(body())


def test_a_revoked_server_is_out_within_5_s(buffer: BufferProcess, keys: Path) -> None:
    async def body() -> None:
        async with (
            connected(buffer, keys, KeyRole.TRAINER, hello=trainer_hello(buffer.config)) as rank,
            connected(buffer, keys, KeyRole.ROLLOUT, hello=server(buffer)) as good,
            connected(buffer, keys, KeyRole.ROLLOUT, name="gpu-7", hello=server(buffer, "gpu-7")) as bad,
        ):
            trainer = FakeTrainer(buffer.config, rank.link)
            await trainer.call(StartTraining(step=0))
            await bad.beat()
            await until(lambda: bad.received(Leases))
            leases = tuple(lease.lease_id for message in bad.received(Leases) for lease in message.leases)
            await good.beat(free=0)
            (entry,) = [entry for entry in rank.received(Directory)[-1].servers if entry.name == "gpu-7"]
            assert entry.public_key == bad.ring.identity.public, "attested by the connection, not the hello"
            revoke_key(keys, "gpu-7")
            # It goes on as if nothing had happened, on the connection that it has.
            while not bad.received(Refused):
                bad.link.send(heartbeat(free=8, leases=leases))
                await asyncio.sleep(0.1)
            (refusal,) = set(bad.received(Refused))
            assert refusal.field == "key"
            status = buffer.wait_status(lambda status: "gpu-7" not in str(status["peers"]))
            assert status["refused_frames"] >= 1
            assert status["counters"]["leases_lost"] == len(leases)
            # The same tickets go to the other server.
            await good.beat()
            await until(lambda: good.received(Leases))
            assert isinstance(await trainer.call(GetRunCounters()), RunCounters)
            assert [entry.name for entry in rank.received(Directory)[-1].servers] == ["rollout-0"]

    asyncio.run(body())


def test_a_renewed_key_keeps_name_and_leases(buffer: BufferProcess, keys: Path) -> None:
    async def body() -> None:
        rank_hello = trainer_hello(buffer.config)
        async with (
            connected(buffer, keys, KeyRole.TRAINER, hello=rank_hello) as rank,
            connected(buffer, keys, KeyRole.ROLLOUT, hello=server(buffer)) as good,
        ):
            await rank.link.call(StartTraining(step=0), timeout_s=HANG_LIMIT_S)
            await good.beat()
            await until(lambda: good.received(Leases))
            leases = tuple(lease.lease_id for message in good.received(Leases) for lease in message.leases)
            rotate_keys(keys, grace_s=600)
            new = KeyDirectory(keys).identity("rollout").public

            def has_new_key() -> bool:
                rank.ring.refresh()
                good.ring.refresh()
                return any(entry.public_key == new for entry in rank.received(Directory)[-1].servers)

            async with asyncio.timeout(HANG_LIMIT_S):
                while not has_new_key():
                    assert isinstance(await good.beat(free=0, leases=leases), HeartbeatAck)
                    # As a rank does after it has connected again: it may have missed a directory.
                    await rank.link.call(rank_hello, timeout_s=HANG_LIMIT_S)
                    await asyncio.sleep(0.2)
            status = buffer.status()
            assert status["counters"]["leases_lost"] == 0 and status["refused_frames"] == 0
            assert not good.received(Refused)

    asyncio.run(body())


def test_a_peer_with_an_expired_key_gets_nothing_more(buffer: BufferProcess, keys: Path) -> None:
    """A renewed key keeps its name, so whoever has the old one would stay registered as a trainer."""

    async def body() -> None:
        async with (
            connected(buffer, keys, KeyRole.TRAINER, hello=trainer_hello(buffer.config)) as thief,
            connected(buffer, keys, KeyRole.ROLLOUT, hello=server(buffer)) as good,
        ):
            await until(lambda: [len(each.servers) for each in thief.received(Directory)][-1:] == [1])
            rotate_keys(keys, "trainer", grace_s=0)
            num_received = len(thief.received(Directory))
            buffer.wait_status(lambda status: "trainer" not in str(status["peers"]))
            await good.beat(free=0)
            async with connected(buffer, keys, KeyRole.TRAINER, hello=trainer_hello(buffer.config)) as rank:
                await until(lambda: rank.received(Directory))
            thief.link.resend_pending()
            assert len(thief.received(Directory)) == num_received

    asyncio.run(body())


def test_a_key_revoked_while_its_peer_waits_gets_no_name(keys: Path) -> None:
    ring = keyring(keys, KeyRole.ROLLOUT)
    peer_keys = PeerKeys(ring)
    key = ring.sender(ring.identity.public)
    peer_keys.check_hello(server_hello("rollout-0"), key)
    revoke_key(keys, "rollout")
    ring.refresh()
    with pytest.raises(RefusedError, match="is revoked"):
        peer_keys.check_hello(server_hello("rollout-0"), key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["buffer.host=0.0.0.0"], "buffer.host=0.0.0.0 is not a loopback address"),
        (["security.keys=KEYS/nowhere"], "make the keys with `areal-like keys init"),
        *only_in_chaos(
            (["buffer.host=*"], "buffer.host=* is not a loopback address"),
            (["security.keys=KEYS", "security.identity=trainer"], "this daemon needs one of role buffer"),
        ),
    ],
)
def test_a_buffer_that_may_not_start(settings: list[str], message: str, keys: Path, tmp_path: Path) -> None:
    words = [setting.replace("KEYS", str(keys)) for setting in settings]
    ended = warm_start.run(
        [sys.executable, "-m", "buffer", f"runs_dir={tmp_path}/runs", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    assert message in ended.stderr


def test_insecure_allows_an_open_address(tmp_path: Path) -> None:
    with running_buffer(tmp_path, buffer={"host": "0.0.0.0"}, security={"insecure": True}) as process:
        assert process.status()["peers"] == []
