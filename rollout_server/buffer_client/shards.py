"""The server's connections to all buffers (`buffer.num_shards`), for everybody else one.

Each buffer is a world of its own: it leases by its own budget, knows the server's state and weights from its own heartbeats, and gets back
the samples that it has leased. What has to be shared is the room for samples, and it is shared out evenly once and for all: shard i may
have floor or ceil of capacity / num_shards of them under way, so that what is granted by buffers that know nothing of one another never
exceeds what there is. The price is room that stays empty while one of them is away; but then its part of the step is missing too. (A
ticket larger than a share still comes whole to a server that holds nothing of that shard, as with one buffer.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from areal_like.config import Config
from areal_like.runtime.daemon import cancelled_on_exit
from areal_like.runtime.waits import PendingWaits
from areal_like.shards import Shard, all_shards
from areal_like.wire.messages.hello import Hello
from areal_like.wire.messages.producer import Lease, ServerState
from rollout_server.buffer_client.client import BufferLink
from rollout_server.buffer_client.lease_desk import Answer, LeaseDesk


class BufferLinks:
    """A `BufferLink` and a `LeaseDesk` for each shard. Create it in its event loop; `run` is the task that keeps them."""

    def __init__(
        self,
        config: Config,
        *,
        capacity_samples: int,
        hello: Callable[[], Hello],
        waits: PendingWaits,
        on_leases: Callable[[list[Lease]], None],
        on_abort: Callable[[list[int]], None],
    ) -> None:
        """`capacity_samples`: room of the whole server. The others are as of `BufferLink`."""
        self._count = config.buffer.num_shards
        self._desks = [
            LeaseDesk(capacity_samples=shard.share(capacity_samples)) for shard in all_shards(self._count)
        ]
        self._links = [
            BufferLink(
                config, shard, hello=hello, desk=desk, waits=waits, on_leases=on_leases, on_abort=on_abort
            )
            for shard, desk in zip(all_shards(self._count), self._desks, strict=True)
        ]

    @property
    def state(self) -> ServerState:
        """What was announced last."""
        return self._links[0].state

    @property
    def problem(self) -> str:
        """Why a buffer cannot be used now; empty if all can."""
        return "; ".join(filter(None, (link.problem for link in self._links)))

    @property
    def newest_version(self) -> int:
        """Newest version that all buffers know of, as far as we heard."""
        return min(link.newest_version for link in self._links)

    @property
    def num_refused(self) -> dict[str, int]:
        """Samples that were not wanted, by reason."""
        reasons = sorted({reason for link in self._links for reason in link.num_refused})
        return {reason: sum(link.num_refused.get(reason, 0) for link in self._links) for reason in reasons}

    @property
    def lease_ids(self) -> list[int]:
        """Leases that are worked on, or whose samples are not acknowledged."""
        return [lease_id for desk in self._desks for lease_id in desk.lease_ids]

    @property
    def holding_samples(self) -> int:
        """Samples of received leases that are not finished."""
        return sum(desk.holding_samples for desk in self._desks)

    @property
    def num_unacknowledged(self) -> int:
        """Answers that no buffer has confirmed."""
        return sum(desk.num_unacknowledged for desk in self._desks)

    async def run(self) -> None:
        """Registers everywhere, and beats for ever. Raises what any link raises."""
        tasks = [
            asyncio.create_task(link.run(), name=f"link {index}") for index, link in enumerate(self._links)
        ]
        async with cancelled_on_exit(*tasks):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    def announce(self, *, state: ServerState | None = None, weights_version: int | None = None) -> None:
        """State or version changed: every buffer hears of it."""
        for link in self._links:
            link.announce(state=state, weights_version=weights_version)

    def tell(self, stats: dict[str, float]) -> None:
        """Goes out with every heartbeat from now on."""
        for link in self._links:
            link.stats = stats

    def deliver(self, answer: Answer) -> None:
        """A finished or failed sample, to the buffer that leased it."""
        self._links[Shard.of(answer.lease_id, count=self._count).index].deliver(answer)

    def give_back(self, *, reason: str) -> list[int]:
        """Returns every lease with an unfinished sample; says which."""
        return [lease_id for link in self._links for lease_id in link.give_back(reason=reason)]

    async def leave(self) -> None:
        """Last words of a server that drains, to all at once."""
        await asyncio.gather(*(link.leave() for link in self._links))

    def close(self) -> None:
        """Closes the sockets."""
        for link in self._links:
            link.close()
