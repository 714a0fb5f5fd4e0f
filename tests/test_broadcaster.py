"""Pushes over real sockets and real gloo groups: members that come, fail, fall silent and die."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from areal_like.channel import Envelope, Listener, tcp_address
from areal_like.collective import WeightGroup
from areal_like.config import WeightsConfig
from areal_like.errors import ArealError, ConfigError, WeightSyncError
from areal_like.messages.consumer import ServerEntry, VersionGranted
from areal_like.messages.weights import AskAlive, DissolveGroup, FormGroup, PushWeights, WeightsFailed, WeightsOk
from areal_like.weights import Manifest, checksum, unflatten
from trainer.broadcaster import Broadcaster
from trainer.publisher import Publisher, PushReport, take_snapshot


class Receiver:
    """A rollout server's weight socket without an engine: it keeps the tensors and can be told to misbehave."""

    def __init__(self, name: str, *, incarnation: int = 1) -> None:
        self.name, self.incarnation = name, incarnation
        self.version = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self.misbehave = ""
        self.group: WeightGroup | None = None
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.tasks: set[asyncio.Task[None]] = set()
        self.listener = Listener(host="127.0.0.1", port=0, handler=self.handle, max_message_bytes=1 << 20)

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
        if isinstance(envelope.message, DissolveGroup):
            self.leave()
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
                    if self.misbehave == "die":
                        self.leave()
                        return
                    await loop.run_in_executor(self.thread, self.receive, push)
                case AskAlive() | DissolveGroup():
                    pass
        except WeightSyncError as error:
            self.listener.send(envelope.peer, WeightsFailed(version=self.version, reason=str(error)), rid=envelope.rid)
            return
        if self.misbehave == "mute":
            return
        self.listener.send(envelope.peer, WeightsOk(version=self.version), rid=envelope.rid)

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
        )

    def receive(self, push: PushWeights) -> None:
        manifest = Manifest.from_dict(push.manifest)
        for bucket in manifest.buckets:
            data = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            assert self.group is not None
            self.group.broadcast(data)
            assert checksum(data) == bucket.checksum
            self.tensors |= unflatten(bucket, data)
        if self.misbehave == "vanish":  # with the whole broadcast received, so that nothing breaks
            self.misbehave = "mute"
            return
        if self.misbehave == "reject":
            raise WeightSyncError("verification failed")
        self.version = push.version

    def leave(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.close()

    def close(self) -> None:
        self.leave()
        self.listener.close()
        self.thread.shutdown(wait=False)


def snapshot(value: float) -> Any:
    tensors = [("a", torch.full((300,), float(value))), ("b", torch.full((7, 3), value + 1.0))]
    return take_snapshot(tensors, bucket_bytes=1024, dtype="float32")


def run(body: Callable[[Broadcaster], Awaitable[None]], *, deadline_s: float = 10.0) -> None:
    async def bounded() -> None:
        broadcaster = Broadcaster(WeightsConfig(push_deadline_s=deadline_s), device="cpu", incarnation=1)
        async with asyncio.timeout(30):
            await body(broadcaster)
            await broadcaster.close()

    asyncio.run(bounded())


def test_one_group_serves_many_pushes_and_a_joiner_makes_a_new_one() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        one, two = Receiver("one"), Receiver("two")
        for version in (1, 2, 3):
            outcome = await broadcaster.push(snapshot(version), version=version, step=version, servers=[one.entry])
            assert (set(outcome.activated), outcome.failed) == ({"one"}, {})
        assert broadcaster.num_epochs == 1
        outcome = await broadcaster.push(snapshot(4), version=4, step=4, servers=[one.entry, two.entry])
        assert set(outcome.activated) == {"one", "two"}
        assert broadcaster.num_epochs == 2
        for receiver in (one, two):
            assert torch.equal(receiver.tensors["a"], torch.full((300,), 4.0))
            assert torch.equal(receiver.tensors["b"], torch.full((7, 3), 5.0))
            receiver.close()

    run(body)


@pytest.mark.parametrize("how", ["reject", "die", "refuse", "mute", "vanish"])
def test_one_bad_member_costs_one_push_and_the_others_go_on(how: str) -> None:
    async def body(broadcaster: Broadcaster) -> None:
        good, bad = Receiver("good"), Receiver("bad")
        await broadcaster.push(snapshot(1), version=1, step=1, servers=[good.entry, bad.entry])
        bad.misbehave = how
        if how in ("refuse", "mute"):  # these show when a group is formed
            bad.incarnation += 1
        servers = [good.entry, bad.entry]
        outcome = await broadcaster.push(snapshot(2), version=2, step=2, servers=servers)
        assert "bad" in outcome.failed
        # Nothing new was heard of `bad`, so it is not tried again; `good` is at the new version at the latest now.
        outcome = await broadcaster.push(snapshot(3), version=3, step=3, servers=servers)
        assert (set(outcome.activated), good.version, bad.version) == ({"good"}, 3, 1)
        # It recovers as another incarnation and is taken in again.
        bad.misbehave, bad.incarnation = "", bad.incarnation + 1
        outcome = await broadcaster.push(snapshot(4), version=4, step=4, servers=[good.entry, bad.entry])
        assert set(outcome.activated) == {"good", "bad"}
        for receiver in (good, bad):
            receiver.close()

    # A death is noticed long before the deadline; only a rendezvous that somebody refuses runs into it.
    run(body, deadline_s=4.0 if how == "refuse" else 40.0)


def test_nobody_there_is_not_an_error() -> None:
    async def body(broadcaster: Broadcaster) -> None:
        outcome = await broadcaster.push(snapshot(1), version=1, step=1, servers=[])
        assert (outcome.activated, outcome.failed) == ({}, {})

    run(body)


def test_a_server_that_was_slow_once_is_tried_again_and_costs_no_versions_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.broadcaster._SHUN_S", 1.5)
    versions = iter(range(1, 100))

    async def granted(_: Any, *, timeout_s: float) -> VersionGranted:
        return VersionGranted(version=next(versions))

    async def body(broadcaster: Broadcaster) -> None:
        slow = Receiver("slow")
        slow.misbehave = "mute"
        reports, failures = list[PushReport](), list[ArealError]()
        publisher = Publisher(broadcaster, call=granted, servers=lambda: [slow.entry], on_push=reports.append, on_failure=failures.append)
        publisher.offer(1, snapshot(1))
        while not reports:
            await asyncio.sleep(0.05)
        slow.misbehave = ""  # its entry in the directory is what it was
        assert (await publisher.wait_active(1), failures) == (2, [])
        await publisher.close()
        slow.close()

    run(body)


def test_a_host_that_is_not_ours_is_named() -> None:
    async def body() -> None:
        receiver = Receiver("one")
        broadcaster = Broadcaster(WeightsConfig(host="192.0.2.1"), device="cpu", incarnation=1)
        with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1.*set weights\.host"):
            await broadcaster.push(snapshot(1), version=1, step=1, servers=[receiver.entry])
        await broadcaster.close()
        receiver.close()

    asyncio.run(body())


def test_a_publisher_that_cannot_go_on_says_so() -> None:
    async def granted(_: Any, *, timeout_s: float) -> VersionGranted:
        return VersionGranted(version=1)

    async def body() -> None:
        receiver, failures = Receiver("one"), list[ArealError]()
        broadcaster = Broadcaster(WeightsConfig(host="192.0.2.1"), device="cpu", incarnation=1)
        publisher = Publisher(
            broadcaster, call=granted, servers=lambda: [receiver.entry], on_push=lambda _: None, on_failure=failures.append
        )
        publisher.offer(1, snapshot(1))
        with pytest.raises(ConfigError, match=r"weights\.host"):
            await publisher.wait_active(1)
        assert len(failures) == 1
        await publisher.close()
        receiver.close()

    asyncio.run(body())


def test_a_server_that_kept_the_weights_of_an_earlier_run_gets_those_of_this_one() -> None:
    async def granted(_: Any, *, timeout_s: float) -> VersionGranted:
        return VersionGranted(version=1)

    async def body(broadcaster: Broadcaster) -> None:
        fresh, kept = Receiver("fresh"), Receiver("kept")
        kept.version = 57
        servers, reports, failures = [fresh.entry], list[PushReport](), list[ArealError]()
        publisher = Publisher(broadcaster, call=granted, servers=lambda: servers, on_push=reports.append, on_failure=failures.append)
        publisher.offer(0, snapshot(0), loaded=True)
        publisher.directory_changed()
        await asyncio.sleep(0.1)
        assert not reports, "a server that starts with the run's first weights needs no push"
        servers.append(kept.entry)
        publisher.directory_changed()
        while not reports:
            await asyncio.sleep(0.02)
        assert (fresh.version, kept.version, failures) == (1, 1, [])
        await publisher.close()
        for receiver in (fresh, kept):
            receiver.close()

    run(body)
