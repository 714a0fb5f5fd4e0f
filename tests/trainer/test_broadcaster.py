"""Pushes over real sockets and real gloo groups: to servers that join, fail, stop replying and die."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_like.config import WeightsConfig
from areal_like.errors import ArealError, ConfigError, WeightSyncError
from areal_like.runtime.waits import PendingWaits
from areal_like.security.administration import init_keys, revoke_key
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyDirectory, KeyRole
from areal_like.weights.buckets import Manifest, checksum, unflatten
from areal_like.weights.deltas import HEADER_BYTES, Header, apply
from areal_like.weights.integrity import BucketSums, weights_digest
from areal_like.weights.weight_group import WeightGroup
from areal_like.wire.channel import Envelope, Listener, tcp_address
from areal_like.wire.messages.consumer import ServerEntry, VersionGranted
from areal_like.wire.messages.weights import (
    Alive,
    AskAlive,
    DissolveGroup,
    FormGroup,
    PushChecksums,
    PushWeights,
    ReadyToReceive,
    WeightsFailed,
    WeightsOk,
)
from tests.support.snapshots import Held
from tests.support.waiting import HANG_LIMIT_S
from trainer.weights.backend import NcclTrial, choose_backend, refuse_mixed_nccl
from trainer.weights.broadcaster import _FORM_S, ALIVE_S, Broadcaster, assign_ranks
from trainer.weights.publisher import OWN_FAILURE, Publisher, PushReport, retry_delay_s
from trainer.weights.receivers import Receiver, ReceiverBackoff, ReceiverId, receiver_id, split_groups
from trainer.weights.senders import SenderLink
from trainer.weights.snapshot import GatheredBucket

SERVERS: list[FakeServer] = []
"""Those of a test, which `run` closes."""


class FakeServer:
    """A rollout server's weight socket without an engine. It keeps the tensors it receives.

    `misbehave` selects a fault: mute (no replies), refuse (FormGroup), decline (PushWeights, without
    receiving), protest (the same, but it receives), reject (after receiving), leave (the group), die (leave
    and be silent), hang (silent in the group), vanish (mute after the whole broadcast), expire (mute before
    it is ready to receive).
    """

    def __init__(self, name: str, *, incarnation: int = 1) -> None:
        self.name, self.incarnation = name, incarnation
        self.version = 0
        self.loads_in_place = False
        self.may_be_ready = asyncio.Event()
        """Cleared by a test whose server takes its time before it is ready."""
        self.may_be_ready.set()
        self.tensors: dict[str, torch.Tensor] = {}
        self.flats: list[torch.Tensor] = []
        """The buckets of the last push."""
        self.bases: list[int] = []
        """`base_version` of each push that was received."""
        self.confirms = True
        """Whether what it has can be the base of a push."""
        self.base_digest = ""
        self.misbehave = ""
        self.stated: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.group: WeightGroup | None = None
        self.thread = ThreadPoolExecutor(max_workers=4)
        self.pushed: asyncio.Task[None] | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.listener = Listener(host="127.0.0.1", port=0, handler=self.handle, max_message_bytes=1 << 20)
        SERVERS.append(self)

    @property
    def entry(self) -> ServerEntry:
        address = tcp_address("127.0.0.1", self.listener.port)
        return ServerEntry(
            name=self.name,
            incarnation=self.incarnation,
            weights_address=address,
            device="cpu",
            state="serving",
            weights_version=self.version,
        )

    def handle(self, envelope: Envelope) -> None:
        if self.misbehave == "mute":
            return
        if isinstance(envelope.message, PushChecksums):
            self.stated.set_result(envelope.message.checksums)
            return
        if isinstance(envelope.message, PushWeights):
            self.stated = asyncio.get_running_loop().create_future()
            self.pushed = asyncio.get_running_loop().create_task(self.answer(envelope))
            return
        if isinstance(envelope.message, DissolveGroup):
            self.leave()
            if self.pushed is not None:
                self.pushed.cancel()
        task = asyncio.get_running_loop().create_task(self.answer(envelope))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self, envelope: Envelope) -> None:
        loop = asyncio.get_running_loop()
        try:
            match envelope.message:
                case FormGroup() as form:
                    self.group = await loop.run_in_executor(self.thread, self.join, form)
                case PushWeights() as push:
                    if self.misbehave == "decline":
                        raise WeightSyncError("will not have it")
                    if self.misbehave == "expire":
                        self.misbehave = "mute"
                        return
                    await self.may_be_ready.wait()
                    self.listener.send(envelope.peer, ReadyToReceive(version=push.version))
                    if self.misbehave in ("die", "leave"):
                        self.leave()
                    if self.misbehave in ("die", "hang"):
                        return
                    receiving = loop.run_in_executor(self.thread, self.receive, push)
                    if self.misbehave == "protest":
                        raise WeightSyncError("will not have it")
                    found = await receiving
                    if self.misbehave != "vanish":
                        assert await self.stated == found
                        self.activate(push)
                case AskAlive():
                    alive = Alive(
                        version=self.version,
                        num_ranks=1,
                        device="cpu",
                        device_uuid="",
                        nccl_version="",
                        authenticates_store=True,
                        loads_in_place=self.loads_in_place,
                    )
                    self.listener.send(envelope.peer, alive, rid=envelope.rid)
                    return
                case DissolveGroup():
                    pass
        except (WeightSyncError, asyncio.CancelledError) as error:
            self.listener.send(
                envelope.peer, WeightsFailed(version=self.version, reason=str(error)), rid=envelope.rid
            )
            return
        if self.misbehave == "vanish":  # after the whole broadcast, so that the broadcast does not break
            self.misbehave = "mute"
            return
        activated = WeightsOk(version=self.version, base_digest=self.base_digest if self.confirms else "")
        self.listener.send(envelope.peer, activated, rid=envelope.rid)

    def join(self, form: FormGroup) -> WeightGroup:
        if self.misbehave == "refuse":
            raise WeightSyncError("no room for a group")
        return WeightGroup.join(
            master_address=form.master_address,
            master_port=form.master_port,
            rank=form.rank,
            world_size=form.world_size,
            group_name=form.group_name,
            backend=form.backend,
            timeout_s=form.timeout_s,
            secret=form.secret,
        )

    def receive(self, push: PushWeights) -> list[int]:
        checksums, flats = [], []
        buckets = Manifest.from_dict(push.manifest).buckets
        assert not push.base_digest or push.base_digest == self.base_digest
        self.bases.append(push.base_version)
        for index, bucket in enumerate(buckets):
            if self.group is None:
                raise WeightSyncError("left the group")
            data = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            if push.base_digest:
                self.group.broadcast(raw := torch.empty(HEADER_BYTES, dtype=torch.uint8))
                header = Header.parse(raw, bucket)
                payload = torch.empty(header.payload_bytes, dtype=torch.uint8)
                if header.payload_bytes:
                    self.group.broadcast(payload)
                apply(header, payload, data.copy_(self.flats[index]))
            else:
                self.group.broadcast(data)
            checksums.append(checksum(data))
            flats.append(data)
            self.tensors |= unflatten(bucket, data)
        self.flats = flats
        self.base_digest = weights_digest(buckets, BucketSums(checksums=checksums, digests=[]))
        return checksums

    def activate(self, push: PushWeights) -> None:
        if self.misbehave == "reject":
            raise WeightSyncError("verification failed")
        self.version = push.version

    def leave(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.close()

    def close(self) -> None:
        SERVERS.remove(self)
        self.leave()
        self.listener.close()
        self.thread.shutdown(wait=False)


def snapshot(value: float, *, size: int = 300) -> Held:
    return Held(
        {"a": torch.full((size,), float(value)), "b": torch.full((7, 3), value + 1.0)}, bucket_bytes=1024
    )


def run(
    body: Callable[[Broadcaster], Awaitable[None]], *, deadline_s: float = HANG_LIMIT_S, **settings: Any
) -> None:
    async def bounded() -> None:
        broadcaster = Broadcaster(WeightsConfig(push_deadline_s=deadline_s, **settings), device="cpu")
        try:
            async with asyncio.timeout(HANG_LIMIT_S):
                await body(broadcaster)
        finally:
            await broadcaster.close(())
            for server in [*SERVERS]:
                server.close()

    asyncio.run(bounded())


@pytest.fixture(autouse=True)
def nothing_ends_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except where a test sets a shorter back-off, or is `impatient`."""
    monkeypatch.setattr(
        "trainer.weights.broadcaster.ReceiverBackoff", lambda: ReceiverBackoff(first_s=HANG_LIMIT_S)
    )
    monkeypatch.setattr("trainer.weights.broadcaster._FORM_S", HANG_LIMIT_S)
    monkeypatch.setattr("trainer.weights.broadcaster.ALIVE_S", HANG_LIMIT_S)


