"""Mutated messages of every type at every socket: no daemon ends, grows, or answers late.

A peer is muted after sixteen malformed frames, so each connection sends fewer than that and is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
from collections import Counter, deque
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
import zmq

from areal_like.wire.channel import Link, tcp_address
from areal_like.wire.codec import encode
from areal_like.wire.messages import MESSAGES, TO_BUFFER
from areal_like.wire.messages.consumer import AllocVersion
from areal_like.wire.messages.weights import TO_SERVER, Alive, AskAlive, WeightsFailed
from launch.audit.run import audit_run
from rollout_server.policy.client import EngineClient
from rollout_server.weights.receiver import WeightReceiver
from tests.chaos.flooder import hello
from tests.chaos.job import QUIET, check_counters, check_groups, counters_of, running_job, train
from tests.chaos.test_flood import MAX_GROWTH_BYTES, HttpProbe
from tests.support.waiting import HANG_LIMIT_S
from tests.support.wire_mutation import Frames, mutated

PER_CONNECTION = 15
_NUM_OPEN = 64


class Connections:
    """Sends messages over ever new connections, the oldest of which are closed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = zmq.Context()
        self._open: deque[zmq.Socket[bytes]] = deque()

    def send(self, messages: list[Frames]) -> None:
        """Sends messages over a new connection."""
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.connect(self._address)
        for frames in messages:
            if frames:
                socket.send_multipart(frames)
        self._open.append(socket)
        if len(self._open) > _NUM_OPEN:
            self._open.popleft().close()

    def close(self) -> None:
        for socket in self._open:
            socket.close()
        self._context.term()


@contextlib.contextmanager
def connections(address: str) -> Iterator[Connections]:
    opened = Connections(address)
    try:
        yield opened
    finally:
        opened.close()


