"""Receives weight pushes for one engine, directed by trainer rank 0 over a control socket.

    NO GROUP -> FormGroup -> IN GROUP -> PushWeights -> IN GROUP -> DissolveGroup (also mid-push) -> NO GROUP

The engine's strategy receives and activates a version (`weights/strategy.py`). No token comes from a partial
update: a version is activated only after all of it was received and verified, and a failure leaves the old
version active. If the engine does not report its version after a failure, its weights are unknown: it is
reported with `on_untrusted` and replaced. A control message for a newer weight group cancels work for an
older one.

Requests are bounded (checks.py), and only the peer that formed the group may push into it or dissolve it.
Anyone who can reach the socket may form a group, because a restarted trainer is a new peer; the socket's keys
control who can reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from areal_like.errors import EngineError, WeightSyncError
from areal_like.spans import recorder
from areal_like.weights.buckets import Manifest
from areal_like.weights.integrity import BucketSums
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.codec import HEADER_LIMITS
from areal_like.wire.curve import CurveServer
from areal_like.wire.messages import TAGS
from areal_like.wire.messages.weights import (
    TO_SERVER,
    Alive,
    AskAlive,
    DissolveGroup,
    FormGroup,
    PushChecksums,
    PushWeights,
    ReadyToReceive,
    ScoreTokens,
    TokenScores,
    WeightsFailed,
    WeightsOk,
)
from rollout_server.policy.client import EngineClient
from rollout_server.weights.checks import check_adapter, check_base, check_score, reason_to_refuse
from rollout_server.weights.strategy import OnUntrusted, WeightPush, WeightUpdateStrategy

log = logging.getLogger(__name__)

_CLEANUP_TIMEOUT_S = 5.0
"""Time limit of each call to the engine after a failure, and of waiting for a cancelled request."""
_MAX_QUEUED = 16
"""Maximum number of waiting requests. A trainer sends the next one after the response to the last; two
trainers may overlap."""
_MAX_REQUEST_BYTES = (1 << 10) + max(HEADER_LIMITS[TAGS[kind]] for kind in TO_SERVER)
"""Maximum message size: requests have no arrays, and encryption adds a few bytes. libzmq buffers up to this
much from a stranger without a key."""
_MAX_REMEMBERED = 64
"""Number of requests remembered to recognize repetitions."""
_SCORE_TIMEOUT_S = 30.0
"""Time limit for scoring tokens; an engine that is full responds once it has room."""
_NO_ENGINE = "this server's engine is not running"
_MIN_TIMEOUT_S = 0.001
"""Shortest timeout passed to the engine, for which 0 would mean no timeout."""


class RepeatedRequests:
    """Recognizes requests that rank 0 repeats because a renewed key interrupted the connection. Pure.

    A repeated request is not performed again: its response is sent again, or once it is available.

    unknown -> is_new() -> waits or is being handled -> record() -> responded
    """

    def __init__(self) -> None:
        self._responses: dict[tuple[bytes, int], WeightsOk | WeightsFailed | None] = {}
        """Responses by (route, request id); None: the request is waiting or being handled."""

    def is_new(self, envelope: Envelope) -> bool:
        """Remembers a request; returns False if it is a repetition. A request without an id is always new."""
        request = (envelope.peer, envelope.rid)
        if envelope.rid == 0:
            return True
        if request in self._responses:
            return False
        self._responses[request] = None
        if len(self._responses) > _MAX_REMEMBERED:
            del self._responses[next(iter(self._responses))]
        return True

    def response_to(self, envelope: Envelope) -> WeightsOk | WeightsFailed | None:
        """Returns the recorded response; None if there is none yet."""
        return self._responses.get((envelope.peer, envelope.rid))

    def record(self, envelope: Envelope, response: WeightsOk | WeightsFailed) -> None:
        """Records the response to a remembered request."""
        if (envelope.peer, envelope.rid) in self._responses:
            self._responses[envelope.peer, envelope.rid] = response


class WeightReceiver:
    """Performs the weight updates of one server. Create it in the event loop that serves it.

    `engine` is None while there is no engine to update: every request is then refused.
    """

    def __init__(
        self,
        *,
        host: str,
        max_message_bytes: int,
        strategy: WeightUpdateStrategy,
        on_version: Callable[[int], None],
        on_untrusted: OnUntrusted,
        curve: CurveServer | None = None,
        integrity: str = "none",
        base: str = "",
    ) -> None:
        """`on_version` is called with each activated version, `on_untrusted` with the reason if the engine's
        weights are unknown. `curve`: keys that may push weights. `integrity`: `weights.integrity` of this
        server; `sha256` refuses a push without digests. `base`: `base_digest` of the model, if pushes are
        LoRA adapters of it (`weights.lora=adapter`); empty if they are all weights."""
        self.listener = Listener(
            host=host,
            port=0,
            handler=self._on_request,
            max_message_bytes=min(max_message_bytes, _MAX_REQUEST_BYTES),
            setting="rollout.host",
            curve=curve,
            accepts=TO_SERVER,
        )
        """The control socket."""
        self.port = self.listener.port
        self.engine: EngineClient | None = None
        self.version = 0
        """Version that is active in the engine."""
        self.num_pushes = 0
        self.num_failures = 0
        self.seconds_total = 0.0
        """Time from request to activation, summed over pushes, in seconds."""
        self.stall_seconds_total = 0.0
        """Time in which a push kept the engine from decoding, summed over pushes."""
        self._strategy = strategy
        self._on_version = on_version
        self._on_untrusted = on_untrusted
        self._host = host
        self._integrity = integrity
        self._base = base
        self._group_name = ""
        self._group_peer = b""
        """Peer that formed the group."""
        self.work: asyncio.Task[None] | None = None
        """The task that handles the current request."""
        self._work_peer = b""
        """Its sender."""
        self._is_cancellable = False
        self._ready: ReadyToReceive | None = None
        """The message that was sent for the push that is being received."""
        self._sent_checksums: PushChecksums | None = None
        self._checksums_arrived = asyncio.Event()
        self._repeated = RepeatedRequests()
        self._scoring: asyncio.Task[None] | None = None
        """The task that handles a ScoreTokens; pushes do not wait for it."""
        self._queue: asyncio.Queue[Envelope] = asyncio.Queue(_MAX_QUEUED)
        self.serving = asyncio.create_task(self._serve(), name="weights")
        """Ends only through `close` or with an unexpected exception."""

    def set_engine(self, engine: EngineClient | None, *, version: int = 0) -> None:
        """Records that an engine was started with this version, or lost (None), together with its weight
        group."""
        self.engine, self.version, self._group_name = engine, version, ""
        if self.work is not None:
            self.work.cancel()

    async def close(self) -> None:
        """Cancels a running push, reports it as failed to the trainer, and closes the socket."""
        if self.work is not None:
            self.work.cancel()
            await asyncio.wait([self.work], timeout=_CLEANUP_TIMEOUT_S)
        if self._scoring is not None:
            self._scoring.cancel()
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        self.listener.close()

    def _on_request(self, envelope: Envelope) -> None:
        if isinstance(envelope.message, AskAlive):
            self._respond(envelope, self._alive())
            if self._ready is not None and envelope.peer == self._group_peer:
                self.listener.send(envelope.peer, self._ready)
            return
        if isinstance(envelope.message, PushChecksums):
            if envelope.peer == self._group_peer:
                self._sent_checksums = envelope.message
                self._checksums_arrived.set()
            return
        if isinstance(envelope.message, ScoreTokens):
            self._start_scoring(envelope)
            return
        if not self._repeated.is_new(envelope):
            if (response := self._repeated.response_to(envelope)) is not None:
                self._respond(envelope, response)
            return
        if reason := self._reason_to_refuse(envelope.message):
            self._finish(envelope, WeightsFailed(version=self.version, reason=reason))
            return
        # FormGroup and DissolveGroup cancel a rendezvous or broadcast that may be waiting for a dead rank.
        is_newer = isinstance(envelope.message, FormGroup) or (
            isinstance(envelope.message, DissolveGroup) and envelope.peer == self._work_peer
        )
        if is_newer and self.work is not None and self._is_cancellable:
            self.work.cancel()
        self._queue.put_nowait(envelope)

    async def _serve(self) -> None:
        """Handles requests one after the other."""
        while True:
            envelope = await self._queue.get()
            self._work_peer = envelope.peer
            self.work = asyncio.create_task(
                self._handle(envelope), name=f"weights:{type(envelope.message).__name__}"
            )
            await asyncio.wait([self.work])
            if not self.work.cancelled():
                self.work.result()
            self.work, self._work_peer = None, b""

    async def _handle(self, envelope: Envelope) -> None:
        """Performs one request and always sends a response, even if it fails or is cancelled."""
        request = envelope.message
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        response: WeightsOk | WeightsFailed = WeightsFailed(
            version=self.version, reason=f"cannot handle {type(request).__name__}"
        )
        try:
            stall_s = await self._perform(request, peer=envelope.peer)
            response = WeightsOk(
                version=self.version,
                seconds=loop.time() - started_s,
                stall_seconds=stall_s,
                base_digest=self.engine.base_digest if self.engine is not None else "",
            )
        except (EngineError, WeightSyncError) as error:
            response = WeightsFailed(version=self.version, reason=str(error))
        except asyncio.CancelledError:
            response = WeightsFailed(
                version=self.version, reason=f"{type(request).__name__} was cancelled before it was done"
            )
        finally:
            self._finish(envelope, response)

    def _reason_to_refuse(self, request: Any) -> str:
        """Returns why a request is not queued; empty if it can be."""
        if self._queue.full():
            return f"{_MAX_QUEUED} requests are waiting already"
        num_ranks = self.engine.info.num_ranks if self.engine is not None else 1
        return reason_to_refuse(request, host=self._host, num_ranks=num_ranks, integrity=self._integrity)

    def _finish(self, envelope: Envelope, response: WeightsOk | WeightsFailed) -> None:
        """Responds to a request and counts it."""
        self._respond(envelope, response)
        self._repeated.record(envelope, response)
        request = envelope.message
        if isinstance(response, WeightsFailed):
            self.num_failures += 1
            # For a peer without a group only failures 1, 2, 4, 8, ... are logged, because it may cause
            # millions.
            if envelope.peer == self._group_peer or self.num_failures.bit_count() == 1:
                log.warning("%s failed: %s", type(request).__name__, response.reason)
        elif isinstance(request, PushWeights):
            self.num_pushes += 1
            self.seconds_total += response.seconds
            self.stall_seconds_total += response.stall_seconds
            _record_push(response)
            self._on_version(response.version)

    def _alive(self) -> Alive | WeightsFailed:
        if self.engine is None:
            return WeightsFailed(version=self.version, reason=_NO_ENGINE)
        return Alive(version=self.version, **dataclasses.asdict(self.engine.info))

    def _respond(self, envelope: Envelope, response: Alive | WeightsOk | WeightsFailed | TokenScores) -> None:
        self.listener.send(envelope.peer, response, rid=envelope.rid)

    def _start_scoring(self, envelope: Envelope) -> None:
        """Scores tokens in a task, one request at a time; others are refused meanwhile."""
        engine = self.engine if envelope.peer == self._group_peer else None
        reason = "" if engine is not None else "no engine that this peer may ask"
        if self._scoring is not None and not self._scoring.done():
            reason = "another request is being scored"
        try:
            check_score(envelope.message)
        except WeightSyncError as error:
            reason = str(error)
        if engine is None or reason:
            self._respond(envelope, WeightsFailed(version=self.version, reason=reason))
            return
        self._scoring = asyncio.create_task(self._score(envelope, engine), name="weights:ScoreTokens")

    async def _score(self, envelope: Envelope, engine: EngineClient) -> None:
        request: ScoreTokens = envelope.message
        try:
            async with asyncio.timeout(_SCORE_TIMEOUT_S):
                logprobs, scored_by = await engine.score(request.tokens, first=request.first)
        except (EngineError, TimeoutError) as error:
            reason = str(error) or f"no log-probs within {_SCORE_TIMEOUT_S:g} s"
            self._respond(envelope, WeightsFailed(version=self.version, reason=reason))
        else:
            self._respond(envelope, TokenScores(version=scored_by, logprobs=logprobs))

    async def _perform(self, request: Any, *, peer: bytes) -> float:
        """Performs a request; returns for how many seconds the engine did not decode."""
        if self.engine is None:
            raise EngineError(_NO_ENGINE)
        match request:
            case FormGroup():
                await self._join_group(self.engine, request, peer=peer)
                return 0.0
            case DissolveGroup():
                if request.group_name == self._group_name:
                    self._check_peer(peer)
                    await self._leave_group(self.engine)
                return 0.0
            case PushWeights():
                if request.group_name != self._group_name:
                    raise WeightSyncError(
                        f"the push is for weight group {request.group_name!r} of session {request.epoch}, "
                        f"the engine is in group {self._group_name!r}"
                    )
                self._check_peer(peer)
                return await self._push(self.engine, request)
        raise WeightSyncError(f"unexpected {type(request).__name__} on the weight control socket")

    def _check_peer(self, peer: bytes) -> None:
        if peer != self._group_peer:
            raise WeightSyncError(f"weight group {self._group_name!r} was formed by another peer")

    async def _join_group(self, engine: EngineClient, request: FormGroup, *, peer: bytes) -> None:
        if self._group_name:
            await self._leave_group(engine)
        # Recorded before joining, because after a cancelled rendezvous the group still has to be left.
        self._group_name, self._group_peer, self._sent_checksums = request.group_name, peer, None
        with self._cancellable():
            await self._strategy.join_group(engine, request)

    async def _leave_group(self, engine: EngineClient) -> None:
        group_name, self._group_name = self._group_name, ""
        try:
            await self._strategy.leave_group(engine, group_name)
        except (EngineError, WeightSyncError) as error:
            # The engine never joined the group, or has left it already.
            log.info("leaving group %s: %s", group_name, error)

    async def _push(self, engine: EngineClient, request: PushWeights) -> float:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + request.timeout_s
        manifest = Manifest.from_dict(request.manifest)
        check_adapter(manifest.adapter, base=self._base)
        check_base(request, version=self.version, base_digest=engine.base_digest)
        push = WeightPush(
            request=request,
            manifest=manifest,
            left_s=lambda: max(_MIN_TIMEOUT_S, end_s - loop.time()),
            cancellable=self._cancellable,
            ready=lambda: self._send_ready(request.version),
            sent_sums=lambda: self._wait_sums(request.version),
        )
        try:
            async with asyncio.timeout(request.timeout_s):
                stall_s = await self._strategy.push(engine, push)
        except (TimeoutError, EngineError, WeightSyncError) as error:
            if not await self._is_active_after_all(engine, request.version):
                # The sender may be waiting for this engine to receive the next bucket. If the engine leaves
                # the group, the sender's broadcast fails at once, not at its time limit.
                await self._leave_group(engine)
                if isinstance(error, TimeoutError):
                    raise WeightSyncError(
                        f"version {request.version} was not active within {request.timeout_s:.4g} s"
                    ) from None
                raise
            stall_s = 0.0  # the swap succeeded, only the engine's response was lost
        finally:
            self._ready = None
        self.version = request.version
        return stall_s

    def _send_ready(self, version: int) -> None:
        self._ready = ReadyToReceive(version=version)
        self.listener.send(self._group_peer, self._ready)

    async def _wait_sums(self, version: int) -> BucketSums:
        """Waits for the sender's sums for this version, which may arrive before or after the buckets."""
        while self._sent_checksums is None or self._sent_checksums.version != version:
            self._checksums_arrived.clear()
            await self._checksums_arrived.wait()
        return BucketSums(checksums=self._sent_checksums.checksums, digests=self._sent_checksums.digests)

    @contextlib.contextmanager
    def _cancellable(self) -> Iterator[None]:
        """Context in which a newer control message may cancel the work; weights are swapped outside it,
        because a swap must be completed once started."""
        self._is_cancellable = True
        try:
            yield
        finally:
            self._is_cancellable = False

    async def _is_active_after_all(self, engine: EngineClient, version: int) -> bool:
        """After a failed push, asks the engine if the new version is active.

        Calls `on_untrusted` if the engine does not respond.
        """
        try:
            async with asyncio.timeout(_CLEANUP_TIMEOUT_S):
                return await engine.weight_version() == version
        except (EngineError, TimeoutError) as error:
            self._on_untrusted(
                f"it does not report its weight version after a failed push of version {version}: {error}"
            )
            return False


def _record_push(response: WeightsOk) -> None:
    """Writes a completed push to the log and the trace."""
    log.debug(
        "version %d active after %.3f s (stalled %.3f s)",
        response.version,
        response.seconds,
        response.stall_seconds,
    )
    start_s = time.monotonic() - response.seconds
    stall_s = round(response.stall_seconds, 4)
    recorder.record("weights", f"v{response.version}", start_s=start_s, stall_s=stall_s)
