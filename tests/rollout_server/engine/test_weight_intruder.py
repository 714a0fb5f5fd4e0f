"""Pushes into a real engine while a stranger writes into the rendezvous or changes the bytes on the way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_like.config import WeightsConfig
from areal_like.errors import EngineError
from areal_like.weights.buckets import checksum
from areal_like.weights.integrity import sha256
from areal_like.wire.messages.consumer import ServerEntry
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.weights.shadow import ShadowWeightUpdate
from tests.areal_like.test_rendezvous import accepts, listening_addresses
from tests.support import engine_conformance as conformance
from tests.support.engine_harness import (
    Engine,
    Models,
    Pusher,
    error_of,
    form_group,
    load_model,
    sample,
    weights_of,
)
from tests.support.ports import free_ports
from tests.support.snapshots import Held
from tests.support.waiting import HANG_LIMIT_S
from trainer.weights.broadcaster import Broadcaster, PushOutcome
from trainer.weights.snapshot import GatheredBucket

PROMPT = conformance.PROMPT
HOST = "127.0.0.2"


class Server:
    """The weight receiver of a server whose engine is `client`."""

    def __init__(self, client: EngineClient, *, version: int, integrity: str) -> None:
        self.untrusted: list[str] = []
        self.receiver = WeightReceiver(
            host="127.0.0.1",
            max_message_bytes=1 << 20,
            strategy=ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=self.untrusted.append),
            on_version=lambda _: None,
            on_untrusted=self.untrusted.append,
            integrity=integrity,
        )
        self.receiver.set_engine(client, version=version)

    @property
    def entry(self) -> ServerEntry:
        return ServerEntry(
            name="one",
            incarnation=1,
            weights_address=f"tcp://127.0.0.1:{self.receiver.port}",
            device="cpu",
            state="serving",
            weights_version=self.receiver.version,
        )


class Trainer:
    """Pushes snapshots to one server."""

    def __init__(self, server: Server, **settings: Any) -> None:
        self.server = server
        self.broadcaster = Broadcaster(WeightsConfig(push_deadline_s=20, host=HOST, **settings), device="cpu")

    async def push(self, snapshot: Held, *, version: int) -> PushOutcome:
        """Waits for the end of the server's back-off and pushes."""
        while not self.broadcaster.eligible([self.server.entry]):
            await asyncio.sleep(0.1)
        return await self.broadcaster.push(
            snapshot, version=version, step=version, servers=[self.server.entry]
        )


@asynccontextmanager
async def a_job(engine: Engine, **settings: Any) -> AsyncIterator[tuple[Trainer, EngineClient, int]]:
    """(trainer, client, version that is active)."""
    async with engine.client() as client:
        await client.fetch_info()
        version = await client.weight_version()
        server = Server(client, version=version, integrity=settings.get("integrity", "none"))
        trainer = Trainer(server, **settings)
        try:
            yield trainer, client, version
        finally:
            await trainer.broadcaster.close()
            await server.receiver.close()
            assert not server.untrusted


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def overwrite(store: Any, keys: list[str]) -> None:
    """Replaces values, after 160 MB of other keys."""
    filler = bytes(4 << 20)
    for number in range(40):
        store.set(f"filler-{number}", filler)
    assert store.num_keys() > 40
    for key in keys:
        store.set(key, b"")


def delete(store: Any, keys: list[str]) -> None:
    for key in keys:
        assert store.delete_key(key)


def attack_store(port: int, attack: Callable[[Any, list[str]], None]) -> None:
    """Waits until rank 0 has written its key, then attacks."""
    while not accepts(HOST, port):
        time.sleep(0.01)
    stores: Any = dist
    store = stores.TCPStore(HOST, port, None, False, timedelta(seconds=HANG_LIMIT_S), wait_for_workers=False)
    while not (keys := store.list_keys()):
        time.sleep(0.01)
    attack(store, keys)


def snapshot_of(path: Path) -> Held:
    return Held(weights_of(path), bucket_bytes=1 << 14)