def fuzz_buffer(directory: Path, *, num_frames: int, steps_of_frames: int) -> None:
    """Half of the connections register as rollout servers before they send mutated messages."""
    trainer = {"num_steps": 1_000_000, "groups_per_step": 8, "fetch_timeout_s": 600.0}
    frames = mutated(random.Random(num_frames), kinds=TO_BUFFER, valid=0.1)
    with running_job(directory, trainer=trainer, daemon=QUIET) as job, job.trainer() as client:
        job.produce("rollout-0")
        groups = train(client, first=0, last=5)
        before_bytes = job.buffer.rss_bytes()
        probe = HttpProbe(job)
        probe.start()
        step = 5
        with connections(job.buffer.address) as peers:
            for number in range(num_frames // PER_CONNECTION):
                messages = list(islice(frames, PER_CONNECTION))
                if number % 2:
                    messages.insert(0, encode(hello(job.config, f"fuzz-{number % _NUM_OPEN}"), rid=1))
                peers.send(messages)
                if number % steps_of_frames == 0:
                    groups += train(client, first=step, last=step + 1)
                    step += 1
        groups += train(client, first=step, last=step + 5)
        probe.finish()
        check_groups(groups, job.config, first=0, last=step + 5)
        check_counters(counters_of(client))
        status = job.buffer.status()
        assert status["bad_frames"] > num_frames // 10 and status["unregistered_frames"] > 0, status
        assert job.buffer.rss_bytes() < before_bytes + MAX_GROWTH_BYTES
        assert job.buffer.terminate()[0] == 0
    audit = audit_run(job.buffer.paths.root)
    assert audit.is_clean, "\n".join(audit.lines())
    print(
        f"{num_frames} frames: {status['bad_frames']} bad, {status['unregistered_frames']} unregistered; "
        f"HTTP longest {max(probe.answers_s):.3f} s; {before_bytes >> 20} -> {max(probe.rss_bytes) >> 20} MB"
    )


@pytest.mark.chaos
def test_mutated_messages_do_not_harm_a_buffer(tmp_path: Path) -> None:
    """Long, because a job goes on between the messages, and must."""
    fuzz_buffer(tmp_path, num_frames=6_000, steps_of_frames=100)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_million_mutated_messages_do_not_harm_a_buffer(tmp_path: Path) -> None:
    fuzz_buffer(tmp_path, num_frames=1_000_000, steps_of_frames=5000)


class NoUpdates:
    """The strategy of a server that never receives a group."""

    async def push(self, engine: EngineClient, push: object) -> float:
        raise AssertionError("no group was joined")


async def fuzz_weight_receiver(*, num_frames: int) -> None:
    receiver = WeightReceiver(
        host="127.0.0.1",
        max_message_bytes=1 << 20,
        strategy=NoUpdates(),  # type: ignore[arg-type]
        on_version=lambda _: None,
        on_untrusted=lambda _: None,
    )
    address = tcp_address("127.0.0.1", receiver.port)
    frames = mutated(random.Random(num_frames), kinds=TO_SERVER, valid=0.3)
    link = Link(address, handler=lambda _: None)
    num_answers = 0
    # Nothing listens on port 9: every call of the engine fails at once.
    async with EngineClient("http://127.0.0.1:9") as engine:
        with connections(address) as peers:
            for number in range(num_frames // PER_CONNECTION):
                receiver.set_engine(engine if number % 3 else None)
                peers.send(list(islice(frames, PER_CONNECTION)))
                if number % 10 == 0:
                    answer = await link.call(AskAlive(), timeout_s=HANG_LIMIT_S)
                    assert isinstance(answer, Alive | WeightsFailed)
                    num_answers += 1
                assert not receiver.serving.done(), receiver.serving.result()
                await asyncio.sleep(0)
        assert receiver.listener.num_bad_frames > num_frames // 10 and num_answers
        await receiver.close()
    link.close()


def test_mutated_messages_do_not_harm_a_weight_receiver() -> None:
    asyncio.run(fuzz_weight_receiver(num_frames=3_000))


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_many_mutated_messages_do_not_harm_a_weight_receiver() -> None:
    asyncio.run(fuzz_weight_receiver(num_frames=200_000))


async def fuzz_link(*, num_frames: int) -> None:
    """The other end of a connection of the trainer: a rollout server, or whoever took its address."""
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.set(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    received: list[object] = []
    link = Link(tcp_address("127.0.0.1", port), handler=received.append)
    frames = mutated(random.Random(num_frames), kinds=MESSAGES.values(), valid=0.1)
    waiting = asyncio.create_task(link.call(AllocVersion(step=1), timeout_s=600))
    while not router.poll(0):
        await asyncio.sleep(0.01)
    peer, _ = router.recv_multipart()
    for number in count(1):
        router.send_multipart([peer, *next(frames)])
        if number % 100 == 0:
            await asyncio.sleep(0.001)
        if number == num_frames:
            break
    while link.num_bad_frames + len(received) < num_frames * 0.9 and not waiting.done():
        await asyncio.sleep(0.01)
    waiting.cancel()
    link.close()
    router.close()


def test_mutated_messages_do_not_harm_a_link() -> None:
    asyncio.run(asyncio.wait_for(fuzz_link(num_frames=3_000), HANG_LIMIT_S))


def bodies(rng: random.Random) -> Iterator[bytes]:
    """Endless: bodies for `POST /control/drop`, none of which names a ticket of the job."""
    values = [None, True, -1, 0.5, 1e308, 1 << 70, 10**4000, "x" * 1000, [], {}, [[]], "\ud800", "17"]
    while True:
        value = rng.choice(values)
        good = json.dumps({rng.choice(["tickets", "x", ""]): rng.choice([value, [value], [1 << 40, value]])})
        yield rng.choice(
            [
                good.encode(),
                good.encode()[: rng.randrange(len(good))],
                rng.randbytes(rng.randrange(200)),
                b"[" * rng.randrange(1, 100_000),
                b'{"tickets":' * rng.randrange(1, 5_000),
                json.dumps({"tickets": [1 << 40] * 10_000}).encode(),
                json.dumps(value).encode(),
            ]
        )


def fuzz_control(directory: Path, *, num_requests: int) -> None:
    with running_job(directory, daemon=QUIET) as job:
        connection = http.client.HTTPConnection(job.buffer.http)
        codes: Counter[int] = Counter()
        for body in islice(bodies(random.Random(num_requests)), num_requests):
            verb = "drop" if len(body) % 5 else "unknown"
            connection.request("POST", f"/control/{verb}", body=body)
            answer = connection.getresponse()
            answer.read()
            codes[answer.status] += 1
            assert 400 <= answer.status < 500, (answer.status, body[:100])
        connection.close()
        assert len(codes) == 2, codes
        assert job.buffer.terminate()[0] == 0


def test_bodies_of_requests_do_not_harm_a_buffer(tmp_path: Path) -> None:
    fuzz_control(tmp_path, num_requests=200)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_many_bodies_of_requests_do_not_harm_a_buffer(tmp_path: Path) -> None:
    fuzz_control(tmp_path, num_requests=20_000)
