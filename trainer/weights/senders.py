"""The ranks that send the buckets of a push: rank 0, and with `weights.senders` others (their *senders*).

Rank 0 alone talks to the rollout servers, and decides what is pushed and when. It requests the rest from each
other sender over a gloo group of the senders, as JSON:

    open -> connect -> close_store -> { (stage) -> send, begin } * -> leave -> forget      for each session

Every sender has a weight group of its own in a session, of itself and the engines, because a group's
broadcasts have one source in SGLang and run one after the other in gloo.

Requests run in threads, so that a session that hangs does not delay others. If a sender dies, its connection
breaks and every request to it fails at once; if rank 0 dies, the others leave their groups. The ranks of a
trainer trust one another; the group has the security of their other groups (docs/reference/weights.md).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from areal_like.errors import ConfigError, WeightSyncError
from areal_like.runtime.threads import NamedThread
from areal_like.weights.integrity import BucketSums
from areal_like.weights.weight_group import WeightGroup, address_toward, device_facts
from areal_like.wire.messages.weights import SenderAddress, group_name_of
from trainer.distributed.ranks import Ranks
from trainer.weights.bucket_sender import BucketSender, SentShare, Traffic
from trainer.weights.snapshot import Snapshot, WeightSnapshotter

log = logging.getLogger(__name__)

_GROUP_TIMEOUT = timedelta(days=30)
"""Longest time between two requests: a run may not push for hours."""
_QUICK_S = 10.0
"""Time limit of a request that neither gathers, connects nor sends."""
_GRACE_S = 5.0
"""Time in which a sender reports its own timeout."""
_ASK_EVERY_S = 0.2
"""Interval at which a sender that waits for the engines is checked for an early failure."""


class _Channel:
    """Exchanges JSON between two ranks of a gloo group. Raises RuntimeError when the peer is gone."""

    def __init__(self, group: dist.ProcessGroup, *, peer: int) -> None:
        self._group = group
        self._peer = peer
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message. From any thread."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        with self._lock:
            dist.send(torch.tensor([len(data)]), group=self._group, group_dst=self._peer)
            dist.send(data, group=self._group, group_dst=self._peer)

    def receive(self) -> dict[str, Any]:
        """Waits for the next message. From one thread."""
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, group=self._group, group_src=self._peer)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, group=self._group, group_src=self._peer)
        message: dict[str, Any] = json.loads(data.numpy().tobytes())
        return message


class SenderLink:
    """Rank 0's connection to another sender. Its methods block and may be called from any thread.

    OPEN -> close(), or the rank is gone -> LOST: every request fails
    """

    def __init__(self, channel: _Channel, *, rank: int) -> None:
        self.rank = rank
        self._channel = channel
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._replies: dict[int, Future[dict[str, Any]]] = {}
        self._lost = ""
        """Why nothing can be requested any more."""
        self._reader = NamedThread(self._read, name=f"sender-{rank}")
        self._reader.start()

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """`device_facts` of that rank. Raises WeightSyncError."""
        facts: dict[str, str] = self.call("facts", timeout_s=_QUICK_S)
        return facts

    def start(self, do: str, **arguments: Any) -> tuple[int, Future[dict[str, Any]]]:
        """Sends a request; returns its id, and a future of its reply."""
        reply: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._lost:
                raise WeightSyncError(self._lost)
            request_id = next(self._ids)
            self._replies[request_id] = reply
        try:
            self._channel.send({"id": request_id, "do": do, **arguments})
        except RuntimeError as error:
            self._lose(str(error))
        return request_id, reply

    def result(self, reply: Future[dict[str, Any]], *, timeout_s: float) -> dict[str, Any]:
        """Waits for a reply. Raises WeightSyncError if the request failed, or after `timeout_s`."""
        try:
            found = reply.result(timeout_s)
        except TimeoutError:
            raise WeightSyncError(
                f"trainer rank {self.rank} did not reply within {timeout_s:.4g} s"
            ) from None
        if "error" in found:
            raise WeightSyncError(f"trainer rank {self.rank}: {found['error']}")
        return found

    def call(self, do: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its reply."""
        return self.result(self.start(do, **arguments)[1], timeout_s=timeout_s)

    def close(self) -> None:
        """Ends the other rank's thread."""
        with contextlib.suppress(WeightSyncError):
            self.call("close", timeout_s=_QUICK_S)
        self._lose("closed")

    def _read(self) -> None:
        try:
            while not self._lost:
                reply = self._channel.receive()
                with self._lock:
                    waiting = self._replies.pop(reply["id"], None)
                if waiting is not None:
                    waiting.set_result(reply)
                if reply.get("closed"):
                    return
        except RuntimeError as error:
            self._lose(str(error))

    def _lose(self, reason: str) -> None:
        with self._lock:
            self._lost = self._lost or f"trainer rank {self.rank}, a sender of weights, is gone: {reason}"
            waiting, self._replies = self._replies, {}
        for reply in waiting.values():
            reply.set_exception(WeightSyncError(self._lost))


