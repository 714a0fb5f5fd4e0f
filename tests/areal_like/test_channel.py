"""Listener and Link over real sockets: requests and replies, garbage, a peer that leaves, a port in use."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest
import zmq

from areal_like.errors import ArealError, ConfigError, DeadlineError, PeerLostError, RefusedError
from areal_like.wire import channel, codec
from areal_like.wire.channel import Envelope, Link, Listener, tcp_address
from areal_like.wire.messages.consumer import AllocVersion, CommitStep, Fetch, GetRunCounters, VersionGranted
from areal_like.wire.messages.hello import HelloRequired, JobFailed, Refused

MAX_BYTES = 1 << 20


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
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
            *(link.call(AllocVersion(step=step), timeout_s=5) for step in range(600))
        )
        assert [a.version for a in replies] == [step + 100 for step in range(600)]
        with pytest.raises(RefusedError, match="closed"):
            await link.call(GetRunCounters(), timeout_s=5)
        with pytest.raises(ArealError, match="the job is over"):
            await link.call(CommitStep(step=0), timeout_s=5)
        link.close()
        listener.close()

    run(body)


def test_unsolicited_messages_and_deadlines() -> None:
    async def body() -> None:
        received: list[Any] = []
        listener = serve(reply)
        link = Link(tcp_address("127.0.0.1", listener.port), handler=received.append)
        with pytest.raises(DeadlineError, match=r"Fetch within 0\.3 s"):
            await link.call(Fetch(step=0, position=0), timeout_s=0.3)
        assert received == [HelloRequired()]
        pending = asyncio.ensure_future(link.call(Fetch(step=0, position=0), timeout_s=10))
        await asyncio.sleep(0.05)
        link.close()
        with pytest.raises(PeerLostError):
            await pending
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
        assert (await link.call(AllocVersion(step=1), timeout_s=5)).version == 101
        # Over the size limit: ZeroMQ itself closes that peer's connection and no other.
        raw.send(bytes(MAX_BYTES + 1))
        await asyncio.sleep(0.2)
        assert (await link.call(AllocVersion(step=2), timeout_s=5)).version == 102
        assert listener.num_bad_frames == 1000
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
        num_replies = 0
        while peer.poll(200):
            peer.recv()
            num_replies += 1
        assert 0 < num_replies < 20
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
            await link.call(GetRunCounters(), timeout_s=5)
        assert (received, listener.num_bad_frames) == ([], 1)
        link.close()
        listener.close()

    run(body)
