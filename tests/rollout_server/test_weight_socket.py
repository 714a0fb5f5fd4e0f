"""Requests on the weight control socket that no trainer sends: refused, and the engine is not asked."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from areal_like.errors import WeightSyncError
from areal_like.weights.integrity import BucketSums, difference
from areal_like.wire.channel import Link, tcp_address
from areal_like.wire.messages.weights import (
    DissolveGroup,
    FormGroup,
    PushChecksums,
    PushWeights,
    WeightsFailed,
    WeightsOk,
)
from rollout_server.policy.client import EmbeddedClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.checks import check_form_group, check_push
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.weights.shadow import ShadowWeightUpdate
from tests.support.served_app import served
from tests.support.waiting import HANG_LIMIT_S

FORM = FormGroup(
    epoch=1,
    group_name="g",
    master_address="127.0.0.1",
    master_port=1,
    rank=1,
    world_size=2,
    backend="gloo",
    timeout_s=HANG_LIMIT_S,
    secret="",
)
PUSH = PushWeights(
    epoch=1,
    group_name="g",
    version=1,
    step=1,
    update_mode="recompute",
    manifest={
        "version": 1,
        "buckets": [{"names": ["a"], "dtypes": ["float32"], "shapes": [[2]], "checksum": None}],
    },
    integrity="sha256",
    timeout_s=HANG_LIMIT_S,
)


class Engine:
    """Receives one bucket with checksum 7 and digest `d`; calls to `waits_at` wait for `go`."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.version = 0
        self.waits_at = ""
        self.go = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        path = request.path.strip("/")
        body = await request.json() if request.can_read_body else {}
        self.called.append(path)
        if path == self.waits_at:
            await self.go.wait()
        if path == "end_weight_update":
            self.version = int(body["weight_version"])
        return web.json_response(
            {"success": True, "checksums": [7], "digests": ["d"], "weight_version": str(self.version)}
        )


def with_receiver(
    body: Callable[[Engine, Callable[[], Link]], Awaitable[None]], *, integrity: str = "none"
) -> None:
    """Runs `body(engine, new_link)` beside a receiver."""

    async def main() -> None:
        engine, links = Engine(), list[Link]()
        receiver = WeightReceiver(
            host="127.0.0.1",
            max_message_bytes=1 << 20,
            strategy=ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=lambda _: None),
            on_version=lambda _: None,
            on_untrusted=lambda _: None,
            integrity=integrity,
        )

        def new_link() -> Link:
            links.append(Link(tcp_address("127.0.0.1", receiver.port), handler=lambda _: None))
            return links[-1]

        async with (
            asyncio.timeout(HANG_LIMIT_S),
            served(engine.answer) as url,
            EmbeddedClient(url) as client,
        ):
            receiver.set_engine(client)
            await body(engine, new_link)
            engine.go.set()
            await receiver.close()
        for link in links:
            link.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"master_address": "10.1.2.3"}, "on another machine, and this server listens on 127.0.0.1"),
        ({"master_address": "example.org"}, "on another machine"),
        ({"master_address": "a b"}, "master_address"),
        ({"master_port": 0}, "master_port 0"),
        ({"rank": 0}, "rank 0 of 2"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"world_size": 1 << 30}, "world_size"),
        ({"backend": "mpi"}, "gloo or nccl"),
        ({"timeout_s": 1e9}, "want at most 3600"),
        ({"timeout_s": float("nan")}, "timeout_s nan"),
        ({"group_name": "x" * 65}, "group_name"),
        ({"secret": "short"}, "secret"),
    ],
)
def test_form_group_out_of_bounds_is_refused(change: dict[str, Any], message: str) -> None:
    check_form_group(FORM, host="127.0.0.1", num_ranks=1)
    with pytest.raises(WeightSyncError, match=message):
        check_form_group(dataclasses.replace(FORM, **change), host="127.0.0.1", num_ranks=1)


def test_a_server_on_the_network_takes_another_machines_trainer() -> None:
    check_form_group(dataclasses.replace(FORM, master_address="10.1.2.3"), host="10.1.2.4", num_ranks=1)
    with pytest.raises(WeightSyncError, match="this engine has 2"):
        check_form_group(FORM, host="10.1.2.4", num_ranks=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timeout_s": 3601.0}, "want at most 3600"),
        ({"timeout_s": 0.0}, "timeout_s 0"),
        ({"version": -1}, "version"),
        ({"version": 1 << 70}, "version"),
        ({"update_mode": "never"}, "update_mode"),
        ({"integrity": "crc"}, "integrity"),
        ({"integrity": "none"}, r"requires weights\.integrity=sha256"),
    ],
)
def test_push_out_of_bounds_is_refused(change: dict[str, Any], message: str) -> None:
    check_push(PUSH, integrity="sha256")
    with pytest.raises(WeightSyncError, match=message):
        check_push(dataclasses.replace(PUSH, **change), integrity="sha256")


