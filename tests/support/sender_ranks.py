"""Ranks of a trainer that push to a real engine from several of them; the processes of `test_senders.py`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from areal_like.config import WeightsConfig
from areal_like.wire.messages.consumer import ServerEntry
from tests.support.full_state import gather_full_state
from tests.support.trainer_ranks import main
from tests.support.waiting import HANG_LIMIT_S
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import Policy
from trainer.weights.broadcaster import Broadcaster
from trainer.weights.senders import Senders
from trainer.weights.snapshot import BackgroundGather, BoundaryGather, GatheredBucket, Snapshot

BUCKET_BYTES = 1 << 12
DYING_RANK = 1


def server_at(address: str, *, version: int) -> ServerEntry:
    """The directory's entry of the test's server."""
    return ServerEntry(
        name="rollout-0",
        incarnation=1,
        weights_address=address,
        device="cpu",
        state="serving",
        weights_version=version,
    )


def broadcaster_of(senders: Senders, *, integrity: str = "sha256") -> Broadcaster:
    """Rank 0's."""
    config = WeightsConfig(push_deadline_s=HANG_LIMIT_S, integrity=integrity)  # type: ignore[arg-type]
    return Broadcaster(config, device="cpu", links=senders.links)


def train(policy: Policy) -> None:
    with torch.no_grad():
        for param in policy.parameters():
            local(param).mul_(1.01).add_(0.001)


def train_a_little(policy: Policy) -> None:
    """Changes few numbers, none of some buckets."""
    with torch.no_grad():
        for number, param in enumerate(policy.parameters()):
            if number % 3:
                local(param).view(-1)[::30].mul_(1.5)


def pushes(ranks: Ranks, out_dir: Path, path: str, address: str) -> None:
    """Pushes trained weights from one, two and all ranks, three times each, and writes those of every
    version.

    The first push sends all bytes, the second too, because every number has changed, and the third what
    differs.
    """
    policy = Policy.load(path, ranks, master_dtype=torch.float32)
    version = 0
    for gather in (BackgroundGather, BoundaryGather):
        for num_senders in (1, 2, ranks.world_size):
            snapshotter = gather(
                policy,
                ranks,
                bucket_bytes=BUCKET_BYTES,
                dtype="float32",
                senders=num_senders,
                delta="auto",
            )
            assert len(snapshotter.sender_ranks) == num_senders and snapshotter.sender_ranks[0] == 0
            assert len(snapshotter.buckets) % num_senders or num_senders < 3, "shares of different lengths"
            senders = Senders(snapshotter, ranks, ports=range(1))
            with asyncio.Runner() as runner:
                if ranks.rank == 0:
                    broadcaster = runner.run(_created(senders))
                for number in range(3):
                    version += 1
                    (train if number < 2 else train_a_little)(policy)
                    whole = {name: tensor.contiguous() for name, tensor in gather_full_state(policy)}
                    if (snapshot := snapshotter.take_snapshot()) is not None:
                        assert snapshot.acquire()
                        entry = server_at(address, version=version - 1)
                        push = broadcaster.push(snapshot, version=version, step=version, servers=[entry])
                        outcome = runner.run(push)
                        snapshot.release()
                        assert set(outcome.activated) == {"rollout-0"}, outcome.failed
                        sent, num_bytes = outcome.traffic, sum(each.num_bytes for each in snapshot.buckets)
                        is_small = number == 2
                        assert sent.whole_bytes == (0 if is_small else num_bytes)
                        assert (sent.num_compared > 0) == (number > 0)
                        assert not is_small or 0 < sent.delta_bytes < num_bytes / 5
                        save_file(whole, out_dir / f"{version}.safetensors", {"format": "pt"})
                    ranks.meet()
                if ranks.rank == 0:
                    assert broadcaster.num_sessions == 1 and broadcaster.num_senders == num_senders
                    runner.run(broadcaster.close())
            senders.close()
            snapshotter.close()


async def _created(senders: Senders) -> Broadcaster:
    return broadcaster_of(senders)


def death(ranks: Ranks, out_dir: Path, path: str, address: str, *, delta: str = "off") -> None:
    """Rank 1, a sender, dies in the middle of the second push. Rank 0 writes how the push ended."""
    policy = Policy.load(path, ranks, master_dtype=torch.float32)
    snapshotter = BackgroundGather(
        policy, ranks, bucket_bytes=BUCKET_BYTES, dtype="float32", senders=2, delta=delta
    )
    assert snapshotter.sender_ranks == (0, DYING_RANK)
    senders = Senders(snapshotter, ranks, ports=range(1))
    read = Snapshot.read

    def read_or_die(snapshot: Snapshot, index: int) -> GatheredBucket:
        # The bucket before the last was sent: the engine has it, and this one is the next.
        if ranks.rank == DYING_RANK and snapshot.number == 2 and index == snapshotter.share[2]:
            os._exit(0)
        return read(snapshot, index)

    Snapshot.read = read_or_die  # type: ignore[method-assign]
    done = out_dir / "done"
    with asyncio.Runner() as runner:
        if ranks.rank == 0:
            broadcaster = runner.run(_created(senders))
        for version in (1, 2):
            (train_a_little if delta == "auto" else train)(policy)
            whole = {name: tensor.contiguous() for name, tensor in gather_full_state(policy)}
            if ranks.rank == 0:
                save_file(whole, out_dir / f"{version}.safetensors", {"format": "pt"})
            if (snapshot := snapshotter.take_snapshot()) is not None:
                assert snapshot.acquire()
                entry = server_at(address, version=version - 1)
                started_s, had_base = time.monotonic(), snapshot.base_number == 1
                outcome = runner.run(
                    broadcaster.push(snapshot, version=version, step=version, servers=[entry])
                )
                snapshot.release()
                if version == 2:
                    report = {
                        "activated": sorted(outcome.activated),
                        "failed": outcome.failed,
                        "seconds": time.monotonic() - started_s,
                        "is_eligible": bool(broadcaster.eligible([entry])),
                        "had_base": had_base,
                    }
                    (out_dir / "report.json").write_text(json.dumps(report))
                    done.touch()
            if version == 1:
                ranks.meet()
        while not done.exists():  # rank 2, and rank 1 until it dies
            time.sleep(0.05)
    sys.stdout.flush()
    os._exit(0)  # a rank is gone, and with it the groups of the trainer


if __name__ == "__main__":
    main(pushes=pushes, death=death, death_in_delta=partial(death, delta="auto"))