@pytest.fixture
def impatient(nothing_ends_with_time: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server that does not reply, or leaves others in a broadcast, which ends at its own limit."""
    monkeypatch.setattr("trainer.weights.broadcaster._FORM_S", _FORM_S)
    monkeypatch.setattr("trainer.weights.broadcaster.ALIVE_S", ALIVE_S)


class Publishing(Publisher):
    """A publisher to these servers, with what it has reported."""

    def __init__(self, broadcaster: Broadcaster, *servers: FakeServer, **options: Any) -> None:
        self.reports, self.failures = list[PushReport](), list[ArealError]()
        self.to = list(servers)
        self._versions = iter(range(1, 100))
        super().__init__(
            broadcaster,
            servers=lambda: [server.entry for server in self.to],
            on_push=self.reports.append,
            on_failure=self.failures.append,
            **{"call": self._granted, **options},
        )

    async def _granted(self, _: Any, *, timeout_s: float) -> VersionGranted:
        return VersionGranted(version=next(self._versions))


def test_a_group_serves_many_pushes_until_a_server_joins() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        one, two = FakeServer("one"), FakeServer("two")
        for version in (1, 2, 3):
            outcome = await broadcaster.push(
                snapshot(version), version=version, step=version, servers=[one.entry]
            )
            assert (set(outcome.activated), outcome.failed) == ({"one"}, {})
        assert broadcaster.num_sessions == 1
        outcome = await broadcaster.push(snapshot(4), version=4, step=4, servers=[one.entry, two.entry])
        assert set(outcome.activated) == {"one", "two"}
        assert broadcaster.num_sessions == 2
        for receiver in (one, two):
            assert torch.equal(receiver.tensors["a"], torch.full((300,), 4.0))
            assert torch.equal(receiver.tensors["b"], torch.full((7, 3), 5.0))

    run(body)


@pytest.mark.parametrize(
    "how",
    [
        "reject",
        "die",
        "refuse",
        "vanish",
        *(pytest.param(how, marks=pytest.mark.long) for how in ("mute", "expire")),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_faulty_server_costs_the_others_one_push(how: str) -> None:
    async def body(broadcaster: Broadcaster) -> None:
        good, bad = FakeServer("good"), FakeServer("bad")
        await broadcaster.push(snapshot(1), version=1, step=1, servers=[good.entry, bad.entry])
        bad.misbehave = how
        if how in ("refuse", "mute"):  # these fail when a group is formed
            bad.incarnation += 1
        servers = [good.entry, bad.entry]
        outcome = await broadcaster.push(snapshot(2), version=2, step=2, servers=servers)
        assert "bad" in outcome.failed
        # The directory entry of `bad` has not changed, so it gets no push; `good` gets the new version.
        outcome = await broadcaster.push(snapshot(3), version=3, step=3, servers=servers)
        assert (set(outcome.activated), good.version, bad.version) == ({"good"}, 3, 1)
        # A new incarnation of `bad` is eligible again.
        bad.misbehave, bad.incarnation = "", bad.incarnation + 1
        outcome = await broadcaster.push(snapshot(4), version=4, step=4, servers=[good.entry, bad.entry])
        assert set(outcome.activated) == {"good", "bad"}

    run(body)  # the broadcaster notices it long before the deadline


@pytest.mark.usefixtures("impatient")
def test_a_broadcast_begins_when_every_server_is_ready() -> None:
    """The first bucket is read meanwhile. A server's report about another push does not count."""

    async def body(broadcaster: Broadcaster) -> None:
        fast, slow = FakeServer("fast"), FakeServer("slow")
        servers = [fast.entry, slow.entry]
        await broadcaster.push(snapshot(1), version=1, step=1, servers=servers)
        slow.may_be_ready.clear()
        fast.tensors.clear()
        pushed, was_read = snapshot(2), threading.Event()
        read = pushed.read
        pushed.read = lambda index: (was_read.set(), read(index))[1]  # type: ignore[method-assign]
        push = asyncio.create_task(broadcaster.push(pushed, version=2, step=2, servers=servers))
        while not was_read.is_set() or fast.pushed is None or slow.pushed is None:
            await asyncio.sleep(0.01)
        # Longer than the interval at which a server that is not ready is asked if it is alive.
        await asyncio.sleep(ALIVE_S + 0.5)
        assert not fast.tensors and not push.done()
        slow.may_be_ready.set()
        outcome = await push
        assert (set(outcome.activated), outcome.failed) == ({"fast", "slow"}, {})
        assert broadcaster.num_sessions == 1

    run(body)


@pytest.mark.parametrize("topology", ["shared", "per_engine"])
def test_a_member_without_the_base_costs_its_group_a_delta(topology: str) -> None:
    """After a join, a failure, and with a member that cannot have a base; with other members' groups."""

    async def body(broadcaster: Broadcaster) -> None:
        servers = [FakeServer(name) for name in ("a", "b", "c")]
        a, b, c = servers
        weights = {"w": torch.arange(600.0), "v": torch.zeros(70)}
        before: Held | None = None

        async def push(*to: FakeServer) -> list[bool]:
            """Which of these servers got only what has changed."""
            nonlocal before
            version = 1 + (0 if before is None else before.number)
            weights["w"][version] += 1.0
            before = Held(weights, bucket_bytes=1024, pushed_before=before)
            entries = [server.entry for server in to]
            outcome = await broadcaster.push(before, version=version, step=version, servers=entries)
            for server in to:
                assert (server.name in outcome.activated) == (not server.misbehave), outcome.failed
                assert server.bases[-1] in (-1, version - 1)
                if server.name in outcome.activated:
                    assert all(torch.equal(server.tensors[name], weights[name]) for name in weights)
            return [server.bases[-1] >= 0 for server in to]

        is_shared = topology == "shared"
        assert await push(a, b) == [False, False]
        assert await push(a, b) == [True, True]
        assert await push(a, b, c) == [not is_shared, not is_shared, False]
        assert await push(a, b, c) == [True, True, True]
        c.misbehave = "reject"
        assert await push(a, b, c) == [True, True, True]
        c.misbehave = ""
        assert await push(a, b) == [not is_shared, not is_shared], "the member that failed backs off"
        b.confirms = False
        assert await push(a, b) == [True, True]
        assert await push(a, b) == [not is_shared, False], "b has what it has, and no base"

    run(body, topology=topology)


def test_a_push_without_servers_is_not_an_error() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        outcome = await broadcaster.push(snapshot(1), version=1, step=1, servers=[])
        assert (outcome.activated, outcome.failed) == ({}, {})

    run(body)


def test_a_server_that_cannot_be_reached_costs_no_push(tmp_path: Path) -> None:
    """Its address is malformed, or its key was revoked after the push had begun."""

    async def body() -> None:
        init_keys(tmp_path / "keys", [KeyRole.TRAINER, KeyRole.ROLLOUT])
        directory = KeyDirectory(tmp_path / "keys")
        public = directory.identity("rollout").public
        keys = Keyring(directory, name="trainer", role=KeyRole.TRAINER)
        server = FakeServer("rollout-0")
        entry = dataclasses.replace(server.entry, public_key=public)
        server.close()
        Receiver.connected(entry, keys).link.close()
        revoke_key(tmp_path / "keys", "rollout")
        keys.refresh()
        with pytest.raises(WeightSyncError, match="is revoked"):
            Receiver.connected(entry, keys)

    asyncio.run(body())

    async def push(broadcaster: Broadcaster) -> None:
        healthy, other = FakeServer("healthy"), FakeServer("other")
        malformed = dataclasses.replace(other.entry, weights_address="tcp://127.0.0.1:port")
        outcome = await broadcaster.push(snapshot(1), version=1, step=0, servers=[malformed, healthy.entry])
        assert list(outcome.activated) == ["healthy"] and list(outcome.failed) == ["other"]

    run(push)


@pytest.mark.usefixtures("impatient")
def test_a_slow_server_is_retried_and_costs_no_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.weights.broadcaster.ReceiverBackoff", lambda: ReceiverBackoff(first_s=1.5))

    async def body(broadcaster: Broadcaster) -> None:
        slow = FakeServer("slow")
        slow.misbehave = "mute"
        publisher = Publishing(broadcaster, slow)
        publisher.offer(1, snapshot(1))
        while not publisher.reports:
            await asyncio.sleep(0.05)
        slow.misbehave = ""  # its directory entry has not changed
        assert await publisher.wait_until_active(1) == 1, "it never saw version 1 before"
        assert not publisher.failures
        await publisher.close()

    run(body)


class PlayedSender:
    """The channel to another sender, which is dead, or refuses one kind of request."""

    def __init__(self, *, is_dead: bool = False, refuses: str = "") -> None:
        self.requests: list[tuple[str, int]] = []
        """What was requested, and for which session."""
        self.threads = set[int]()
        """In which threads."""
        self._is_dead, self._refuses = is_dead, refuses
        self._replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def send(self, message: dict[str, Any]) -> None:
        do = message["do"]
        self.requests.append((do, message.get("session", 0)))
        self.threads.add(threading.get_ident())
        reply: dict[str, Any] = {"id": message["id"], "address": "127.0.0.1", "port": 1}
        if do == "facts":
            reply |= {"device": "cpu", "device_uuid": "", "nccl_version": ""}
        if do == self._refuses:
            reply["error"] = "every port is taken"
        self._replies.put(reply | ({"closed": True} if do == "close" else {}))

    def receive(self) -> dict[str, Any]:
        if self._is_dead:
            raise RuntimeError("Connection closed by peer")
        return self._replies.get()


def link_to(channel: PlayedSender, *, rank: int) -> SenderLink:
    return SenderLink(channel, rank=rank)  # type: ignore[arg-type]


def test_a_session_that_a_sender_cannot_open_is_forgotten() -> None:
    """Otherwise each try would leave a store behind, and a port of `weights.port_range`."""
    channels = [PlayedSender(), PlayedSender(refuses="open"), PlayedSender()]
    links = [link_to(channel, rank=rank) for rank, channel in enumerate(channels, start=1)]

    async def body() -> None:
        server = FakeServer("one")
        broadcaster = Broadcaster(WeightsConfig(), device="cpu", links=links)
        for version in (1, 2):
            outcome = await broadcaster.push(snapshot(1), version=version, step=1, servers=[server.entry])
            assert "trainer rank 2: every port is taken" in outcome.own_failure
            assert not outcome.is_requested
        await broadcaster.close()
        server.close()
        assert not any(threading.get_ident() in channel.threads for channel in channels), "a stopped one"

    asyncio.run(body())
    for link in links:
        link.close()
    for channel in (channels[0], channels[2]):
        assert channel.requests == [
            *(("facts", 0), ("open", 1), ("forget", 1), ("open", 2), ("forget", 2), ("close", 0))
        ]
    assert channels[1].requests == [("facts", 0), ("open", 1), ("open", 2), ("close", 0)]


def test_a_lost_sender_is_asked_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [retry_delay_s(num) for num in (1, 2, 3, 6, 7, 8, 9999)] == [0.5, 1, 2, 16, 30, 30, 30]
    monkeypatch.setattr("trainer.weights.publisher._RETRY_S", 0.001)
    waits = PendingWaits()
    link = link_to(PlayedSender(is_dead=True), rank=3)

    async def body() -> None:
        server = FakeServer("one")
        broadcaster = Broadcaster(WeightsConfig(), device="cpu", links=[link])
        publisher = Publishing(broadcaster, server, waits=waits)
        reports = publisher.reports
        publisher.offer(1, snapshot(1))
        while len(reports) < 6:
            publisher.directory_changed()  # neither this nor new weights end the wait early
            await asyncio.sleep(0.001)
        monkeypatch.setattr("trainer.weights.publisher._RETRY_S", 1e6)
        monkeypatch.setattr("trainer.weights.publisher._MAX_RETRY_S", 1e6)
        num_reports = len(reports)
        while len(reports) == num_reports:
            await asyncio.sleep(0.001)
        publisher.offer(2, snapshot(2))
        for _ in range(20):
            publisher.directory_changed()
            await asyncio.sleep(0.001)
        assert [report.version for report in reports] == [1] * (num_reports + 1) and not publisher.failures
        assert all("trainer rank 3" in report.failed["broadcast"] for report in reports)
        assert broadcaster.eligible([server.entry]), "no server is at fault"
        assert list(waits.durations()) == [OWN_FAILURE]
        await publisher.close()
        assert not waits.durations()
        server.close()

    asyncio.run(body())


def test_a_version_is_used_again_only_for_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push fails in the trainer before a server has seen the version; the next one of the same snapshot has
    it, one of other weights and one after a server has seen it do not."""
    monkeypatch.setattr("trainer.weights.publisher._RETRY_S", 0.01)

    class Failing(Held):
        def stage(self, *, integrity: str) -> None:
            self.num_stages = getattr(self, "num_stages", 0) + 1
            if self.num_stages < 3:
                raise WeightSyncError("a rank of the trainer was lost")
            if self.num_stages == 3:
                server.misbehave = "decline"

    async def body(broadcaster: Broadcaster) -> None:
        nonlocal server
        server = FakeServer("one")
        server.loads_in_place = True
        publisher = Publishing(broadcaster, server)
        reports = publisher.reports
        publisher.offer(1, Failing({"a": torch.zeros(300)}, bucket_bytes=1024))
        while len(reports) < 3:
            await asyncio.sleep(0.01)
        assert [report.version for report in reports] == [1, 1, 1] and server.version == 0
        server.misbehave = ""
        server.incarnation += 1  # its back-off ends
        publisher.directory_changed()
        assert await publisher.wait_until_active(1) == 2
        other = Failing({"a": torch.ones(300)}, bucket_bytes=1024)
        other.num_stages = 1
        publisher.offer(2, other)
        while len(reports) < 5:
            await asyncio.sleep(0.01)
        publisher.offer(3, snapshot(3))
        assert await publisher.wait_until_active(3) == 4
        assert [report.version for report in reports] == [1, 1, 1, 2, 3, 4] and not publisher.failures
        await publisher.close()

    server: FakeServer
    run(body)


def test_a_refusing_server_costs_others_no_further_pushes() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        good, bad = FakeServer("good"), FakeServer("bad")
        bad.misbehave = "reject"
        publisher = Publishing(broadcaster, good, bad)
        publisher.offer(1, snapshot(1))
        await publisher.wait_until_active(1)
        for _ in range(3):
            await asyncio.sleep(0.1)
            publisher.directory_changed()
        assert (len(publisher.reports), good.version, bad.version) == (1, 1, 0)
        # Its back-off ends before a new offer or a change of its directory entry.
        bad.misbehave, broadcaster._backoff = "", ReceiverBackoff()
        while len(publisher.reports) == 1:
            await asyncio.sleep(0.05)
        assert (good.version, bad.version, publisher.failures) == (2, 2, [])
        await publisher.close()

    run(body)


@pytest.mark.parametrize("is_left", [True, False])
def test_only_servers_that_are_left_are_asked_to_leave(is_left: bool) -> None:
    async def body() -> None:
        receiver = FakeServer("one")
        broadcaster = Broadcaster(WeightsConfig(push_deadline_s=60), device="cpu")
        outcome = await broadcaster.push(snapshot(1), version=1, step=1, servers=[receiver.entry])
        assert list(outcome.activated) == ["one"] and receiver.group is not None
        await broadcaster.close({receiver_id(receiver.entry)} if is_left else ())
        assert (receiver.group is None) == is_left
        receiver.close()

    asyncio.run(body())


def test_no_free_port_is_a_mistake_only_at_the_start() -> None:
    async def body() -> None:
        receiver = FakeServer("one")
        with WeightGroup.create(world_size=2, group_name="other", timeout_s=HANG_LIMIT_S) as other:
            config = WeightsConfig(push_deadline_s=60, port_range=f"{other.port}-{other.port}")
            late, broadcaster = (Broadcaster(config, device="cpu") for _ in range(2))
            with pytest.raises(ConfigError, match=r"every port of weights\.port_range=.* larger range"):
                await broadcaster.push(snapshot(1), version=1, step=1, servers=[receiver.entry])
            late.num_sessions = 1
            outcome = await late.push(snapshot(1), version=1, step=1, servers=[receiver.entry])
            assert "every port of weights.port_range" in outcome.failed["one"]
        receiver.version = 1  # another entry of the directory ends the back-off
        outcome = await late.push(snapshot(2), version=2, step=2, servers=[receiver.entry])
        assert list(outcome.activated) == ["one"] and receiver.version == 2
        await broadcaster.close()
        await late.close()
        receiver.close()

    asyncio.run(body())


def test_a_publisher_reports_a_wrong_setting() -> None:
    async def body() -> None:
        receiver = FakeServer("one")
        broadcaster = Broadcaster(WeightsConfig(host="192.0.2.1"), device="cpu")
        publisher = Publishing(broadcaster, receiver)
        publisher.offer(1, snapshot(1))
        with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1.*set weights\.host"):
            await publisher.wait_until_active(1)
        assert len(publisher.failures) == 1
        await publisher.close()
        receiver.close()

    asyncio.run(body())


def test_a_publisher_reports_an_unexpected_error() -> None:
    async def fail(_: Any, *, timeout_s: float) -> VersionGranted:
        raise RuntimeError("out of memory")

    async def body(broadcaster: Broadcaster) -> None:
        receiver = FakeServer("one")
        publisher = Publishing(broadcaster, receiver, call=fail)
        publisher.offer(1, snapshot(1))
        with pytest.raises(RuntimeError, match="out of memory"):
            await publisher.wait_until_active(1)
        assert list(map(str, publisher.failures)) == [
            "no more weights are published: RuntimeError: out of memory"
        ]
        await publisher.close()

    run(body)


def test_a_server_with_an_earlier_runs_weights_gets_a_push() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        fresh, kept = FakeServer("fresh"), FakeServer("kept")
        kept.version = 57
        publisher = Publishing(broadcaster, fresh)
        publisher.offer(0, snapshot(0), loaded=True)
        publisher.directory_changed()
        await asyncio.sleep(0.1)
        assert not publisher.reports, "a server that starts with the run's first weights needs no push"
        publisher.to.append(kept)
        publisher.directory_changed()
        while not publisher.reports:
            await asyncio.sleep(0.02)
        assert (fresh.version, kept.version, publisher.failures) == (1, 1, [])
        await publisher.close()

    run(body)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_breaks_every_broadcast_is_isolated() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        good, bad = FakeServer("good"), FakeServer("bad")
        bad.misbehave = "leave"
        servers = [good.entry, bad.entry]
        pushes = [
            await broadcaster.push(snapshot(v, size=1 << 22), version=v, step=v, servers=servers)
            for v in (1, 2, 3)
        ]
        # No server was silent, so the faulty one was unknown. Then each server got its own group.
        assert [set(outcome.activated) for outcome in pushes] == [set(), set(), {"good"}]
        assert all({"good", "bad"} <= set(outcome.failed) for outcome in pushes[:2])
        assert all(outcome.recovery_s["good"] < 30 for outcome in pushes[:2])
        outcome = await broadcaster.push(snapshot(4), version=4, step=4, servers=servers)
        assert (set(outcome.activated), outcome.failed) == ({"good"}, {}), "the faulty server must back off"

    run(body)


@pytest.mark.usefixtures("impatient")
def test_per_engine_groups_isolate_a_hang() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        good, bad = FakeServer("good"), FakeServer("bad")
        bad.misbehave = "hang"
        push = asyncio.ensure_future(
            broadcaster.push(snapshot(1, size=1 << 23), version=1, step=1, servers=[bad.entry, good.entry])
        )
        while good.version != 1:
            await asyncio.sleep(0.01)
        assert not push.done()
        outcome = await push
        assert (set(outcome.activated), set(outcome.failed)) == ({"good"}, {"bad", "broadcast"})
        outcome = await broadcaster.push(snapshot(2), version=2, step=2, servers=[bad.entry, good.entry])
        assert (set(outcome.activated), outcome.failed) == ({"good"}, {})
        assert broadcaster.num_sessions == 2, "the good server must keep its group"

    run(body, deadline_s=8.0, topology="per_engine")


@pytest.mark.usefixtures("impatient")
def test_a_push_ends_when_refused_or_rank_0_is_stuck(caplog: pytest.LogCaptureFixture) -> None:
    async def body(broadcaster: Broadcaster) -> None:
        one, slow = FakeServer("one"), snapshot(2)
        await broadcaster.push(snapshot(1), version=1, step=1, servers=[one.entry])
        may_read = threading.Event()
        read = slow.read
        slow.read = lambda index: (may_read.wait(), read(index))[1]  # type: ignore[method-assign]
        outcome = await broadcaster.push(slow, version=2, step=2, servers=[one.entry])
        may_read.set()
        assert "not done within 6 s" in outcome.failed["broadcast"] and one.version == 1
        one.misbehave = "decline"
        outcome = await broadcaster.push(snapshot(3, size=1 << 23), version=3, step=3, servers=[one.entry])
        assert (
            "will not have it" in outcome.failed["broadcast"] and outcome.failed["one"] == "will not have it"
        )
        one.misbehave = ""
        outcome = await broadcaster.push(snapshot(4), version=4, step=4, servers=[one.entry])
        assert (set(outcome.activated), one.version) == ({"one"}, 4)

    run(body, deadline_s=6.0)
    gc.collect()
    assert "never retrieved" not in caplog.text, "asyncio reports what the push had already dealt with"


def test_engines_stand_still_only_for_the_broadcast() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        one, paused = FakeServer("one"), FakeServer("paused")
        paused.loads_in_place = True
        servers = [one.entry, paused.entry]
        slow = snapshot(1)
        read, is_staged = slow.read, threading.Event()

        def stage(*, integrity: str) -> None:
            time.sleep(0.5)
            assert integrity == "none" and one.pushed is None and paused.pushed is None
            is_staged.set()

        def read_staged(index: int) -> GatheredBucket:
            assert is_staged.is_set()
            return read(index)

        slow.stage, slow.read = stage, read_staged  # type: ignore[method-assign]
        started_s = time.monotonic()
        outcome = await broadcaster.push(slow, version=1, step=1, servers=servers)
        whole_s = time.monotonic() - started_s
        assert (set(outcome.activated), outcome.failed) == ({"one", "paused"}, {})
        assert outcome.staging_s >= 0.5 and outcome.broadcast_s > 0
        assert outcome.staging_s + outcome.broadcast_s < whole_s, "the broadcast begins after the staging"

        def fail(*, integrity: str) -> None:
            raise WeightSyncError("a rank was lost")

        lost = snapshot(2)
        lost.stage = fail  # type: ignore[method-assign]
        outcome = await broadcaster.push(lost, version=2, step=2, servers=servers)
        assert (outcome.activated, outcome.failed) == ({}, {"broadcast": "a rank was lost"})
        outcome = await broadcaster.push(snapshot(3), version=3, step=3, servers=servers)
        assert (one.version, paused.version, broadcaster.num_sessions) == (3, 3, 1), "the group is intact"

    run(body)


def test_the_time_limit_of_a_push_grows_with_its_bytes() -> None:
    config = WeightsConfig(push_deadline_s=60, min_bytes_per_s=1e8)
    assert config.deadline_s(65_000_000_000) == 710
    assert config.deadline_s(1 << 50) == 3600, "servers refuse longer ones"
    assert [config.bucket_bytes_on(device) >> 20 for device in ("cpu", "cuda")] == [64, 512]


def test_a_failed_server_that_still_receives_breaks_nothing() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        good, bad = FakeServer("good"), FakeServer("bad")
        bad.misbehave = "protest"
        slow = snapshot(1)
        read = slow.read
        slow.read = lambda index: (time.sleep(0.3), read(index))[1]  # type: ignore[method-assign]
        outcome = await broadcaster.push(slow, version=1, step=1, servers=[good.entry, bad.entry])
        assert (set(outcome.activated), outcome.failed) == ({"good"}, {"bad": "will not have it"})

    run(body)


@pytest.mark.parametrize("topology", ["shared", "per_engine"])
def test_max_unavailable_leaves_capacity(topology: str) -> None:
    async def body(broadcaster: Broadcaster) -> None:
        receivers = [FakeServer(name) for name in "abcde"]
        most = 0
        done = asyncio.Event()

        async def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, sum(len(r.tensors) > 0 and r.version == 0 for r in receivers))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        outcome = await broadcaster.push(snapshot(1), version=1, step=1, servers=[r.entry for r in receivers])
        done.set()
        await watching
        assert (set(outcome.activated), outcome.failed) == (set("abcde"), {})
        assert 1 <= most <= 2
        assert broadcaster.num_sessions == (3 if topology == "shared" else 5)

    run(body, topology=topology, max_unavailable=2)


def test_split_groups() -> None:
    a, b, c, d = (("a", 1), ("b", 1), ("c", 1), ("d", 1))
    assert split_groups([], topology="shared", max_unavailable=0) == []
    assert split_groups([a, b, c], topology="shared", max_unavailable=0) == [[a, b, c]]
    assert split_groups([a, b, c], topology="per_engine", max_unavailable=0) == [[a], [b], [c]]
    assert split_groups([a, b, c], topology="shared", max_unavailable=2) == [[a, b], [c]]
    assert split_groups([a, b, c], topology="shared", max_unavailable=0, alone=[b, d]) == [[b], [a, c]]


def alive(*, num_ranks: int = 1, device: str = "cuda:0", uuid: str = "", nccl: str = "2.27.5") -> Alive:
    return Alive(
        version=0,
        num_ranks=num_ranks,
        device=device,
        device_uuid=uuid,
        nccl_version=nccl,
        authenticates_store=False,
    )


def test_an_engine_gets_one_group_rank_per_tensor_parallel_rank() -> None:
    assert assign_ranks([alive(), alive(num_ranks=4), alive(num_ranks=2)]) == ([1, 2, 6], 8)


def test_nccl_needs_equal_versions_and_separate_gpus() -> None:
    ours = {"device": "cuda:0", "device_uuid": "gpu-0", "nccl_version": "2.27.5"}
    assert choose_backend("auto", ours=ours, engines=[alive(uuid="gpu-1"), alive(nccl="")]) == ("nccl", "")
    assert choose_backend("gloo", ours=ours, engines=[alive()]) == ("gloo", "")
    assert choose_backend("auto", ours=ours, engines=[alive(device="cpu")]) == ("gloo", "")
    assert (
        choose_backend("nccl", ours=ours, engines=[alive(device="cpu")])[1]
        == "trainer and engines are not all on GPUs"
    )
    assert choose_backend("auto", ours=ours, engines=[alive(nccl="2.21.5")]) == (
        "gloo",
        "NCCL versions differ: 2.21.5, 2.27.5",
    )
    assert choose_backend("nccl", ours=ours, engines=[alive(uuid="gpu-0")]) == (
        "gloo",
        "two of trainer and engines share a GPU",
    )


def test_a_first_push_with_two_versions_of_nccl_is_refused() -> None:
    ours = {"device": "cuda:0", "device_uuid": "gpu-0", "nccl_version": "2.27.5"}
    for wanted in ("auto", "nccl"):
        with pytest.raises(ConfigError, match=r"2\.21\.5, 2\.27\.5.*weights\.backend=gloo"):
            refuse_mixed_nccl(wanted, ours=ours, engines=[alive(nccl="2.21.5")])
    refuse_mixed_nccl("gloo", ours=ours, engines=[alive(nccl="2.21.5")])
    refuse_mixed_nccl("auto", ours=ours, engines=[alive(nccl="2.21.5"), alive(device="cpu")])
    refuse_mixed_nccl("auto", ours=ours, engines=[alive(uuid="gpu-0")])


def test_auto_changes_to_gloo_after_a_failed_first_push() -> None:
    """A push that broke is tried again with the same members before gloo is chosen."""
    one, two, three = (frozenset({(name, 1)}) for name in "abc")

    def wanted(*pushes: tuple[str, frozenset[ReceiverId]], setting: str = "auto") -> str:
        trial = NcclTrial(setting)
        for reason, members in pushes:
            trial.report(broken_reason=reason, members=members)
        return trial.wanted

    assert wanted(("broke", one)) == "auto"
    assert wanted(("broke", one), ("broke", one)) == "gloo"
    assert wanted(("broke", one), ("broke", one), setting="nccl") == "nccl"
    assert wanted(("broke", one), ("", one), ("broke", one), ("broke", one)) == "auto"
    assert wanted(("broke", one), ("", two), ("broke", one), ("broke", one)) == "auto"
    assert wanted(("broke", one), ("broke", two)) == "auto", "an engine of the first push may have died"
    assert wanted(("broke", one), ("broke", two), ("broke", three)) == "gloo"
    assert wanted(("broke", one), ("broke", two), ("broke", one)) == "gloo"