class RemoteEnd:
    """Another rank's end of one session: each method does there what that of BucketSender does."""

    def __init__(self, link: SenderLink, *, session: int, timeout_s: float, **form: Any) -> None:
        """Opens the store there. `timeout_s`: of the group; `form`: see `SenderService._open`."""
        self._link = link
        self._session = session
        self._timeout_s = timeout_s
        reply = link.start("open", session=session, group_timeout_s=timeout_s, **form)[1]
        try:
            found = link.result(reply, timeout_s=_QUICK_S)
        except WeightSyncError:
            # Unless the sender has refused, it may be about to open, or has just done so.
            if not reply.done() or (reply.exception() is None and "error" not in reply.result()):
                self.forget()
            raise
        self.store = SenderAddress(address=found["address"], port=found["port"])

    def connect(self) -> None:
        self._call("connect", timeout_s=self._timeout_s + _GRACE_S)

    def close_store(self) -> None:
        with contextlib.suppress(WeightSyncError):
            self._call("close_store", timeout_s=_QUICK_S)

    def stage(self, snapshot: Snapshot, *, integrity: str, timeout_s: float) -> None:
        self._call("stage", timeout_s=timeout_s + _GRACE_S, snapshot=snapshot.number, integrity=integrity)

    def send(
        self,
        snapshot: Snapshot,
        *,
        integrity: str,
        timeout_s: float,
        may_begin: threading.Event,
        base: int | None = None,
    ) -> SentShare:
        settings = {
            "snapshot": snapshot.number,
            "integrity": integrity,
            "timeout_s": timeout_s,
            "base": base,
        }
        request_id, reply = self._link.start("send", session=self._session, **settings)
        while not may_begin.wait(_ASK_EVERY_S):
            if reply.done():  # it could not read its first bucket, or is gone
                break
        self._link.start("begin", session=self._session, send=request_id)
        found = self._link.result(reply, timeout_s=2 * timeout_s + _GRACE_S)
        return SentShare(
            sums=BucketSums(checksums=found["checksums"], digests=found["digests"]),
            traffic=Traffic(**found["traffic"]),
        )

    def leave(self) -> None:
        with contextlib.suppress(WeightSyncError):  # a sender that is gone has left
            self._call("leave", timeout_s=_QUICK_S)

    def forget(self) -> None:
        with contextlib.suppress(WeightSyncError):
            self._link.start("forget", session=self._session)

    def _call(self, do: str, *, timeout_s: float, **arguments: Any) -> None:
        self._link.call(do, timeout_s=timeout_s, session=self._session, **arguments)


SendingEnd = BucketSender | RemoteEnd
"""One sender's end of one session. Its methods block; connecting, staging and sending raise
WeightSyncError."""


