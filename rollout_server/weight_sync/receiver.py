"""The receiving end of weight pushes: a control socket for trainer rank 0, and one engine that is brought from version to version.

    no group -> FormGroup -> in group -> PushWeights -> in group ... -> DissolveGroup (also in the middle of a push) -> no group

    recompute, keep   buckets arrive in shadow buffers while decoding goes on; verify; swap between two decode steps
    abort_resume      the same, but running sequences are interrupted before the swap and resubmitted after it
    drain             the same, but newcomers are held and running sequences finish before the swap

That is the embedded engine; one that loads in place has its own ways to the same modes and promise (in_place.py).

So that no token comes from a partial update in any mode, nothing is activated before everything was received and verified, and a
failure leaves the old version active. Only when the engine does not even say which version it is at are its weights in
doubt: then it is declared lost, and its owner replaces it. A control message of a newer epoch ends whatever an older one left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from areal_like.errors import EngineError, WeightSyncError
from areal_like.weights.buckets import Manifest
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.messages.weights import (
    Alive,
    AskAlive,
    DissolveGroup,
    FormGroup,
    PushChecksums,
    PushWeights,
    WeightsFailed,
    WeightsOk,
)
from rollout_server.episodes.base import GenerationGate
from rollout_server.inference.client import EngineClient
from rollout_server.inference.sglang.client import SglangClient
from rollout_server.weight_sync.in_place import SglangWeightUpdate

log = logging.getLogger(__name__)

_CLEANUP_TIMEOUT_S = 5.0
"""For each call that puts an engine right after a failure."""
_NO_ENGINE = "this server's engine is not running"


class WeightReceiver:
    """One server's weight plane. Create it in the loop that serves it.

    `engine` is None while there is no engine to bring up to date: every request is then refused.
    """

    def __init__(
        self,
        *,
        host: str,
        max_message_bytes: int,
        turnstile: GenerationGate,
        on_version: Callable[[int], None],
        on_doubt: Callable[[str], None],
        in_place: SglangWeightUpdate | None = None,
    ) -> None:
        """`on_version` is called when a version became active; `on_doubt` when nobody knows what the engine holds. `in_place`: how SGLang
        is brought up to date."""
        self._listener = Listener(
            host=host,
            port=0,
            handler=self._on_request,
            max_message_bytes=max_message_bytes,
            setting="rollout.host",
        )
        self.port = self._listener.port
        self.engine: EngineClient | None = None
        self.version = 0
        """Version that is active at the engine."""
        self.num_pushes = 0
        self.num_failures = 0
        self.seconds_total = 0.0
        """Time from request to activation, summed over pushes."""
        self.stall_seconds_total = 0.0
        self._turnstile = turnstile
        self._on_version = on_version
        self._on_doubt = on_doubt
        self._in_place = in_place
        self._group_name = ""
        self._work: asyncio.Task[None] | None = None
        self._waits_for_peers = False
        self._stated: PushChecksums | None = None
        self._is_stated = asyncio.Event()
        self._queue: asyncio.Queue[Envelope] = asyncio.Queue()
        self.serving = asyncio.create_task(self._serve(), name="weights")
        """Ends only by `close`, or by a bug."""

    @property
    def num_bad_frames(self) -> int:
        """Frames on the control socket that were refused."""
        return self._listener.num_bad_frames

    def set_engine(self, engine: EngineClient | None, *, version: int = 0) -> None:
        """The engine was started (at this version) or lost; groups of the one before are gone with it."""
        self.engine, self.version, self._group_name = engine, version, ""
        if self._work is not None:
            self._work.cancel()

    async def close(self) -> None:
        """Ends a push that is running (its asker is told) and closes the socket."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work], timeout=_CLEANUP_TIMEOUT_S)
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        self._listener.close()

    def _on_request(self, envelope: Envelope) -> None:
        if isinstance(envelope.message, AskAlive):
            self._answer(envelope, self._facts())
            return
        if isinstance(envelope.message, PushChecksums):
            self._stated = envelope.message
            self._is_stated.set()
            return
        # A newer group, or leaving this one, ends a rendezvous or a broadcast that may be waiting for a dead peer.
        if (
            isinstance(envelope.message, (FormGroup, DissolveGroup))
            and self._work is not None
            and self._waits_for_peers
        ):
            self._work.cancel()
        self._queue.put_nowait(envelope)

    async def _serve(self) -> None:
        while True:
            envelope = await self._queue.get()
            self._work = asyncio.create_task(
                self._handle(envelope), name=f"weights:{type(envelope.message).__name__}"
            )
            await asyncio.wait([self._work])
            if not self._work.cancelled():
                self._work.result()
            self._work = None

    async def _handle(self, envelope: Envelope) -> None:
        """One request to its answer; whatever happens, the asker hears something."""
        request = envelope.message
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        answer: WeightsOk | WeightsFailed = WeightsFailed(
            version=self.version, reason=f"cannot handle {type(request).__name__}"
        )
        try:
            stall_s = await self._perform(request)
            answer = WeightsOk(version=self.version, seconds=loop.time() - started_s, stall_seconds=stall_s)
        except (EngineError, WeightSyncError) as error:
            answer = WeightsFailed(version=self.version, reason=str(error))
        except asyncio.CancelledError:
            answer = WeightsFailed(
                version=self.version, reason=f"{type(request).__name__} was ended before it was done"
            )
        finally:
            self._answer(envelope, answer)
            self._account(request, answer)

    def _account(self, request: Any, answer: WeightsOk | WeightsFailed) -> None:
        if isinstance(answer, WeightsFailed):
            self.num_failures += 1
            log.warning("%s failed: %s", type(request).__name__, answer.reason)
        elif isinstance(request, PushWeights):
            self.num_pushes += 1
            self.seconds_total += answer.seconds
            self.stall_seconds_total += answer.stall_seconds
            log.info(
                "version %d active after %.3f s (stalled %.3f s)",
                answer.version,
                answer.seconds,
                answer.stall_seconds,
            )
            self._on_version(answer.version)

    def _facts(self) -> Alive | WeightsFailed:
        if self.engine is None:
            return WeightsFailed(version=self.version, reason=_NO_ENGINE)
        return Alive(version=self.version, **dataclasses.asdict(self.engine.facts))

    def _answer(self, envelope: Envelope, answer: Alive | WeightsOk | WeightsFailed) -> None:
        self._listener.send(envelope.peer, answer, rid=envelope.rid)

    async def _perform(self, request: Any) -> float:
        """Does what was asked; returns the seconds in which nothing was decoded."""
        if self.engine is None:
            raise EngineError(_NO_ENGINE)
        match request:
            case FormGroup():
                await self._form(self.engine, request)
                return 0.0
            case DissolveGroup():
                if request.group_name == self._group_name:
                    await self._leave(self.engine)
                return 0.0
            case PushWeights():
                if request.group_name != self._group_name:
                    raise WeightSyncError(
                        f"not in group {request.group_name!r} of epoch {request.epoch}, but in {self._group_name!r}"
                    )
                return await self._push(self.engine, request)
        raise WeightSyncError(f"{type(request).__name__} does not belong on this socket")

    async def _form(self, engine: EngineClient, request: FormGroup) -> None:
        if self._group_name:
            await self._leave(engine)
        # Named before it is joined: a rendezvous that we are cancelled out of still has to be left.
        self._group_name = request.group_name
        with self._waiting_for_peers():
            await engine.init_weights_group(
                master_address=request.master_address,
                master_port=request.master_port,
                rank_offset=request.rank,
                world_size=request.world_size,
                group_name=request.group_name,
                backend=request.backend,
                timeout_s=request.timeout_s,
            )

    async def _leave(self, engine: EngineClient) -> None:
        group_name, self._group_name = self._group_name, ""
        try:
            await engine.destroy_weights_group(group_name=group_name)
        except EngineError as error:
            log.info(
                "leaving group %s: %s", group_name, error
            )  # it was never joined, or the engine gave it up itself

    async def _push(self, engine: EngineClient, request: PushWeights) -> float:
        manifest = Manifest.from_dict(request.manifest)
        clock = _Deadline(request.timeout_s)
        try:
            async with asyncio.timeout(request.timeout_s):
                if isinstance(engine, SglangClient):
                    assert self._in_place is not None
                    stall_s = await self._in_place.push(
                        engine,
                        request,
                        manifest,
                        left_s=lambda: clock.left_s,
                        waiting=self._waiting_for_peers,
                    )
                else:
                    stall_s = await self._push_beside(engine, request, manifest, clock)
        except (TimeoutError, EngineError, WeightSyncError) as error:
            if not await self._settle(engine, request.version):
                # The sender may be waiting for us to take the next bucket: leaving tells it now, and not at its time limit.
                await self._leave(engine)
                if isinstance(error, TimeoutError):
                    raise WeightSyncError(
                        f"version {request.version} was not active within {request.timeout_s:g} s"
                    ) from None
                raise
            stall_s = 0.0  # the answer was lost, the swap was not
        self.version = request.version
        return stall_s

    async def _push_beside(
        self, engine: EngineClient, request: PushWeights, manifest: Manifest, clock: _Deadline
    ) -> float:
        """Into shadow buffers while decoding goes on, and then active between two steps."""
        with self._waiting_for_peers():
            found = await engine.receive_weights(
                manifest.buckets, group_name=request.group_name, timeout_s=clock.left_s
            )
            stated = await self._checksums_of(request.version)
        if found != stated:
            raise WeightSyncError(
                f"version {request.version}: a bucket's checksum is wrong, its bytes changed on the way"
            )
        return await self._activate(engine, request, clock)

    async def _checksums_of(self, version: int) -> list[int]:
        """What the sender says it sent; it may have said so before we had received."""
        while self._stated is None or self._stated.version != version:
            self._is_stated.clear()
            await self._is_stated.wait()
        return self._stated.checksums

    async def _activate(self, engine: EngineClient, request: PushWeights, clock: _Deadline) -> float:
        """Verifies and swaps, in the way that the update mode asks for."""
        running = "keep" if request.update_mode == "keep" else "recompute"

        async def swap() -> float:
            answer = await engine.end_weight_update(
                weight_version=request.version, running=running, timeout_s=clock.left_s
            )
            return float(answer.get("stall_s", 0.0))

        match request.update_mode:
            case "recompute" | "keep":
                return await swap()
            case "abort_resume":
                return await _between(lambda: engine.pause("abort"), swap, lambda: self._resume(engine))
            case "drain":

                async def open_again() -> None:
                    self._turnstile.release()

                async def hold() -> None:
                    self._turnstile.hold()
                    await self._turnstile.wait_empty()

                return await _between(hold, swap, open_again)
        raise WeightSyncError(f"unknown update mode {request.update_mode!r}")

    async def _resume(self, engine: EngineClient) -> None:
        try:
            await engine.resume()
        except EngineError as error:
            if not engine.is_closed:  # else its owner has lost it already, and may have started another
                self._on_doubt(f"stays paused after a push: {error}")
            raise

    @contextlib.contextmanager
    def _waiting_for_peers(self) -> Iterator[None]:
        """Inside, and only there, may a newer control message end the work: a swap that has begun is seen through."""
        self._waits_for_peers = True
        try:
            yield
        finally:
            self._waits_for_peers = False

    async def _settle(self, engine: EngineClient, version: int) -> bool:
        """After a failed push: True if the new version is active after all; declares the engine lost if it cannot say."""
        try:
            async with asyncio.timeout(_CLEANUP_TIMEOUT_S):
                return await engine.weight_version() == version
        except (EngineError, TimeoutError) as error:
            self._on_doubt(
                f"cannot say which weights it has after a failed push of version {version}: {error}"
            )
            return False


class _Deadline:
    """One time limit over several waits."""

    def __init__(self, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._end_s = self._loop.time() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.001, self._end_s - self._loop.time())


async def _between(
    before: Callable[[], Awaitable[None]],
    swap: Callable[[], Awaitable[float]],
    after: Callable[[], Coroutine[Any, Any, None]],
) -> float:
    """before, swap, after; `after` also when one of the others failed or was cancelled. Returns its seconds from `before` on."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    try:
        await before()
        await swap()
    finally:
        # Shielded: a cancelled push must not leave an engine paused for ever.
        await asyncio.shield(asyncio.ensure_future(after()))
    return loop.time() - started_s
