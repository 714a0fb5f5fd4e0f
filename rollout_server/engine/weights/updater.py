"""Weight updates of a running engine: received while it decodes, then activated as a whole or not at all.

Two sets of weights exist. Forward passes read the active set; an update fills the shadow set, and activating
the update swaps the two sets between two decode steps. An error before the swap leaves the active weights
unchanged.

Each blocking call runs in a separate thread. A broadcast whose sender hangs blocks only its own thread, until
the group's timeout. The shadow weights that it may still write into are then never used again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.paths import read_json
from areal_like.runtime.threads import in_thread
from areal_like.weights.buckets import Bucket, check_names
from areal_like.weights.integrity import BucketSums
from areal_like.weights.weight_group import WeightGroup, device_facts
from rollout_server.engine.loop import EngineLoop
from rollout_server.engine.models.base import ModelFacts
from rollout_server.engine.weights.bucket_receiver import BucketReceiver

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_JOINS = 8
"""Maximum number of threads that wait to join a group at the same time, including abandoned ones."""
_JOIN_GRACE_S = 1.0
"""Time after a join's time limit in which torch can still report its own error."""


@dataclass(eq=False)
class _OpenUpdate:
    """The update between `begin` and `end`."""

    receiver: BucketReceiver
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the call that is receiving, because a group's broadcasts must run in the order of the
    requests."""
    num_receiving: int = 0
    """Number of calls that are receiving or waiting for the lock. While it is above 0 the shadow weights
    cannot be reused."""
    version: str = ""
    is_discarded: bool = False
    started_s: float = field(default_factory=time.perf_counter)


@dataclass(eq=False)
class _Join:
    """One attempt to join a group, in a thread that cannot be interrupted."""

    group_name: str
    is_abandoned: bool = False
    """True once no caller waits for its result; if it still joins a group, it leaves that group at once."""


class _AbandonableThreads:
    """Threads for blocking work (broadcasts, group set-up, file reads) that can all be abandoned at once.

    All methods must be called on the event loop.
    """

    def __init__(self) -> None:
        self._pending: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`.

        Raises its exception, or WeightSyncError if `abandon` is called first.
        """

        def main() -> T:
            with torch.inference_mode():
                return work()

        future = in_thread(main, name="weights")
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return await future

    def abandon(self, reason: str) -> None:
        """Fails every pending `run` with WeightSyncError.

        The threads run to their end, and their results are discarded.
        """
        for future in list(self._pending):
            # The set may still contain a future that is done: the callback that removes it runs later.
            if not future.done():
                future.set_exception(WeightSyncError(reason))


