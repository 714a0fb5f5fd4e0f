"""Both ends of adapter pushes: a trainer's broadcaster, and a server's receiver without the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from areal_like.config import WeightsConfig
from areal_like.wire.channel import tcp_address
from areal_like.wire.messages.consumer import ServerEntry
from rollout_server.policy.client import EngineClient
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.weights.strategy import WeightUpdateStrategy
from tests.support.adapters import PeftAdapter
from tests.support.snapshots import Held
from tests.support.waiting import HANG_LIMIT_S
from trainer.weights.broadcaster import Broadcaster, PushOutcome
from trainer.weights.snapshot import GatheredBucket

BUCKET_BYTES = 4096


class Spoiled(Held):
    """A snapshot of which one bucket is changed on its way, or calls `on_read` instead of being read."""

    def __init__(
        self,
        adapter: PeftAdapter,
        *,
        changes: str = "",
        on_read: Callable[[], None] | None = None,
    ) -> None:
        """`changes`: `bytes` alone, or `bytes and checksum`: then only the digest can tell."""
        super().__init__(adapter.tensors, bucket_bytes=BUCKET_BYTES, adapter=adapter.header)
        assert len(self.buckets) > 2
        self.changes, self.on_read = changes, on_read

    def read(self, index: int) -> GatheredBucket:
        bucket = super().read(index)
        if index == 1 and self.on_read is not None:
            self.on_read()
        if index == 1 and self.changes:
            digest, stated = bucket.digest, bucket.checksum
            data = bucket.data.clone()
            data[4] ^= 1
            bucket = GatheredBucket(data, known_checksum=stated if self.changes == "bytes" else None)
            bucket.digest = digest
        return bucket


def held(adapter: PeftAdapter) -> Held:
    """The snapshot of an adapter."""
    return Held(adapter.tensors, bucket_bytes=BUCKET_BYTES, adapter=adapter.header)


@dataclass
class Server:
    """One server's end."""

    client: EngineClient
    receiver: WeightReceiver
    name: str = "rollout-0"
    versions: list[int] = field(default_factory=list)

    @property
    def entry(self) -> ServerEntry:
        return ServerEntry(
            name=self.name,
            incarnation=1,
            device="cpu",
            state="serving",
            weights_address=tcp_address("127.0.0.1", self.receiver.port),
            weights_version=self.receiver.version,
        )


@asynccontextmanager
async def serving(
    client: EngineClient, strategy: WeightUpdateStrategy, *, base: str, name: str = "rollout-0"
) -> AsyncIterator[Server]:
    """A receiver of adapters of the base model with this digest."""
    await client.fetch_info()
    await strategy.engine_started(client, path="", version=0)
    versions: list[int] = []
    receiver = WeightReceiver(
        host="127.0.0.1",
        max_message_bytes=1 << 20,
        strategy=strategy,
        on_version=versions.append,
        on_untrusted=versions.clear,  # type: ignore[arg-type]
        base=base,
    )
    receiver.set_engine(client, version=0)
    try:
        yield Server(client, receiver, name, versions)
    finally:
        await receiver.close()


@asynccontextmanager
async def pushing(**settings: object) -> AsyncIterator[Broadcaster]:
    """A broadcaster; everything below it has to end in time."""
    config = WeightsConfig(**{"push_deadline_s": HANG_LIMIT_S, "integrity": "sha256", **settings})  # type: ignore[arg-type]
    broadcaster = Broadcaster(config, device="cpu")
    async with asyncio.timeout(HANG_LIMIT_S):
        yield broadcaster
        await broadcaster.close()


async def push(broadcaster: Broadcaster, snapshot: Held, *servers: Server, version: int) -> PushOutcome:
    """Pushes to the servers, whose backoff from earlier failures is over."""
    return await broadcaster.push(
        snapshot, version=version, step=version, servers=[server.entry for server in servers]
    )