async def check_weights(client: EngineClient, path: Path, *, version: int) -> None:
    generation = await sample(client, PROMPT, 20)
    assert set(generation.versions.tolist()) == {version}
    assert error_of(load_model(path), PROMPT, generation) < conformance.TOLERANCE


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (overwrite, "changed its rendezvous"),
        pytest.param(delete, "could not connect|was not done within 5 s", marks=pytest.mark.chaos),
    ],
)
def test_an_intruder_in_the_store_at_worst_fails_a_push(
    engine: Engine, models: Models, attack: Callable[[Any, list[str]], None], reason: str
) -> None:
    """A push that it blocks ends at its time limit, and the next one uses another session.

    Long, because gloo notices a deleted key only at that limit.
    """

    async def body() -> None:
        ports = free_ports(HOST, 1)
        async with a_job(engine, port_range=f"{ports[0]}-{ports[0]}") as (trainer, client, version):
            assert (await trainer.push(snapshot_of(models[0]), version=version + 1)).activated
            assert not accepts(HOST, ports[0]), "a store is open only while a group is formed"
            # Another session, whose rendezvous waits for the engine while the intruder writes.
            await trainer.broadcaster.push(snapshot_of(models[0]), version=0, step=0, servers=[])
            with stopped(engine.pid):
                pushing = asyncio.create_task(trainer.push(snapshot_of(models[1]), version=version + 2))
                attacking = asyncio.create_task(asyncio.to_thread(attack_store, ports[0], attack))
                await asyncio.wait({attacking, pushing}, return_when=asyncio.FIRST_COMPLETED)
                assert listening_addresses(ports[0]) == [HOST]
                await attacking
            outcome = await pushing
            assert not outcome.activated and re.search(reason, outcome.failed["one"])
            assert not accepts(HOST, ports[0]), "and what was written is gone with the store"
            await check_weights(client, models[0], version=version + 1)
            assert (await trainer.push(snapshot_of(models[1]), version=version + 3)).activated
            await check_weights(client, models[1], version=version + 3)

    asyncio.run(body())


class ForgedBucket(GatheredBucket):
    """Other bytes than the sender's digest says. The checksum is that of the forged bytes, as an attacker
    can make it (`test_checksums_can_be_forged`)."""

    def __init__(self, data: torch.Tensor) -> None:
        forged = data.clone()
        forged[0] ^= 1
        super().__init__(forged)
        self.digest = sha256(data)


class ForgedSnapshot(Held):
    """Bucket 1 is forged."""

    def read(self, index: int) -> GatheredBucket:
        bucket = super().read(index)
        return ForgedBucket(bucket.data) if index == 1 else bucket


@pytest.mark.parametrize("integrity", ["sha256", "none"])
def test_forged_bytes_are_found_by_their_digest(engine: Engine, models: Models, integrity: str) -> None:
    async def body() -> None:
        async with a_job(engine, integrity=integrity) as (trainer, client, version):
            assert (await trainer.push(snapshot_of(models[0]), version=version + 1)).activated
            forged = ForgedSnapshot(weights_of(models[1]), bucket_bytes=1 << 14)
            outcome = await trainer.push(forged, version=version + 2)
            if integrity == "none":
                assert outcome.activated, "checksums alone do not find it"
            else:
                reason = f"version {version + 2}: bucket 1 of {len(forged.buckets)}: the SHA-256 is wrong"
                assert not outcome.activated and reason in outcome.failed["one"]
                await check_weights(client, models[0], version=version + 1)
            assert (await trainer.push(snapshot_of(models[1]), version=version + 3)).activated
            await check_weights(client, models[1], version=version + 3)

    asyncio.run(body())


def test_checksums_can_be_forged() -> None:
    flat = torch.zeros(1 << 20, dtype=torch.uint8)
    forged = flat.clone()
    words = forged.view(torch.int64)
    words[0], words[128] = 5, -5  # two words of one lane in one block
    assert checksum(forged) == checksum(flat) and sha256(forged) != sha256(flat)


def test_a_silent_store_holds_no_join_longer_than_its_limit(engine: Engine, models: Models) -> None:
    """torch waits without a time limit for a store that accepts the connection and never replies."""

    async def body() -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as silent:
            async with engine.client() as client:
                with pytest.raises(EngineError, match="timed out after 1 s"):
                    port = silent.getsockname()[1]
                    await client.init_weights_group(form_group("silent", port=port, timeout_s=1.0))
                version = await client.weight_version()
                async with Pusher(engine, client) as pusher:
                    await pusher.push(weights_of(models[0]), version=version + 1)

    asyncio.run(body())


def test_joining_a_group_leaves_the_one_before(engine: Engine, models: Models) -> None:
    async def body() -> None:
        async with engine.client() as client:
            first = Pusher(engine, client, name="first")
            await first.__aenter__()
            async with Pusher(engine, client, name="second") as second:
                await second.push(weights_of(models[0]), version=await client.weight_version() + 1)
                with pytest.raises(EngineError, match="'first' does not exist"):
                    await client.destroy_weights_group(group_name="first")
            assert first.group is not None
            first.group.close()

    asyncio.run(body())
