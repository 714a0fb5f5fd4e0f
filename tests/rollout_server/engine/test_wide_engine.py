"""A push to engines with several tensor-parallel ranks: each takes as many ranks of the weight group."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import torch

from areal_like.config import WeightsConfig
from areal_like.weights.buckets import Manifest
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.messages.consumer import ServerEntry
from areal_like.wire.messages.weights import (
    Alive,
    AskAlive,
    DissolveGroup,
    FormGroup,
    PushChecksums,
    PushWeights,
    ReadyToReceive,
    WeightsOk,
)
from tests.support import warm_start
from tests.support.launching import ROOT
from tests.support.snapshots import Held
from tests.support.waiting import HANG_LIMIT_S
from trainer.weights.broadcaster import Broadcaster

# One tensor-parallel rank, as SGLang's: it joins at rank_offset + its own rank, receives every bucket and
# prints its checksum.
RANK = """
import sys, torch
from areal_like.weights.weight_group import WeightGroup
from areal_like.weights.buckets import checksum
print("ready", flush=True)
address, port, rank, world_size, name = sys.stdin.readline().split()
port, rank, world_size = int(port), int(rank), int(world_size)
with WeightGroup.join(
    master_address=address, master_port=port, rank=rank, world_size=world_size, group_name=name, timeout_s=600
) as group:
    print("joined", flush=True)
    for num_bytes in map(int, sys.stdin.readline().split()):
        data = torch.empty(num_bytes, dtype=torch.uint8)
        group.broadcast(data)
        print(checksum(data), flush=True)
"""


class WideServer:
    """Answers on a rollout server's weight socket for an engine of `num_ranks` processes."""

    def __init__(self, name: str, *, num_ranks: int) -> None:
        self.name, self.num_ranks = name, num_ranks
        self.group_ranks: list[int] = []
        self.ranks = [
            warm_start.Popen(
                [sys.executable, "-c", RANK],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for _ in range(num_ranks)
        ]
        self.checksums: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.listener = Listener(host="127.0.0.1", port=0, handler=self.handle, max_message_bytes=1 << 20)
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def entry(self) -> ServerEntry:
        address = f"tcp://127.0.0.1:{self.listener.port}"
        return ServerEntry(
            name=self.name,
            incarnation=1,
            weights_address=address,
            device="cpu",
            state="serving",
            weights_version=0,
        )

    def handle(self, envelope: Envelope) -> None:
        if isinstance(envelope.message, PushChecksums):
            self.checksums.set_result(envelope.message.checksums)
            return
        task = asyncio.get_running_loop().create_task(self.answer(envelope))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self, envelope: Envelope) -> None:
        answer: Any = WeightsOk(version=0)
        match envelope.message:
            case AskAlive():
                answer = Alive(
                    version=0,
                    num_ranks=self.num_ranks,
                    device="cpu",
                    device_uuid="",
                    nccl_version="",
                    authenticates_store=False,
                )
            case FormGroup() as form:
                self.group_ranks = [form.rank + i for i in range(self.num_ranks)]
                for group_rank, process in zip(self.group_ranks, self.ranks, strict=True):
                    self.send_line(
                        process,
                        form.master_address,
                        form.master_port,
                        group_rank,
                        form.world_size,
                        form.group_name,
                    )
                assert await self.lines() == ["joined"] * self.num_ranks
            case PushWeights() as push:
                buckets = Manifest.from_dict(push.manifest).buckets
                for rank in self.ranks:
                    self.send_line(rank, *(bucket.num_bytes for bucket in buckets))
                self.listener.send(envelope.peer, ReadyToReceive(version=push.version))
                received = [await self.lines() for _ in buckets]
                assert received == [[str(checksum)] * self.num_ranks for checksum in await self.checksums]
                answer = WeightsOk(version=push.version)
            case DissolveGroup():
                pass
        self.listener.send(envelope.peer, answer, rid=envelope.rid)

    @staticmethod
    def send_line(process: subprocess.Popen[str], *words: object) -> None:
        assert process.stdin is not None
        process.stdin.write(" ".join(map(str, words)) + "\n")
        process.stdin.flush()

    async def lines(self) -> list[str]:
        """The next line of every rank."""
        streams = [rank.stdout for rank in self.ranks]
        return [
            (await asyncio.to_thread(stream.readline)).strip() for stream in streams if stream is not None
        ]

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()
        self.listener.close()


def test_engines_of_two_ranks_and_one_share_a_broadcast() -> None:
    async def body() -> None:
        broadcaster = Broadcaster(WeightsConfig(push_deadline_s=HANG_LIMIT_S), device="cpu")
        servers = [WideServer("wide", num_ranks=2), WideServer("plain", num_ranks=1)]
        for server in servers:
            assert await server.lines() == ["ready"] * server.num_ranks
        snapshot = Held({"a": torch.randn(300, 40), "b": torch.randn(7, 3)}, bucket_bytes=4096)
        outcome = await broadcaster.push(
            snapshot, version=5, step=1, servers=[server.entry for server in servers]
        )
        assert ({name: ok.version for name, ok in outcome.activated.items()}, outcome.failed) == (
            {"wide": 5, "plain": 5},
            {},
        )
        assert [server.group_ranks for server in servers] == [[1, 2], [3]]
        await broadcaster.close()
        for server in servers:
            server.close()

    asyncio.run(body())
