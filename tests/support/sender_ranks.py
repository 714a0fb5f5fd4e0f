"""Ranks of a trainer that push to a real engine from several of them; the processes of `test_senders.py`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from areal_like.config import WeightsConfig
from areal_like.errors import ArealError, WeightSyncError
from areal_like.wire.messages.consumer import ServerEntry, VersionGranted
from tests.support.full_state import gather_full_state
from tests.support.trainer_ranks import main
from tests.support.waiting import HANG_LIMIT_S
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import Policy
from trainer.weights import snapshot as snapshot_module
from trainer.weights.broadcaster import Broadcaster
from trainer.weights.publisher import Publisher, PushReport
from trainer.weights.senders import Senders
from trainer.weights.snapshot import (
    BackgroundGather,
    BoundaryGather,
    GatheredBucket,
    Snapshot,
    WeightSnapshotter,
)

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
                local(param).view(-1)[::30].neg_()


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


STEPS, WAITED = 6, (1, 3, 6)
"""Steps of each combination, and those after which the trainer waits until the engine has their weights."""
FAILED_STEP = 3


def combinations(_: Ranks, out_dir: Path, path: str, address: str) -> None:
    """One and two replicas, senders and copies in memory, and both ways to gather, with a publisher in a
    thread while the ranks train. In each combination a push fails once in the last sender, and some are
    skipped or hold up a snapshot. Rank 0 writes the weights of every step, and the versions that were
    activated."""
    snapshot_module._RELEASE_WAIT_S = 0.02
    versions, activated, step = itertools.count(1), dict[int, int](), 0
    with background_loop() as run:
        for num_replicas in (1, 2):
            ranks = Ranks(replicas=num_replicas)
            policy = Policy.load(path, ranks, master_dtype=torch.float32)
            for gather, num_senders, num_copies in itertools.product(
                (BackgroundGather, BoundaryGather), (1, 2), (1, 2)
            ):
                snapshotter = gather(
                    policy, ranks, bucket_bytes=BUCKET_BYTES, dtype="float32", senders=num_senders
                )
                snapshotter.num_snapshots = num_copies
                pushing = Pushing(snapshotter, ranks, run, address, versions, activated)
                for number in range(1, STEPS + 1):
                    step += 1
                    train(policy)
                    whole = {name: tensor.contiguous() for name, tensor in gather_full_state(policy)}
                    snapshot = snapshotter.take_snapshot()
                    assert (snapshot is not None) == (ranks.rank == 0)
                    if snapshot is not None:
                        save_file(whole, out_dir / f"step-{step}.safetensors", {"format": "pt"})
                        pushing.offer(step, snapshot, waits=number in WAITED)
                pushing.close()
                assert snapshotter._num_taken == STEPS
                assert bool(snapshotter.num_bytes) == (ranks.replica == 0) or gather is BoundaryGather
    if ranks.rank == 0:
        (out_dir / "activated.json").write_text(json.dumps(activated))


class Pushing:
    """The trainer's part in pushes, of one snapshotter; on rank 0 with a publisher."""

    def __init__(
        self,
        snapshotter: WeightSnapshotter,
        ranks: Ranks,
        run: Callable[[Coroutine[Any, Any, Any]], Any],
        address: str,
        versions: Iterator[int],
        activated: dict[int, int],
    ) -> None:
        """`run`: runs a coroutine in another thread. `activated`: gets version -> step."""
        self._snapshotter, self._run, self._address = snapshotter, run, address
        self._versions, self._activated = versions, activated
        self._senders = Senders(snapshotter, ranks, ports=range(1))
        self._reports: list[PushReport] = []
        self._publisher: Publisher | None = None
        if ranks.rank == 0:
            self._run(self._begin())
        if ranks.rank == snapshotter.sender_ranks[-1]:
            self._fail_once(FAILED_STEP, snapshotter.share[-1])

    def _fail_once(self, number: int, index: int) -> None:
        gathered, has_failed = self._snapshotter.gathered, False

        def failing(snapshot: Snapshot, at: int) -> GatheredBucket:
            nonlocal has_failed
            if (snapshot.number, at, has_failed) == (number, index, False):
                has_failed = True
                raise WeightSyncError("a bucket cannot be read")
            return gathered(snapshot, at)

        self._snapshotter.gathered = failing  # type: ignore[method-assign]

    async def _begin(self) -> None:
        async def granted(_: Any, *, timeout_s: float) -> VersionGranted:
            return VersionGranted(version=next(self._versions))

        def on_push(report: PushReport) -> None:
            self._reports.append(report)
            if report.num_activated:
                self._activated[report.version] = report.step

        def servers() -> list[ServerEntry]:
            return [server_at(self._address, version=max(self._activated, default=0))]

        def fail(error: ArealError) -> None:
            raise AssertionError(error)

        self._publisher = Publisher(
            broadcaster_of(self._senders), call=granted, servers=servers, on_push=on_push, on_failure=fail
        )

    def offer(self, step: int, snapshot: Snapshot, *, waits: bool) -> None:
        async def offer() -> None:
            assert self._publisher is not None
            self._publisher.offer(step, snapshot)
            if waits:
                await self._publisher.wait_until_active(step)

        self._run(offer())

    def close(self) -> None:
        """Collective."""
        if self._publisher is not None:
            self._run(self._publisher.close())
            failed = [report for report in self._reports if report.failed]
            assert len(failed) == 1 and "a bucket cannot be read" in failed[0].failed["broadcast"], failed
            assert {report.num_senders for report in self._reports} == {len(self._snapshotter.sender_ranks)}
        self._senders.close()
        self._snapshotter.close()


@contextlib.contextmanager
def background_loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """An event loop in another thread; yields a function that runs a coroutine there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(HANG_LIMIT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


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
    main(pushes=pushes, death=death, death_in_delta=partial(death, delta="auto"), combinations=combinations)