class WeightUpdater:
    """The weight groups of an engine and its one open update. All methods must be called on the event loop.

        CLOSED -> begin -> OPEN -> receive (repeated) -> end -> verified: weights swapped -> CLOSED
                                                             -> any error: active weights stay -> CLOSED

    `begin` in state OPEN discards the update and opens another. `load_from_disk` calls `begin` itself. An
    error in a bucket makes the call that received it fail, and a later `end` fails with the message of the
    first error.
    """

    def __init__(self, loop: EngineLoop, facts: ModelFacts) -> None:
        self._loop = loop
        self._facts = facts
        self._groups: dict[str, WeightGroup] = {}
        """The group that this engine is in, by name; more than one only while one is being left."""
        self._join: _Join | None = None
        """The join that is waiting for the other ranks."""
        self._join_slots = threading.BoundedSemaphore(_MAX_JOINS)
        self._update: _OpenUpdate | None = None
        self._threads = _AbandonableThreads()
        self._buffers: list[Tensor] = []
        """Receive buffers for buckets that cannot be received in place, at most two. They are kept between
        updates, because receiving into memory that the kernel has to map first takes twice as long."""
        self.num_updates = 0
        """Updates activated."""
        self.num_failures = 0
        """Updates that `end` refused."""
        self.update_s = 0.0
        """Sum over successful updates of the time from `begin` to activation."""
        # The model's tensors cannot exceed this in any dtype, so a larger bucket is an error of the sender.
        self._max_bucket_bytes = 1 << 24
        self._max_bucket_bytes += 8 * sum(
            torch.Size(shape).numel() for shape in facts.parameter_shapes.values()
        )

    async def init_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float,
        secret: str = "",
    ) -> None:
        """Joins a weight group; first leaves any other group and abandons a pending join.

        Raises WeightSyncError, also when torch does not return within `timeout_s` (it waits without a time
        limit for a store that accepts the connection and never responds).
        """
        if backend == "nccl" and self._facts.device.type != "cuda":
            raise WeightSyncError(
                f"backend nccl needs a CUDA engine, this one runs on {self._facts.device}: use gloo"
            )
        for name in list(self._groups):
            await self.destroy_group(name)
        if not self._join_slots.acquire(blocking=False):
            raise WeightSyncError(
                f"{_MAX_JOINS} earlier attempts to join a weight group wait for stores that do not reply"
            )
        self._abandon_join()
        join = self._join = _Join(group_name)

        def work() -> WeightGroup:
            try:
                group = WeightGroup.join(
                    master_address=master_address,
                    master_port=master_port,
                    rank=rank,
                    world_size=world_size,
                    group_name=group_name,
                    backend=backend,
                    timeout_s=timeout_s,
                    secret=secret,
                )
            finally:
                self._join_slots.release()
            if join.is_abandoned:
                group.close()
                raise WeightSyncError(f"weight group {group_name}: this engine has left it while joining")
            return group

        try:
            async with asyncio.timeout(timeout_s + _JOIN_GRACE_S):
                group = await self._threads.run(work)
        except TimeoutError:
            join.is_abandoned = True
            raise WeightSyncError(
                f"weight group {group_name}: {master_address}:{master_port} timed out after {timeout_s:g} s"
            ) from None
        finally:
            if self._join is join:
                self._join = None
        if join.is_abandoned:
            in_thread(group.close, name="weights")
            raise WeightSyncError(f"weight group {group_name}: this engine has left it while joining")
        self._groups[group_name] = group

    async def destroy_group(self, group_name: str) -> None:
        """Leaves a group. Raises WeightSyncError if no group has that name."""
        group = self._groups.pop(group_name, None)
        if group is None and self._join is not None and self._join.group_name == group_name:
            self._abandon_join()
            return
        if group is None:
            raise WeightSyncError(f"weight group {group_name!r} does not exist")
        # In a thread: NCCL's abort may wait for a peer that hangs.
        await self._threads.run(group.close)

    async def begin(self) -> None:
        """Opens an update; discards an update that is still open."""
        self._discard()
        weights = await asyncio.wrap_future(self._loop.call(lambda core: core.take_shadow_weights()))
        buffers, self._buffers = self._buffers, []
        self._update = _OpenUpdate(BucketReceiver(weights, self._facts, buffers))

    async def receive(
        self,
        buckets: Sequence[Bucket],
        *,
        group_name: str,
        timeout_s: float,
        flattened: bool = True,
        version: str = "",
        integrity: str = "none",
    ) -> BucketSums:
        """Receives buckets into the open update, in the order of the calls; returns their sums.

        `timeout_s`: time limit of all broadcasts together. `flattened`: False for one bucket whose tensors
        come one by one, which has no sums; `timeout_s` then applies to each tensor. `version`: version of the
        update; empty if it is passed to `end`. `integrity`: `none`, or `sha256` for sums with digests. Raises
        WeightSyncError; the update can then no longer be activated.
        """
        update = self._open_update()
        receiver = update.receiver
        group = self._groups.get(group_name)
        if group is None:
            raise WeightSyncError(
                f"weight group {group_name!r} does not exist: call /init_weights_update_group first"
            )

        def work() -> BucketSums:
            if flattened:
                return receiver.receive(group, buckets, timeout_s=timeout_s, integrity=integrity)
            receiver.receive_tensors(group, buckets[0], timeout_s=timeout_s)
            return BucketSums(checksums=[], digests=[])

        update.num_receiving += 1
        try:
            async with update.lock:
                if update.is_discarded:
                    raise WeightSyncError("the weight update was discarded")
                if any(bucket.num_bytes > self._max_bucket_bytes for bucket in buckets):
                    # Leaving the group makes the broadcast of this bucket fail at the sender at once.
                    await self.destroy_group(group_name)
                    raise WeightSyncError("a bucket is larger than all of this model's tensors together")
                sums = await self._threads.run(lambda: receiver.on_own_stream(work))
            if receiver.error:
                raise WeightSyncError(receiver.error)
        except WeightSyncError as error:
            receiver.error = receiver.error or str(error)
            raise
        finally:
            update.num_receiving -= 1
            self._reclaim(update)
        update.version = version or update.version
        return sums

    async def end(self, *, version: str, recompute: bool) -> float:
        """Checks that the update is complete and activates it; returns the stall of decoding in seconds.

        `recompute`: recompute the KV of running sequences under the new weights; otherwise they keep their
        KV. Raises WeightSyncError if the update is incomplete or had an error; the old weights stay active.
        """
        update = self._open_update()
        if update.num_receiving:
            raise WeightSyncError("a bucket is still being received")
        receiver, version = update.receiver, version or update.version
        try:
            if receiver.error:
                raise WeightSyncError(receiver.error)
            check_names(receiver.received, self._facts.parameter_shapes, tied=self._facts.tied_names)
            if not version:
                raise WeightSyncError("no weight_version was given: pass it to /end_weight_update")
        except WeightSyncError:
            self.num_failures += 1
            self._discard()
            raise
        self._update, self._buffers = None, receiver.buffers
        stall_s = await asyncio.wrap_future(
            self._loop.swap_weights(receiver.weights, version=version, recompute=recompute)
        )
        self.num_updates += 1
        self.update_s += time.perf_counter() - update.started_s
        logger.debug("weight version %s is active, decoding stalled for %.1f ms", version, stall_s * 1e3)
        return stall_s

    async def load_from_disk(self, path: str, *, version: str, recompute: bool) -> float:
        """Loads a Hugging Face directory as one update; returns and raises as `end` does."""
        await self.begin()
        update = self._open_update()
        receiver = update.receiver
        update.num_receiving += 1
        try:
            await self._threads.run(
                lambda: receiver.on_own_stream(lambda: _store_checkpoint(Path(path), receiver))
            )
        except WeightSyncError as error:
            receiver.error = str(error)
        finally:
            update.num_receiving -= 1
        return await self.end(version=version, recompute=recompute)

    def device_facts(self) -> dict[str, str]:
        """Returns device and NCCL version of this engine, which rank 0 compares before it chooses a
        backend."""
        return device_facts(self._facts.device)

    def close(self) -> None:
        """Fails every call that is receiving, and leaves all groups without waiting."""
        self._threads.abandon("the engine is shutting down")
        for group in self._groups.values():
            in_thread(group.close, name="weights")
        self._groups.clear()

    def _abandon_join(self) -> None:
        if self._join is not None:
            self._join.is_abandoned = True
            self._join = None

    def _open_update(self) -> _OpenUpdate:
        if self._update is None:
            raise WeightSyncError("no weight update is open: call /begin_weight_update first")
        return self._update

    def _discard(self) -> None:
        update, self._update = self._update, None
        if update is None:
            return
        update.is_discarded = True
        self._reclaim(update)

    def _reclaim(self, update: _OpenUpdate) -> None:
        """Reuses the memory of a discarded update once no call writes into it any more."""
        if update.is_discarded and not update.num_receiving:
            receiver = update.receiver
            self._buffers = receiver.buffers
            if not receiver.is_tainted:
                self._loop.call(lambda core: core.return_shadow_weights(receiver.weights))


def _store_checkpoint(path: Path, receiver: BucketReceiver) -> None:
    """Stores all tensors of a Hugging Face directory in the shadow weights. Raises WeightSyncError."""
    try:
        index = path / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
        for file in files:
            with safe_open(path / file, framework="pt", device=str(receiver.device)) as tensors:
                names = tensors.keys()
                receiver.store({name: tensors.get_tensor(name) for name in names})
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise WeightSyncError(f"{path}: cannot read weights: {error}") from None