class SenderService:
    """Does what rank 0 requests, on another sender.

    SERVING -> close, or rank 0 is gone -> every group is left, the thread ends
    """

    def __init__(
        self,
        channel: _Channel,
        snapshotter: WeightSnapshotter,
        *,
        number: int,
        device: torch.device,
        ports: Sequence[int],
    ) -> None:
        """`number`: this rank's among the senders. `ports`: `weights.port_range`."""
        self._channel = channel
        self._snapshotter = snapshotter
        self._number = number
        self._device = device
        self._ports = ports
        self._ends: dict[int, BucketSender] = {}
        """Number of a session -> this rank's end of it."""
        self._forgotten: set[int] = set()
        """Sessions that rank 0 has given up before they were open."""
        self._has_ended = False
        """Nothing else may be opened."""
        self._lock = threading.Lock()
        """For the three above."""
        self._may_begin: dict[int, threading.Event] = {}
        """Id of a request to send -> set when the engines are ready."""

    def serve(self) -> None:
        """Runs until rank 0 closes or is gone."""
        try:
            while (request := self._channel.receive())["do"] != "close":
                self._start(request)
            self._channel.send({"id": request["id"], "closed": True})
        except RuntimeError as error:
            log.info("this rank has stopped sending weights: %s", error)
        with self._lock:
            self._has_ended, ends = True, list(self._ends.values())
        for end in ends:
            end.leave()

    def _start(self, request: dict[str, Any]) -> None:
        """Begins a request in a thread. What must not be late is done at once."""
        match request["do"]:
            case "begin":
                if (may_begin := self._may_begin.get(request["send"])) is not None:
                    may_begin.set()
                return
            case "forget":
                with self._lock:
                    end = self._ends.pop(request["session"], None)
                    if end is None:
                        self._forgotten.add(request["session"])
                if end is not None:
                    end.forget()
                return
            case "send":
                self._may_begin[request["id"]] = threading.Event()
        name = f"weight-session-{request.get('session', 0)}"
        NamedThread(functools.partial(self._handle, request), name=name).start()

    def _handle(self, request: dict[str, Any]) -> None:
        actions: dict[str, Callable[..., dict[str, Any] | None]] = {
            "facts": self._facts,
            "open": self._open,
            "connect": lambda request: self._ends[request["session"]].connect(),
            "close_store": lambda request: self._ends[request["session"]].close_store(),
            "stage": self._stage,
            "send": self._send,
            "leave": lambda request: self._ends[request["session"]].leave(),
        }
        try:
            reply = actions[request["do"]](request) or {}
        except (WeightSyncError, ConfigError) as error:
            reply = {"error": str(error)}
        except (RuntimeError, OSError) as error:  # torch, no route to rank 0, or a session that has ended
            reply = {"error": f"{request['do']} failed: {error}"}
        except KeyError:
            reply = {"error": f"{request['do']}: session {request.get('session')} has ended"}
        with contextlib.suppress(RuntimeError):  # rank 0 is gone: `serve` ends
            self._channel.send({"id": request["id"], **reply})

    def _facts(self, request: dict[str, Any]) -> dict[str, Any]:
        return dict(device_facts(self._device))

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        """`toward`: address and port of rank 0's store. This sender's store listens on the address of this
        machine on the route there."""
        session: int = request["session"]
        group = WeightGroup.create(
            host=address_toward(*request["toward"]),
            ports=self._ports,
            world_size=request["world_size"],
            group_name=group_name_of(request["group_name"], sender=self._number),
            backend=request["backend"],
            timeout_s=request["group_timeout_s"],
            secret=request["secret"],
        )
        end = BucketSender(
            group,
            device=self._device,
            name=f"weight-session-{session}",
            sender=self._number,
            num_senders=len(self._snapshotter.sender_ranks),
        )
        with self._lock:
            is_late = self._has_ended or session in self._forgotten
            self._forgotten.discard(session)
            if not is_late:
                self._ends[session] = end
        if is_late:
            end.leave()
            end.forget()
            raise WeightSyncError("it took too long to open the session")
        return {"address": group.address, "port": group.port}

    def _stage(self, request: dict[str, Any]) -> None:
        snapshot = self._snapshotter.find(request["snapshot"])
        self._ends[request["session"]].stage(snapshot, integrity=request["integrity"], timeout_s=0.0)

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            sent = self._ends[request["session"]].send(
                self._snapshotter.find(request["snapshot"]),
                integrity=request["integrity"],
                timeout_s=request["timeout_s"],
                may_begin=self._may_begin[request["id"]],
                base=request["base"],
            )
        finally:
            del self._may_begin[request["id"]]
        return {
            "checksums": sent.sums.checksums,
            "digests": sent.sums.digests,
            "traffic": asdict(sent.traffic),
        }


class Senders:
    """This rank's part in sending. Create and `close` it on all ranks at the same time."""

    def __init__(self, snapshotter: WeightSnapshotter, ranks: Ranks, *, ports: Sequence[int]) -> None:
        """`ports`: `weights.port_range`, for the stores of the other senders. Collective."""
        self.links: list[SenderLink] = []
        """On rank 0: one for each other sender, in the order of their numbers."""
        self._serving: NamedThread | None = None
        sender_ranks = snapshotter.sender_ranks
        if len(sender_ranks) == 1:
            return
        group = dist.new_group(list(sender_ranks), backend="gloo", timeout=_GROUP_TIMEOUT)
        if ranks.rank == 0:
            self.links = [
                SenderLink(_Channel(group, peer=number), rank=rank)
                for number, rank in enumerate(sender_ranks)
                if number
            ]
        elif ranks.rank in sender_ranks:
            service = SenderService(
                _Channel(group, peer=0),
                snapshotter,
                number=sender_ranks.index(ranks.rank),
                device=ranks.device,
                ports=ports,
            )
            self._serving = NamedThread(service.serve, name="sender")
            self._serving.start()

    def close(self) -> None:
        """Ends the threads of all ranks. Call it after the last push has ended."""
        for link in self.links:
            link.close()
        if self._serving is not None:
            self._serving.join()
