"""New weights, received beside decoding and activated whole or not at all.

    no session -> begin -> OPEN -> receive* -> end -> (verified: swapped) | (anything wrong: old weights stay) -> no session

Buckets go into a shadow set of weights that no forward reads. One that is laid out as the set is (the same dtype, neighbours in the same
order) is received in its place; any other into a buffer, and copied and cast from there. While one comes off the wire the one before is
verified. A bucket that does not fit the model is still received, so that the sender and the other engines are not left hanging, and spoils
the session: `end` then refuses with the first reason. Blocking calls run in threads of their own; a broadcast whose sender hangs
holds only its thread until the group's timeout, and the set of weights it may still write into is abandoned with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.runtime.threads import in_thread
from areal_like.weights.buckets import (
    Bucket,
    TensorSpec,
    check_names,
    checksum,
    checksum_and_finiteness,
    is_finite,
    spec_of,
    unflatten,
)
from areal_like.weights.collective import WeightGroup, device_facts
from rollout_server.engine.loop import EngineLoop
from rollout_server.engine.models.base import ModelFacts, Weights

logger = logging.getLogger(__name__)

T = TypeVar("T")
_WORD_BYTES = 8


class _Threads:
    """Blocking work of one updater, all of which can be given up at once."""

    def __init__(self) -> None:
        self._pending: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, or its exception; WeightSyncError if `abandon` was called meanwhile."""

        def main() -> T:
            with torch.inference_mode():
                return work()

        future = in_thread(main, name="weights")
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return await future

    def abandon(self, reason: str) -> None:
        """Fails everything that is awaited; the threads end by themselves."""
        for future in list(self._pending):
            if not future.done():  # settled in this very turn of the loop
                future.set_exception(WeightSyncError(reason))


