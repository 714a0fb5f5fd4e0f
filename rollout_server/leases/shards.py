"""The server's clients for all buffers (`buffer.num_shards`), behind one interface.

The buffers are independent: each grants leases within its own budget, gets separate heartbeats with the
server's state and version, and receives the samples that it has leased. Only the server's capacity is shared.
It is split evenly and statically: each shard may lease floor or ceil of capacity / num_shards samples, so
that buffers never exceed the capacity without coordinating. The cost is unused capacity while a buffer is
down, but then its part of the step is missing too. (As with one buffer, a ticket with more samples than the
share is still leased as a whole to a server that holds no samples of that shard.)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from areal_like.config import Config
from areal_like.runtime.daemon import cancelled_on_exit
from areal_like.runtime.waits import PendingWaits
from areal_like.security.keyring import Keyring
from areal_like.shards import Shard, all_shards
from areal_like.wire.messages.hello import Hello
from areal_like.wire.messages.producer import Lease, ServerState
from rollout_server.leases.client import BufferClient
from rollout_server.leases.held_leases import HeldLeases, Place, SampleResult


class ShardedBufferClient:
    """A `BufferClient` for each shard. Create it in its event loop; `run` is its task."""

    def __init__(
        self,
        config: Config,
        *,
        engine_samples: int,
        max_episodes: int,
        hello: Callable[[], Hello],
        waits: PendingWaits,
        on_leases: Callable[[list[Lease]], None],
        on_abort: Callable[[list[int]], None],
        on_drain: Callable[[], None] = lambda: None,
        on_finished: Callable[[], None] = lambda: None,
        keyring: Keyring | None = None,
    ) -> None:
        """`engine_samples`, `max_episodes`: see `HeldLeases`; for the whole server. For other arguments see
        `BufferClient`."""
        self._num_shards = config.buffer.num_shards
        self._shards = shards = all_shards(self._num_shards)
        self._held = [
            HeldLeases(engine_samples=shard.share(engine_samples), max_episodes=shard.share(max_episodes))
            for shard in shards
        ]
        self._clients = [
            BufferClient(
                config,
                shard,
                hello=hello,
                held=held,
                waits=waits,
                on_leases=on_leases,
                on_abort=on_abort,
                on_drain=on_drain,
                on_finished=on_finished,
                keyring=keyring,
            )
            for shard, held in zip(shards, self._held, strict=True)
        ]

    @property
    def state(self) -> ServerState:
        """The most recently announced state."""
        return self._clients[0].state

    @property
    def problem(self) -> str:
        """Why buffers cannot be used now; empty if all can."""
        return "; ".join(filter(None, (client.problem for client in self._clients)))

    @property
    def newest_version(self) -> int:
        """Newest weights version that every buffer has reported."""
        return min(client.newest_version for client in self._clients)

    @property
    def num_refused(self) -> dict[str, int]:
        """Number of samples that were refused, by reason."""
        total = sum((client.num_refused for client in self._clients), Counter[str]())
        return dict(sorted(total.items()))

    @property
    def lease_ids(self) -> list[int]:
        """Leases with a missing or unacknowledged sample."""
        return [lease_id for held in self._held for lease_id in held.lease_ids]

    @property
    def holding_samples(self) -> int:
        """Number of missing samples of held leases."""
        return sum(held.holding_samples for held in self._held)

    @property
    def num_at(self) -> Counter[Place]:
        """Number of missing samples of held leases, by place."""
        return sum((held.num_at for held in self._held), Counter())

    @property
    def num_unacknowledged(self) -> int:
        """Number of results that their buffer has not confirmed."""
        return sum(held.num_unacknowledged for held in self._held)

    async def run(self) -> None:
        """Registers at every buffer, and sends heartbeats until cancelled. Raises like `BufferClient.run`."""
        tasks = [
            asyncio.create_task(client.run(), name=f"buffer {index}")
            for index, client in enumerate(self._clients)
        ]
        async with cancelled_on_exit(*tasks):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    def announce(self, *, state: ServerState | None = None, weights_version: int | None = None) -> None:
        """Changes the server's state or version at every buffer."""
        for client in self._clients:
            client.announce(state=state, weights_version=weights_version)

    def set_stats(self, stats: dict[str, float]) -> None:
        """Sends these statistics with every heartbeat from now on."""
        for client in self._clients:
            client.stats = stats

    def set_engine_samples(self, engine_samples: int) -> None:
        """Changes the server's limit of samples at the engine, at least one per shard; existing leases
        stay."""
        engine_samples = max(engine_samples, self._num_shards)
        for shard, held in zip(self._shards, self._held, strict=True):
            held.engine_samples = shard.share(engine_samples)

    def moved(self, lease_id: int, sample_index: int, place: Place) -> None:
        """Records that a sample left the engine or came back to it."""
        self._clients[Shard.of(lease_id, count=self._num_shards).index].moved(lease_id, sample_index, place)

    def deliver(self, result: SampleResult) -> None:
        """Sends a sample's result to the buffer that leased it."""
        self._clients[Shard.of(result.lease_id, count=self._num_shards).index].deliver(result)

    def give_back(self, *, reason: str) -> list[int]:
        """Returns every lease with a missing sample to its buffer; returns the ids of these leases."""
        return [lease_id for client in self._clients for lease_id in client.give_back(reason=reason)]

    async def leave(self) -> None:
        """Ends a drain at all buffers concurrently."""
        await asyncio.gather(*(client.leave() for client in self._clients))

    def close(self) -> None:
        """Closes the sockets."""
        for client in self._clients:
            client.close()
