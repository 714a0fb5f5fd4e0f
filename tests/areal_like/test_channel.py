"""Listener and Link over real sockets: requests and replies, garbage, a peer that leaves, a port in use."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from areal_like.errors import ArealError, ConfigError, DeadlineError, PeerLostError, RefusedError
from areal_like.wire import channel, codec
from areal_like.wire.channel import BadPeers, Envelope, Link, Listener, tcp_address
from areal_like.wire.messages.consumer import AllocVersion, CommitStep, Fetch, GetRunCounters, VersionGranted
from areal_like.wire.messages.hello import HelloRequired, JobFailed, Refused
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S

MAX_BYTES = 1 << 20


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(HANG_LIMIT_S):
            await body()

    asyncio.run(bounded())


def serve(handler: Callable[[Listener, Envelope], None]) -> Listener:
    def handle(envelope: Envelope) -> None:
        handler(listener, envelope)

    listener = Listener(host="127.0.0.1", port=0, handler=handle, max_message_bytes=MAX_BYTES)
    return listener


def reply(listener: Listener, envelope: Envelope) -> None:
    match envelope.message:
        case AllocVersion(step=step):
            listener.send(envelope.peer, VersionGranted(version=step + 100), rid=envelope.rid)
        case GetRunCounters():
            listener.send(envelope.peer, Refused(field="books", reason="closed"), rid=envelope.rid)
        case CommitStep():
            listener.send(envelope.peer, JobFailed(reason="the job is over"), rid=envelope.rid)
        case _:
            listener.send(envelope.peer, HelloRequired())


def test_concurrent_requests_get_their_own_replies() -> None:
    async def body() -> None:
        listener = serve(reply)
        link = Link(tcp_address("127.0.0.1", listener.port), handler=lambda _: None)
        replies = await asyncio.gather(
            *(link.call(AllocVersion(step=step), timeout_s=HANG_LIMIT_S) for step in range(600))
        )
        assert [a.version for a in replies] == [step + 100 for step in range(600)]
        with pytest.raises(RefusedError, match="closed"):
            await link.call(GetRunCounters(), timeout_s=HANG_LIMIT_S)
        with pytest.raises(ArealError, match="the job is over"):
            await link.call(CommitStep(step=0), timeout_s=HANG_LIMIT_S)
        link.close()
        listener.close()

    run(body)


def test_unsolicited_messages_and_deadlines() -> None:
    async def body() -> None:
        received: list[Any] = []
        listener = serve(reply)
        link = Link(tcp_address("127.0.0.1", listener.port), handler=received.append)
        late = asyncio.ensure_future(link.call(Fetch(step=0, position=0), timeout_s=100))
        while not received:
            await asyncio.sleep(0.01)
        assert received == [HelloRequired()] and not late.done()
        advance(100)
        with pytest.raises(DeadlineError, match=r"Fetch within 100 s"):
            await late
        pending = asyncio.ensure_future(link.call(Fetch(step=0, position=0), timeout_s=HANG_LIMIT_S))
        await asyncio.sleep(0.05)
        link.close()
        with pytest.raises(PeerLostError):
            await pending
        link.send(GetRunCounters())  # a task that has not noticed it yet
        with pytest.raises(PeerLostError):
            await link.call(GetRunCounters(), timeout_s=HANG_LIMIT_S)
        listener.close()

    moved_clock.run(body())


def test_a_late_reply_answers_a_repeated_request() -> None:
    async def body() -> None:
        envelopes: list[Envelope] = []
        listener = serve(lambda _, envelope: envelopes.append(envelope))
        link = Link(tcp_address("127.0.0.1", listener.port), handler=lambda _: None)
        rid = link.new_rid()
        with pytest.raises(DeadlineError):
            await link.call(AllocVersion(step=1), timeout_s=0.05, rid=rid)
        again = asyncio.ensure_future(link.call(AllocVersion(step=1), timeout_s=HANG_LIMIT_S, rid=rid))
        while len(envelopes) < 2:
            await asyncio.sleep(0.01)
        listener.send(envelopes[0].peer, VersionGranted(version=7), rid=envelopes[0].rid)
        assert (await again).version == 7
        link.close()
        listener.close()

    run(body)


def test_unhandled_messages_wait_at_the_sender() -> None:
    async def body() -> None:
        listener = serve(reply)
        raw = zmq.Context.instance().socket(zmq.DEALER)
        raw.set(zmq.LINGER, 0)
        raw.set(zmq.SNDHWM, 1)
        raw.connect(tcp_address("127.0.0.1", listener.port))
        num_sent = 0
        # This blocks the loop that would handle the messages.
        while num_sent < 2_000 and raw.poll(500, zmq.POLLOUT):
            raw.send(bytes(1 << 16))
            num_sent += 1
        assert num_sent < 2_000, "128 MB were accepted from one peer"
        while listener.num_bad_frames < num_sent:
            await asyncio.sleep(0.01)
        raw.close()
        listener.close()

    run(body)


def test_garbage_is_counted_and_other_peers_are_served() -> None:
    async def body() -> None:
        listener = serve(reply)
        raw = zmq.Context.instance().socket(zmq.DEALER)
        raw.set(zmq.LINGER, 0)
        raw.connect(tcp_address("127.0.0.1", listener.port))
        for number in range(1000):
            raw.send_multipart([b"garbage", str(number).encode()])
        link = Link(tcp_address("127.0.0.1", listener.port), handler=lambda _: None)
        while listener.num_bad_frames < 1000:
            await asyncio.sleep(0.01)
        assert (await link.call(AllocVersion(step=1), timeout_s=HANG_LIMIT_S)).version == 101
        # Over the size limit: ZeroMQ itself closes that peer's connection and no other.
        raw.send(bytes(MAX_BYTES + 1))
        await asyncio.sleep(0.2)
        assert (await link.call(AllocVersion(step=2), timeout_s=HANG_LIMIT_S)).version == 102
        assert listener.num_bad_frames == 1000
        raw.close()
        link.close()
        listener.close()

    run(body)


@pytest.mark.parametrize("frames", [[b"x"] * 40_000, [bytes(MAX_BYTES)] * 5])
def test_a_message_with_too_many_frames_is_skipped(frames: list[bytes]) -> None:
    """libzmq limits neither their number nor their bytes. The messages after it are read."""

    async def body() -> None:
        refused: list[str] = []
        listener = Listener(
            host="127.0.0.1",
            port=0,
            handler=lambda envelope: reply(listener, envelope),
            max_message_bytes=MAX_BYTES,
            on_malformed=lambda peer, what: refused.append(what),
        )
        raw = zmq.Context.instance().socket(zmq.DEALER)
        raw.set(zmq.LINGER, 0)
        raw.connect(tcp_address("127.0.0.1", listener.port))
        raw.send_multipart(frames)
        raw.send_multipart(codec.encode(AllocVersion(step=3), rid=1))
        link = Link(tcp_address("127.0.0.1", listener.port), handler=lambda _: None)
        while not raw.poll(0):
            await asyncio.sleep(0.01)
        assert codec.decode(raw.recv_multipart())[0].version == 103
        assert (await link.call(AllocVersion(step=1), timeout_s=HANG_LIMIT_S)).version == 101
        assert refused == ["a message with too many frames or bytes"] and listener.num_bad_frames == 1
        raw.close()
        link.close()
        listener.close()

    run(body)


def test_sending_to_a_peer_that_left_returns_false() -> None:
    async def body() -> None:
        seen: list[bytes] = []
        listener = serve(lambda _, envelope: seen.append(envelope.peer))
        link = Link(tcp_address("127.0.0.1", listener.port), handler=lambda _: None)
        link.send(GetRunCounters())
        while not seen:
            await asyncio.sleep(0.01)
        link.close()
        while listener.send(seen[0], HelloRequired()):
            await asyncio.sleep(0.01)
        listener.close()

    run(body)


def test_messages_for_a_peer_that_does_not_read_are_dropped() -> None:
    async def body() -> None:
        seen: list[bytes] = []
        listener = serve(lambda _, envelope: seen.append(envelope.peer))
        raw = zmq.Context.instance().socket(zmq.DEALER)
        raw.set(zmq.LINGER, 0)
        raw.set(zmq.RCVHWM, 1)
        raw.connect(tcp_address("127.0.0.1", listener.port))
        raw.send_multipart(codec.encode(GetRunCounters()))
        while not seen:
            await asyncio.sleep(0.01)
        failed = JobFailed(reason="x" * codec.MAX_TEXT)
        num_sent = 0
        while listener.send(seen[0], failed):
            num_sent += 1
            assert num_sent < 5_000, "40 MB wait for one peer"
        assert listener.num_dropped == 1
        raw.close()
        listener.close()

    run(body)


def test_only_accepted_messages_are_decoded() -> None:
    async def body() -> None:
        received: list[Any] = []
        screened: list[type] = []

        def screen(peer: bytes, kind: type) -> bool:
            screened.append(kind)
            return kind is AllocVersion

        listener = Listener(
            host="127.0.0.1",
            port=0,
            handler=lambda envelope: received.append(envelope.message),
            max_message_bytes=MAX_BYTES,
            accepts={AllocVersion, Fetch},
            screen=screen,
        )
        raw = zmq.Context.instance().socket(zmq.DEALER)
        raw.set(zmq.LINGER, 0)
        raw.connect(tcp_address("127.0.0.1", listener.port))
        (good,) = codec.encode(AllocVersion(step=3))
        (fetch,) = codec.encode(Fetch(step=0, position=0))
        for frame in (codec.encode(GetRunCounters())[0], fetch, fetch[:-1] + b"\xc1", good):
            raw.send(frame)
        while not received:
            await asyncio.sleep(0.01)
        assert received == [AllocVersion(step=3)] and screened == [Fetch, Fetch, AllocVersion]
        assert listener.num_bad_frames == 1, "a body was decoded that was not to be looked at"
        raw.close()
        listener.close()

    run(body)


def test_a_peer_that_sends_malformed_frames_is_not_read() -> None:
    async def body() -> None:
        received: list[Any] = []
        listener = serve(lambda _, envelope: received.append(envelope.message))
        raw = zmq.Context.instance().socket(zmq.DEALER)
        raw.set(zmq.LINGER, 0)
        raw.connect(tcp_address("127.0.0.1", listener.port))
        for _ in range(16):
            raw.send(b"garbage")
        raw.send_multipart(codec.encode(GetRunCounters()))
        while listener.num_bad_frames < 17:
            await asyncio.sleep(0.01)
        assert received == []
        raw.close()
        listener.close()

    run(body)


def test_muted_peers_are_listened_to_again() -> None:
    peers = BadPeers()
    for number in range(16):
        assert not peers.is_muted(b"a", now_s=0.0), number
        peers.record(b"a", now_s=0.0)
    assert peers.is_muted(b"a", now_s=9.9) and not peers.is_muted(b"b", now_s=9.9)
    assert not peers.is_muted(b"a", now_s=10.1)
    for number in range(3000):
        for _ in range(20):
            peers.record(str(number).encode(), now_s=0.0)
    assert sum(peers.is_muted(str(number).encode(), now_s=1.0) for number in range(3000)) <= 1024


def test_connections_of_vanished_hosts_end() -> None:
    """Both ends probe a silent connection, and give up one on which nothing is acknowledged."""

    async def body() -> None:
        listener = serve(reply)
        link = Link(tcp_address("127.0.0.1", listener.port), handler=lambda _: None)
        await link.call(AllocVersion(step=1), timeout_s=HANG_LIMIT_S)
        ends = connections_at(listener.port)
        assert len(ends) == 2
        for end in ends:
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            end.close()
        link.close()
        listener.close()

    run(body)


def connections_at(port: int) -> list[socket.socket]:
    """This process's ends of the TCP connections to a port."""
    found = []
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        try:
            end = socket.socket(fileno=os.dup(int(descriptor.name)))
        except OSError:  # not a socket
            continue
        with contextlib.suppress(OSError, IndexError):
            if port in (end.getsockname()[1], end.getpeername()[1]):
                found.append(end)
                continue
        end.close()
    return found