class _Session:
    """One update being received. `receive` and what it calls run in threads, everything else on the event loop."""

    def __init__(self, weights: Weights, facts: ModelFacts, buffers: list[Tensor]) -> None:
        """`buffers`: what an earlier session left."""
        self.weights = weights
        self.facts = facts
        self.received: list[TensorSpec] = []
        self.problem = ""
        self.version = ""
        self.num_receiving = 0
        self.wire = asyncio.Lock()
        self.is_tainted = False
        """A broadcast into the shadow set failed, and may write into it for ever after."""
        self.is_given_up = False
        self.started_s = time.perf_counter()
        self.buffers = buffers
        """Not in use at the moment."""
        self._stream: torch.cuda.Stream | None = None
        if facts.device.type == "cuda":
            self._stream = torch.cuda.Stream(facts.device)  # type: ignore[no-untyped-call]
            # What decoding has queued may still read the set that it gave up.
            self._stream.wait_stream(torch.cuda.default_stream(facts.device))

    def beside_decoding(self, work: Callable[[], T]) -> T:
        """Runs `work` in a stream of our own: in the default one decoding would wait for the whole broadcast, and we for decoding."""
        with torch.cuda.stream(self._stream):
            return work()

    def receive(self, group: WeightGroup, buckets: Iterable[Bucket], *, timeout_s: float) -> list[int]:
        """Takes flattened buckets off the wire and verifies them; their checksums. Raises WeightSyncError when the group breaks.

        What is wrong with the buckets themselves becomes `problem`, and the rest is received nevertheless.
        """
        device = self.facts.device if group.backend == "nccl" else torch.device("cpu")
        end_s = time.monotonic() + timeout_s
        found: list[int] = []
        before: tuple[Bucket, Tensor, Tensor | None] | None = None
        for bucket in buckets:
            flat, buffer = self._place_of(bucket, device), None
            if flat is None:
                buffer = self._buffer(bucket.num_bytes, device)
                flat = buffer[: bucket.num_bytes]
            wait = group.begin_broadcast(flat, timeout_s=max(0.001, end_s - time.monotonic()))
            has_ended = False
            try:
                if before is not None:
                    found.append(self._verify(*before))
                wait()
                has_ended = True
            finally:
                self.is_tainted |= buffer is None and not has_ended
            before = bucket, flat, buffer
        if before is not None:
            found.append(self._verify(*before))
        return found

    def receive_tensors(self, group: WeightGroup, bucket: Bucket, *, timeout_s: float) -> None:
        """Takes a bucket that was not flattened off the wire, tensor by tensor. Raises WeightSyncError."""
        device = self.facts.device if group.backend == "nccl" else torch.device("cpu")
        tensors = {}
        for spec in bucket.tensors:
            tensors[spec.name] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            group.broadcast(tensors[spec.name], timeout_s=timeout_s)
        self.store(tensors)

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors into the shadow set, casting. Raises WeightSyncError for one that does not fit or is not finite."""
        shapes = self.facts.parameter_shapes
        for name, tensor in tensors.items():
            if name in self.facts.tied_names:
                continue
            if name not in shapes:
                raise WeightSyncError(f"tensor {name} is unknown to the model")
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise WeightSyncError(
                    f"tensor {name}: want shape {list(shapes[name])}, got {list(tensor.shape)}"
                )
            target = self.weights.named[name]
            target.copy_(tensor)
            self._check_finite(name, target)
            self.received.append(spec_of(name, tensor))
        if self.facts.device.type == "cuda":
            torch.cuda.current_stream(self.facts.device).synchronize()

    def _place_of(self, bucket: Bucket, device: torch.device) -> Tensor | None:
        """The part of the shadow set that is laid out as the bucket is."""
        arena, named = self.weights.arena, self.weights.named
        if arena is None or arena.device != device:
            return None
        dtype = str(self.facts.dtype).removeprefix("torch.")
        if any(
            s.name not in named or s.dtype != dtype or tuple(named[s.name].shape) != s.shape
            for s in bucket.tensors
        ):
            return None
        start = named[bucket.tensors[0].name].data_ptr()
        if any(
            named[s.name].data_ptr() != start + offset
            for s, offset in zip(bucket.tensors, bucket.offsets, strict=True)
        ):
            return None
        first = start - arena.data_ptr()
        if first % _WORD_BYTES:  # inside a group only; checksums read words
            return None
        return arena[first : first + bucket.num_bytes]

    def _buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        """uint8[num_bytes or more]."""
        for index, buffer in enumerate(self.buffers):
            if buffer.numel() >= num_bytes and buffer.device == device:
                return self.buffers.pop(index)
        del self.buffers[:1]  # one is in use: there are never more than two
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def _verify(self, bucket: Bucket, flat: Tensor, buffer: Tensor | None) -> int:
        """Checks a bucket that has come and, from a buffer, stores it; its checksum."""
        is_in_place = buffer is None
        found, all_finite = (
            checksum_and_finiteness(flat, dtype=self.facts.dtype) if is_in_place else (checksum(flat), True)
        )
        try:
            if bucket.checksum not in (None, found):
                raise WeightSyncError("a bucket's checksum is wrong: the bytes changed on the way")
            if is_in_place:
                for name, tensor in unflatten(bucket, flat).items() if not all_finite else ():
                    self._check_finite(name, tensor)
                self.received += bucket.tensors
            else:
                self.store(unflatten(bucket, flat))
        except WeightSyncError as error:
            self.problem = self.problem or str(error)
        if buffer is not None:
            self.buffers.append(buffer)
        return found

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise WeightSyncError(f"tensor {name} holds values that are not finite in {self.facts.dtype}")


class WeightUpdater:
    """Groups and the one update session of an engine. All methods belong to the event loop."""

    def __init__(self, loop: EngineLoop, facts: ModelFacts) -> None:
        self._loop = loop
        self._facts = facts
        self._groups: dict[str, WeightGroup] = {}
        self._session: _Session | None = None
        self._threads = _Threads()
        self._buffers: list[Tensor] = []
        """At most two, for buckets that are not received in their place: filling memory that the kernel has to hand out first takes twice
        as long."""
        self.num_updates = 0
        self.num_failures = 0
        self.update_s = 0.0
        """Sum over successful updates of the time from `begin` to activation."""
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
    ) -> None:
        """Joins a group; one that has the same name is left first."""
        if backend == "nccl" and self._facts.device.type != "cuda":
            raise WeightSyncError(
                f"backend nccl needs a CUDA engine, this one runs on {self._facts.device}: use gloo"
            )
        if group_name in self._groups:
            await self.destroy_group(group_name)
        self._groups[group_name] = await self._threads.run(
            lambda: WeightGroup.join(
                master_address=master_address,
                master_port=master_port,
                rank=rank,
                world_size=world_size,
                group_name=group_name,
                backend=backend,
                timeout_s=timeout_s,
            )
        )

    async def destroy_group(self, group_name: str) -> None:
        """Leaves a group. Raises WeightSyncError if there is none of that name."""
        group = self._groups.pop(group_name, None)
        if group is None:
            raise WeightSyncError(f"weight group {group_name!r} does not exist")
        await self._threads.run(group.close)  # NCCL's abort may wait for a hung peer

    async def begin(self) -> None:
        """Opens a session; one that is open is given up."""
        self._give_up()
        weights = await asyncio.wrap_future(self._loop.call(lambda core: core.take_spare()))
        buffers, self._buffers = self._buffers, []
        self._session = _Session(weights, self._facts, buffers)

    async def receive(
        self, bucket: Bucket, *, group_name: str, flattened: bool, version: str, timeout_s: float
    ) -> int | None:
        """Receives one bucket, after those that were asked for before; the checksum of a flattened one.

        `timeout_s`: of the broadcast. A failure is raised here and spoils the session.
        """
        session = self._open_session()
        found = await self._receive(
            session, [bucket], group_name=group_name, flattened=flattened, timeout_s=timeout_s
        )
        session.version = version or session.version
        return found[0] if flattened else None

    async def receive_all(self, buckets: Sequence[Bucket], *, group_name: str, timeout_s: float) -> list[int]:
        """Opens a session and receives all of it, flattened; the checksums. A failure is raised here and spoils the session."""
        await self.begin()
        return await self._receive(
            self._open_session(), buckets, group_name=group_name, flattened=True, timeout_s=timeout_s
        )

    async def _receive(
        self,
        session: _Session,
        buckets: Sequence[Bucket],
        *,
        group_name: str,
        flattened: bool,
        timeout_s: float,
    ) -> list[int]:
        group = self._groups.get(group_name)
        if group is None:
            raise WeightSyncError(
                f"weight group {group_name!r} does not exist: call /init_weights_update_group first"
            )

        def work() -> list[int]:
            if flattened:
                return session.receive(group, buckets, timeout_s=timeout_s)
            session.receive_tensors(group, buckets[0], timeout_s=timeout_s)
            return []

        session.num_receiving += 1
        try:
            async with session.wire:
                if session.is_given_up:
                    raise WeightSyncError("the weight update was given up")
                if any(bucket.num_bytes > self._max_bucket_bytes for bucket in buckets):
                    await self.destroy_group(
                        group_name
                    )  # what we would not receive must not keep the sender waiting
                    raise WeightSyncError("a bucket is larger than this model could need")
                found = await self._threads.run(lambda: session.beside_decoding(work))
            if session.problem:
                raise WeightSyncError(session.problem)
        except WeightSyncError as error:
            session.problem = session.problem or str(error)
            raise
        finally:
            session.num_receiving -= 1
            self._give_back(session)
        return found

    async def end(self, *, version: str, recompute: bool) -> float:
        """Verifies the session and activates it; returns the stall in seconds. Raises WeightSyncError, with the old weights in place."""
        session = self._open_session()
        if session.num_receiving:
            raise WeightSyncError("a bucket is being received still")
        version = version or session.version
        try:
            if session.problem:
                raise WeightSyncError(session.problem)
            check_names(session.received, self._facts.parameter_shapes, tied=self._facts.tied_names)
            if not version:
                raise WeightSyncError("no weight_version was given: name it in /end_weight_update")
        except WeightSyncError:
            self.num_failures += 1
            self._give_up()
            raise
        self._session, self._buffers = None, session.buffers
        stall_s = await asyncio.wrap_future(
            self._loop.swap(session.weights, version=version, recompute=recompute)
        )
        self.num_updates += 1
        self.update_s += time.perf_counter() - session.started_s
        logger.info("weights %s active, %.1f ms stall", version, stall_s * 1e3)
        return stall_s

    async def from_disk(self, path: str, *, version: str, recompute: bool) -> float:
        """Loads a Hugging Face directory as one session. Raises WeightSyncError, with the old weights in place."""
        await self.begin()
        session = self._open_session()
        session.num_receiving += 1
        try:
            await self._threads.run(
                lambda: session.beside_decoding(lambda: _read_directory(Path(path), session))
            )
        except WeightSyncError as error:
            session.problem = str(error)
        finally:
            session.num_receiving -= 1
        return await self.end(version=version, recompute=recompute)

    def facts(self) -> dict[str, str]:
        """What rank 0 compares before it chooses a backend."""
        return device_facts(self._facts.device)

    def close(self) -> None:
        """Fails what is being received and leaves all groups."""
        self._threads.abandon("the engine is shutting down")
        for group in self._groups.values():
            in_thread(group.close, name="weights")
        self._groups.clear()

    def _open_session(self) -> _Session:
        if self._session is None:
            raise WeightSyncError("no weight update is open: call /begin_weight_update first")
        return self._session

    def _give_up(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.is_given_up = True
        self._give_back(session)

    def _give_back(self, session: _Session) -> None:
        """The memory of a session that was given up, once nothing is written into it any more."""
        if session.is_given_up and not session.num_receiving:
            self._buffers = session.buffers
            if not session.is_tainted:
                self._loop.call(lambda core: core.give_back(session.weights))


def _read_directory(path: Path, session: _Session) -> None:
    try:
        index = path / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for file in files:
            with safe_open(path / file, framework="pt", device=str(session.facts.device)) as tensors:
                session.store({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise WeightSyncError(f"{path}: cannot read weights: {error}") from None