def test_a_forged_request_does_not_reach_the_engine() -> None:
    async def body(engine: Engine, new_link: Callable[[], Link]) -> None:
        link = new_link()
        answer = await link.call(dataclasses.replace(FORM, master_address="10.1.2.3"), timeout_s=HANG_LIMIT_S)
        assert isinstance(answer, WeightsFailed) and "on another machine" in answer.reason
        assert not engine.called

    with_receiver(body)


def test_only_the_peer_that_formed_the_group_pushes() -> None:
    async def body(engine: Engine, new_link: Callable[[], Link]) -> None:
        trainer, stranger = new_link(), new_link()
        assert isinstance(await trainer.call(FORM, timeout_s=HANG_LIMIT_S), WeightsOk)
        for request in (PUSH, DissolveGroup(epoch=1, group_name="g")):
            answer = await stranger.call(request, timeout_s=HANG_LIMIT_S)
            assert isinstance(answer, WeightsFailed) and "formed by another peer" in answer.reason
        engine.waits_at = "receive_weights"
        pushing = asyncio.create_task(trainer.call(PUSH, timeout_s=HANG_LIMIT_S))
        while "receive_weights" not in engine.called:
            await asyncio.sleep(0.01)
        # None of these cancels the push, and the stranger's sums are not the ones that are compared.
        answer = await stranger.call(
            dataclasses.replace(FORM, master_address="10.1.2.3"), timeout_s=HANG_LIMIT_S
        )
        assert isinstance(answer, WeightsFailed)
        stranger.send(PushChecksums(version=1, checksums=[8], digests=["e"]))
        dissolving = asyncio.create_task(
            stranger.call(DissolveGroup(epoch=1, group_name="g"), timeout_s=HANG_LIMIT_S)
        )
        trainer.send(PushChecksums(version=1, checksums=[7], digests=["d"]))
        await asyncio.sleep(0.1)
        stranger.send(PushChecksums(version=1, checksums=[8], digests=["e"]))
        await asyncio.sleep(0.1)
        engine.go.set()
        assert isinstance(await pushing, WeightsOk) and engine.version == 1
        assert isinstance(await dissolving, WeightsFailed)

    with_receiver(body, integrity="sha256")


def test_requests_that_wait_are_bounded() -> None:
    async def body(engine: Engine, new_link: Callable[[], Link]) -> None:
        trainer, stranger = new_link(), new_link()
        assert isinstance(await trainer.call(FORM, timeout_s=HANG_LIMIT_S), WeightsOk)
        engine.waits_at = "receive_weights"
        pushing = asyncio.create_task(trainer.call(PUSH, timeout_s=HANG_LIMIT_S))
        while "receive_weights" not in engine.called:
            await asyncio.sleep(0.01)
        flood = [asyncio.create_task(stranger.call(PUSH, timeout_s=HANG_LIMIT_S)) for _ in range(40)]
        while sum(task.done() for task in flood) < 40 - 16:
            await asyncio.sleep(0.01)
        done, _ = await asyncio.wait(flood, timeout=0.1)
        assert len(done) == 40 - 16
        assert all("16 requests are waiting already" in task.result().reason for task in done)
        trainer.send(PushChecksums(version=1, checksums=[7], digests=["d"]))
        engine.go.set()
        assert isinstance(await pushing, WeightsOk)
        assert all("another peer" in answer.reason for answer in await asyncio.gather(*(set(flood) - done)))

    with_receiver(body)


@pytest.mark.parametrize("digests", [["e"], [], ["d", "d"]])
def test_wrong_digests_keep_the_old_version(digests: list[str]) -> None:
    async def body(engine: Engine, new_link: Callable[[], Link]) -> None:
        trainer = new_link()
        assert isinstance(await trainer.call(FORM, timeout_s=HANG_LIMIT_S), WeightsOk)
        trainer.send(PushChecksums(version=1, checksums=[7], digests=digests))
        answer = await trainer.call(PUSH, timeout_s=HANG_LIMIT_S)
        assert isinstance(answer, WeightsFailed) and answer.version == engine.version == 0
        want = "bucket 0 of 1: the SHA-256 is wrong" if len(digests) == 1 else "want 1"
        assert want in answer.reason

    with_receiver(body)


def test_difference_names_the_bucket() -> None:
    sums = BucketSums(checksums=[1, 2, 3], digests=["a", "b", "c"])
    other = BucketSums(checksums=[1, 2, 3], digests=["a", "b", "x"])
    assert difference(received=sums, sent=sums, num_buckets=3, integrity="sha256") == ""
    assert difference(received=sums, sent=other, num_buckets=3, integrity="none") == ""
    assert "bucket 2 of 3: the SHA-256" in difference(
        received=sums, sent=other, num_buckets=3, integrity="sha256"
    )
    crc = BucketSums(checksums=[1, 5, 3], digests=[])
    assert "bucket 1 of 3: the checksum" in difference(
        received=sums, sent=crc, num_buckets=3, integrity="none"
    )