BUSY_LISTENER = """
import asyncio, sys, time
from areal_like.wire.channel import Listener

async def main():
    listener = Listener(host="127.0.0.1", port=0, handler=print, max_message_bytes=1 << 20)
    print(listener.port, flush=True)
    time.sleep(6)
    while not listener.num_bad_frames:
        await asyncio.sleep(0.01)
    print("survived", flush=True)

asyncio.run(main())
"""


@pytest.mark.chaos
def test_peer_that_fills_the_queue_and_leaves_does_no_harm() -> None:
    """ZeroMQ heartbeats aborted the process here: one was due on a connection that nobody had read."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY_LISTENER], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        context = zmq.Context()
        peer = context.socket(zmq.DEALER)
        peer.set(zmq.LINGER, 0)
        peer.set(zmq.SNDHWM, 0)
        peer.connect(tcp_address("127.0.0.1", port))
        for _ in range(300):
            peer.send(bytes(200_000))
        time.sleep(1.0)
        peer.close()
        context.term()
        assert process.stdout.readline() == "survived\n"
    assert process.returncode == 0


def test_port_in_use_and_bad_address_are_config_errors() -> None:
    async def body() -> None:
        listener = serve(reply)
        with pytest.raises(ConfigError, match=r"cannot bind .* set buffer\.port to a free port"):
            Listener(
                host="127.0.0.1",
                port=listener.port,
                handler=lambda _: None,
                max_message_bytes=MAX_BYTES,
                setting="buffer.port",
            )
        with pytest.raises(ConfigError, match="want tcp://host:port"):
            Link("nonsense", handler=lambda _: None)
        listener.close()

    run(body)


def test_refusals_of_another_wire_version_are_limited() -> None:
    async def body() -> None:
        listener = serve(lambda _, envelope: None)
        peer = zmq.Context.instance().socket(zmq.DEALER)
        peer.set(zmq.LINGER, 0)
        peer.connect(tcp_address("127.0.0.1", listener.port))
        (newer,) = codec.encode(GetRunCounters(), rid=1)
        for _ in range(100):
            peer.send(
                newer.replace(msgpack.packb(codec.WIRE_VERSION), msgpack.packb(codec.WIRE_VERSION + 1), 1)
            )
        while listener.num_bad_frames < 100:
            await asyncio.sleep(0.01)
        peer.recv()
        num_replies = 1
        while peer.poll(200):
            peer.recv()
            num_replies += 1
        assert num_replies < 20
        peer.close()
        listener.close()

    run(body)


def test_other_wire_version_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        received: list[Any] = []
        listener = serve(lambda _, envelope: received.append(envelope))
        link = Link(tcp_address("127.0.0.1", listener.port), handler=received.append)
        newer = codec.encode(GetRunCounters(), rid=1)
        newer[0] = newer[0].replace(
            msgpack.packb(codec.WIRE_VERSION), msgpack.packb(codec.WIRE_VERSION + 1), 1
        )
        monkeypatch.setattr(channel, "encode", lambda message, *, rid=0: newer)
        with pytest.raises(RefusedError, match="run the same release on both"):
            await link.call(GetRunCounters(), timeout_s=HANG_LIMIT_S)
        assert (received, listener.num_bad_frames) == ([], 1)
        link.close()
        listener.close()

    run(body)
