"""A rollout server without a model, as a process: it sends synthetic trajectories of the newest version.

`python -m tests.support.fake_producer ADDRESS NAME CAPACITY SECONDS_PER_SAMPLE DATASET`. Runs until it is
killed or the buffer ends the job.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import Any

from areal_like.errors import ArealError
from areal_like.runtime.process import die_with_parent
from areal_like.wire.channel import Link
from areal_like.wire.messages.hello import Drain, Goodbye, Hello, HelloRequired, JobFailed, JobFinished, Role
from areal_like.wire.messages.producer import (
    AbortLeases,
    HeartbeatAck,
    Lease,
    Leases,
    SampleAcks,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from tests.support.ledger_simulation import done
from tests.support.waiting import HANG_LIMIT_S


def hello(name: str, **changes: Any) -> Hello:
    """The Hello of a rollout server for the job of `buffer_harness`."""
    fields = {
        "role": Role.ROLLOUT,
        "name": name,
        "process": secrets.token_hex(16),
        "job": "job",
        "model": "m",
        "tokenizer": "t",
        "dataset": "d",
        "http_address": "",
        "num_train_prompts": 500,
        "eval_sets": {"eval": 64},
    }
    return Hello(**(fields | changes))


class FakeProducer:
    """The server's side of the protocol, as far as tests need it."""

    def __init__(self, address: str, name: str, *, capacity: int, sample_s: float, dataset: str) -> None:
        self._link = Link(address, handler=self._on_message)
        self._hello = hello(name, dataset=dataset)
        self._capacity, self._sample_s = capacity, sample_s
        self._leases: dict[int, set[int]] = {}
        self._version = 0
        self._num_tokens = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = asyncio.Event()
        self._finished = False

    async def run(self) -> None:
        while not self._failed.is_set():
            try:
                await self._link.call(self._hello, timeout_s=HANG_LIMIT_S)
            except ArealError:
                return
            while not self._failed.is_set():
                self._beat()
                await asyncio.sleep(0.1)
        if self._finished:
            await self._link.call(Goodbye(), timeout_s=HANG_LIMIT_S)

    def _beat(self) -> None:
        holding = sum(map(len, self._leases.values()))
        self._link.send(
            ServerHeartbeat(
                state=ServerState.SERVING,
                free_samples=self._capacity - holding,
                holding_samples=holding,
                weights_version=self._version,
                leases=list(self._leases),
                stats={"tokens_generated": float(self._num_tokens), "busy_s": 3.0, "idle_s": 1.0},
            )
        )

    def _on_message(self, message: Any) -> None:
        match message:
            case Leases():
                for lease in message.leases:
                    self._leases[lease.lease_id] = set(lease.sample_indices)
                    for index in lease.sample_indices:
                        task = asyncio.create_task(self._generate(lease, index))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
            case AbortLeases():
                for lease_id in message.leases:
                    self._leases.pop(lease_id, None)
            case HeartbeatAck():
                if message.newest_version > self._version:
                    self._version = message.newest_version
                    self._beat()
            case SampleAcks():
                for ack in message.acks:
                    held = self._leases.get(ack.lease_id, set())
                    held.difference_update(ack.sample_indices)
                    if not held:
                        self._leases.pop(ack.lease_id, None)
            case JobFailed() | HelloRequired():
                self._failed.set()
            case JobFinished() | Drain():
                self._finished = True
                self._failed.set()

    async def _generate(self, lease: Lease, index: int) -> None:
        first = self._version
        await asyncio.sleep(self._sample_s * (1 + (lease.ticket_id + index) % 4))
        if lease.lease_id in self._leases:
            self._num_tokens += 2
            self._link.send(
                Samples(
                    samples=[done(lease, index, [first, self._version], reward=float(lease.prompt_index))]
                )
            )


async def main() -> None:
    address, name, capacity, sample_s, dataset = sys.argv[1:]
    await FakeProducer(address, name, capacity=int(capacity), sample_s=float(sample_s), dataset=dataset).run()


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main())
