"""Weight updates of a running engine: received while it decodes, then activated as a whole or not at all.

Two sets of weights exist. Forward passes read the active set; an update fills the shadow set, and activating
the update swaps the two sets between two decode steps. An error before the swap leaves the active weights
unchanged.

A LoRA adapter needs no second set of weights: it is received into tensors of its own, and activating it
copies them into a slot of the running model.

An update may contain only what differs from the active weights, if those were received as a whole or in the
same way (`base_digest`). It is applied to a copy of them, and the whole result is verified.

Each blocking call runs in a separate thread (groups.py). A broadcast whose sender hangs blocks only its own
thread, until the group's timeout. The shadow weights that it may still write into are then never used again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.paths import read_json
from areal_like.weights.adapters import AdapterHeader
from areal_like.weights.buckets import Bucket, check_names
from areal_like.weights.integrity import BucketSums, weights_digest
from areal_like.weights.weight_group import device_facts
from rollout_server.engine.core import Running
from rollout_server.engine.loop import EngineLoop
from rollout_server.engine.models.base import ModelFacts, Weights
from rollout_server.engine.weights.bucket_receiver import AdapterFacts, BucketReceiver
from rollout_server.engine.weights.groups import JoinedGroups

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _OpenUpdate:
    """The update between `begin` and `end`."""

    receiver: BucketReceiver
    is_adapter: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the call that is receiving, because a group's broadcasts must run in the order of the
    requests."""
    num_receiving: int = 0
    """Number of calls that are receiving or waiting for the lock. While it is above 0 the shadow weights
    cannot be reused."""
    version: str = ""
    base_digest: str = ""
    """Digest of what was received, if it can be the base of another update."""
    is_discarded: bool = False
    started_s: float = field(default_factory=time.perf_counter)


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
        self.groups = JoinedGroups(facts.device)
        """The weight groups of this engine."""
        self._update: _OpenUpdate | None = None
        self._changing = asyncio.Lock()
        """Held by `begin` and `end`: another one would see half of what they do."""
        self._buffers: list[Tensor] = []
        """Receive buffers for buckets that cannot be received in place, at most one for each sender and one
        more. They are kept between
        updates, because receiving into memory that the kernel has to map first takes twice as long."""
        self.base_digest = ""
        """Digest of the active weights if an update may contain only what differs from them; else empty. Set
        by an update that is received in one call, and cleared when any other begins."""
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

    async def begin(self, adapter: AdapterHeader | None = None, *, base_digest: str = "") -> None:
        """Opens an update; discards an update that is still open.

        `adapter`: its header, if the update is a LoRA adapter and not all weights. `base_digest`: of the
        active weights, if the update contains only what differs from them. Raises WeightSyncError if this
        engine cannot have such an adapter, or does not have such a base.
        """
        async with self._changing:
            self._discard()
            if base_digest and (adapter is not None or base_digest != self.base_digest):
                raise WeightSyncError(
                    f"the update needs weights of digest {base_digest[:12]} as its base, the engine has "
                    f"{self.base_digest[:12] or 'none that can be one'}"
                )
            # If this update fails, a model that copies its weights has a part of it in both sets.
            self.base_digest = ""
            base: Weights | None = None
            if adapter is None:
                weights = await asyncio.wrap_future(self._loop.call(lambda core: core.take_shadow_weights()))
                if base_digest:
                    base = await asyncio.wrap_future(self._loop.call(lambda core: core.active_weights))
                facts: ModelFacts | AdapterFacts = self._facts
            else:
                header = adapter
                named = await asyncio.wrap_future(self._loop.call(lambda core: core.new_adapter(header)))
                weights = Weights(named=named)
                facts = AdapterFacts.of(named, dtype=self._facts.dtype, device=self._facts.device)
            buffers, self._buffers = self._buffers, []
            receiver = BucketReceiver(weights, facts, buffers, base=base)
            self._update = _OpenUpdate(receiver, is_adapter=adapter is not None)

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
        groups = self.groups.find(group_name)

        def work() -> BucketSums:
            if flattened:
                return receiver.receive(groups, buckets, timeout_s=timeout_s, integrity=integrity)
            receiver.receive_tensors(groups[0], buckets[0], timeout_s=timeout_s)
            return BucketSums(checksums=[], digests=[])

        update.num_receiving += 1
        try:
            async with update.lock:
                if update.is_discarded:
                    raise WeightSyncError("the weight update was discarded")
                if any(bucket.num_bytes > self._max_bucket_bytes for bucket in buckets):
                    # Leaving the group makes the broadcast of this bucket fail at the sender at once.
                    await self.groups.leave(group_name)
                    raise WeightSyncError("a bucket is larger than all of this model's tensors together")
                is_only = not receiver.received
                sums = await self.groups.threads.run(lambda: receiver.on_own_stream(work))
            if receiver.error:
                raise WeightSyncError(receiver.error)
            is_base = is_only and flattened and not update.is_adapter and receiver.can_be_base(buckets)
            update.base_digest = weights_digest(buckets, sums) if is_base else ""
        except WeightSyncError as error:
            receiver.error = receiver.error or str(error)
            raise
        finally:
            update.num_receiving -= 1
            self._reclaim(update)
        update.version = version or update.version
        return sums

    async def end(self, *, version: str, running: Running) -> float:
        """Checks that the update is complete and activates it; returns the stall of decoding in seconds.

        `running`: what happens to sequences that have begun. Raises WeightSyncError if the update is
        incomplete or had an error; the old weights stay active.
        """
        return await self._end(self._open_update(), version=version, running=running)

    async def _end(self, update: _OpenUpdate, *, version: str, running: Running) -> float:
        async with self._changing:
            if self._update is not update:
                raise WeightSyncError("the weight update was discarded")
            if update.num_receiving:
                raise WeightSyncError("a bucket is still being received")
            receiver, version = update.receiver, version or update.version
            try:
                if receiver.error:
                    raise WeightSyncError(receiver.error)
                facts = receiver.facts
                check_names(receiver.received, facts.parameter_shapes, tied=facts.tied_names)
                if running == "finish" and not update.is_adapter:
                    raise WeightSyncError(
                        "running=finish needs an adapter: all weights change for every sequence"
                    )
                if not version:
                    raise WeightSyncError("no weight_version was given: pass it to /end_weight_update")
            except WeightSyncError:
                self.num_failures += 1
                self._discard()
                raise
            self._update, self._buffers = None, receiver.buffers
            if update.is_adapter:
                activating = self._loop.activate_adapter(
                    receiver.weights.named, version=version, running=running
                )
            else:
                activating = self._loop.swap_weights(
                    receiver.weights, version=version, recompute=running == "recompute"
                )
            stall_s = await asyncio.wrap_future(activating)
            self.base_digest = update.base_digest
            self.num_updates += 1
            self.update_s += time.perf_counter() - update.started_s
            logger.debug("weight version %s is active, decoding stalled for %.1f ms", version, stall_s * 1e3)
            return stall_s

    async def load_from_disk(self, path: str, *, version: str, running: Running) -> float:
        """Loads a Hugging Face directory as one update; returns and raises as `end` does."""
        await self.begin()
        update = self._open_update()
        receiver = update.receiver
        update.num_receiving += 1
        try:
            await self.groups.threads.run(
                lambda: receiver.on_own_stream(
                    lambda: _store_checkpoint(Path(path), receiver, leaves_out=self._facts.untrained_names)
                )
            )
        except WeightSyncError as error:
            receiver.error = str(error)
        finally:
            update.num_receiving -= 1
            self._reclaim(update)
        return await self._end(update, version=version, running=running)

    def device_facts(self) -> dict[str, str]:
        """Returns device and NCCL version of this engine, which rank 0 compares before it chooses a
        backend."""
        return device_facts(self._facts.device)

    def close(self) -> None:
        """Fails every call that is receiving, and leaves all groups without waiting."""
        self.groups.close()

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
            if not receiver.is_tainted and not update.is_adapter:
                self._loop.call(lambda core: core.return_shadow_weights(receiver.weights))


def _store_checkpoint(path: Path, receiver: BucketReceiver, *, leaves_out: frozenset[str]) -> None:
    """Stores the tensors of a Hugging Face directory in the shadow weights, except those of the names in
    `leaves_out`. Raises WeightSyncError."""
    try:
        index = path / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
        for file in files:
            with safe_open(path / file, framework="pt", device=str(receiver.device)) as tensors:
                names = [name for name in tensors.keys() if name not in leaves_out]  # noqa: SIM118
                receiver.store({name: tensors.get_tensor(name) for name in names})
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise WeightSyncError(f"{path}: cannot read weights: {error}") from None
