"""Listener and Link with CURVE: who is refused, renewed keys on open connections, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq

from areal_like.errors import ArealError, ConfigError, DeadlineError
from areal_like.security.administration import add_key, revoke_key, rotate_keys
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyDirectory, KeyRole, write_public
from areal_like.wire import codec, pump
from areal_like.wire.channel import Envelope, Link, Listener, tcp_address
from areal_like.wire.messages.consumer import AllocVersion, VersionGranted
from areal_like.wire.messages.hello import Refused
from tests.support.keys import keyed_link, keyed_listener, keyring, keys_of_machine, new_keys
from tests.support.ports import held_port
from tests.support.waiting import HANG_LIMIT_S


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(HANG_LIMIT_S):
            await body()

    asyncio.run(bounded())


def grant(listener: Listener, envelope: Envelope) -> None:
    listener.send(envelope.peer, VersionGranted(version=envelope.message.step + 100), rid=envelope.rid)


def address_of(listener: Listener) -> str:
    return tcp_address("127.0.0.1", listener.port)


async def works(link: Link, step: int, *, timeout_s: float = HANG_LIMIT_S) -> bool:
    """True if a request is answered."""
    try:
        return bool(
            await link.call(AllocVersion(step=step), timeout_s=timeout_s)
            == VersionGranted(version=step + 100)
        )
    except DeadlineError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return new_keys(tmp_path / "keys")


def test_each_message_has_its_senders_key(keys: Path) -> None:
    async def body() -> None:
        senders = []

        def handle(listener: Listener, envelope: Envelope) -> None:
            assert envelope.key is not None
            senders.append((envelope.key.name, envelope.key.role))
            grant(listener, envelope)

        add_key(keys, "gpu-7", KeyRole.ROLLOUT)
        listener = keyed_listener(keyring(keys, KeyRole.BUFFER), handle)
        rings = [keyring(keys, KeyRole.ROLLOUT, name="gpu-7"), keyring(keys, KeyRole.TRAINER)]
        links = [keyed_link(address_of(listener), ring) for ring in rings]
        for link in links:
            assert await works(link, 1)
        assert senders == [("gpu-7", KeyRole.ROLLOUT), ("trainer", KeyRole.TRAINER)]
        assert (listener.num_refused_handshakes, listener.num_refused_frames) == (0, 0)
        for link in links:
            link.close()
        listener.close()

    run(body)


def test_strangers_get_no_answer(keys: Path, tmp_path: Path) -> None:
    async def body() -> None:
        listener = keyed_listener(keyring(keys, KeyRole.BUFFER), grant, roles=(KeyRole.ROLLOUT,))
        address = address_of(listener)
        other_job = new_keys(tmp_path / "other")
        # The stranger knows the buffer's public key, which is no secret, and has a key that is not allowed.
        mixed = keys_of_machine(other_job, tmp_path / "mixed", "rollout")
        real = [key for key in KeyDirectory(keys).allowed.keys if key.role is KeyRole.BUFFER]
        own = [key for key in KeyDirectory(mixed).allowed.keys if key.role is KeyRole.ROLLOUT]
        write_public(mixed, real + own)
        links = {
            "no key": keyed_link(address, None),
            "unknown key": keyed_link(address, keyring(mixed, KeyRole.ROLLOUT)),
            "another role": keyed_link(address, keyring(keys, KeyRole.TRAINER)),
            "an external agent": keyed_link(address, keyring(keys, KeyRole.AGENT)),
            "a wrong server key": keyed_link(address, keyring(other_job, KeyRole.ROLLOUT)),
        }
        answered = await asyncio.gather(*(works(link, 1, timeout_s=0.7) for link in links.values()))
        assert dict(zip(links, answered, strict=True)) == dict.fromkeys(links, False)
        await until(lambda: listener.num_refused_handshakes >= len(links))
        assert listener.num_refused_frames == 0, "nothing of a stranger is read"
        for link in links.values():
            link.close()
        good = keyed_link(address, keyring(keys, KeyRole.ROLLOUT))
        assert await works(good, 2), "the listener goes on"
        good.close()
        listener.close()

    run(body)


def test_a_scan_gets_no_message_and_stops_nothing(keys: Path) -> None:
    def scan(port: int) -> set[bytes]:
        """The first bytes that a stranger reads, who sends `start` or nothing."""
        seen = set()
        greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL" + bytes(48)
        for start in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            bytes(range(256)) * 40,
            greeting,
            greeting + b"\x04\x19\x05READY",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=0.3) as stranger:
                stranger.settimeout(0.1)
                try:
                    stranger.sendall(start)
                    seen.add(stranger.recv(4096)[:12])
                except OSError:
                    pass
        return seen

    async def body() -> None:
        listener = keyed_listener(keyring(keys, KeyRole.BUFFER), grant)
        good = keyed_link(address_of(listener), keyring(keys, KeyRole.ROLLOUT))
        assert await works(good, 1)
        seen = await asyncio.to_thread(scan, listener.port)
        # All that is ever sent in clear is the greeting of the protocol itself.
        assert all(start == b"" or start.startswith(b"\xff") for start in seen), seen
        assert await works(good, 2) and listener.num_bad_frames == 0
        good.close()
        listener.close()

    run(body)


def test_nothing_is_readable_on_the_wire(keys: Path) -> None:
    async def body() -> None:
        listener = keyed_listener(keyring(keys, KeyRole.BUFFER), grant)
        seen = bytearray()
        taps: list[asyncio.Task[None] | None] = []

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):  # an end that is closed may reset the connection
                while data := await reader.read(1 << 16):
                    seen.extend(data)
                    writer.write(data)
                writer.close()
                await writer.wait_closed()

        async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taps.append(asyncio.current_task())
            near, far = await asyncio.open_connection("127.0.0.1", listener.port)
            await asyncio.gather(forward(reader, far), forward(near, writer))

        server = await asyncio.start_server(tap, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = keyed_link(tcp_address("127.0.0.1", port), keyring(keys, KeyRole.ROLLOUT))
        assert await works(link, 1)
        assert b"CURVE" in seen and b"AllocVersion" not in seen and b"rollout" not in seen
        link.close()
        listener.close()
        await asyncio.gather(*filter(None, taps))
        server.close()

    run(body)


def test_a_revoked_key_is_out_on_an_open_connection(keys: Path) -> None:
    async def body() -> None:
        add_key(keys, "gpu-7", KeyRole.ROLLOUT)
        buffer = keyring(keys, KeyRole.BUFFER)
        listener = keyed_listener(buffer, grant)
        refusals: list[object] = []
        bad = keyed_link(
            address_of(listener), keyring(keys, KeyRole.ROLLOUT, name="gpu-7"), handler=refusals.append
        )
        good = keyed_link(address_of(listener), keyring(keys, KeyRole.ROLLOUT))
        assert await works(bad, 1) and await works(good, 1)
        revoke_key(keys, "gpu-7")
        buffer.refresh()
        for _ in range(40):
            bad.send(AllocVersion(step=2))
        await until(lambda: listener.num_refused_frames == 40 and bool(refusals))
        assert await works(good, 3)
        assert set(refusals) == {Refused(field="key", reason="this key was revoked or has expired")}
        assert len(refusals) <= 16, "answers to a peer that does not stop are bounded"
        bad.close()
        good.close()
        listener.close()

    run(body)


@pytest.mark.parametrize("first", ["server", "client"])
def test_keys_are_renewed_while_requests_are_pending(first: str, keys: Path) -> None:
    async def body() -> None:
        buffer, rollout = keyring(keys, KeyRole.BUFFER), keyring(keys, KeyRole.ROLLOUT)
        listener = keyed_listener(buffer, grant)
        link = keyed_link(address_of(listener), rollout)
        assert await works(link, 1)
        old, port = rollout.identity, listener.port
        done: list[bool] = []

        async def requests() -> None:
            for step in range(60):
                done.append(await works(link, step))
                await asyncio.sleep(0.01)

        task = asyncio.create_task(requests())
        await until(lambda: len(done) > 5)
        rotate_keys(keys, grace_s=1000)
        for ring in (buffer, rollout) if first == "server" else (rollout, buffer):
            ring.refresh()
            await asyncio.sleep(0.3)
        await task
        assert done == [True] * 60 and listener.port == port
        assert rollout.identity != old
        link.close()
        listener.close()

    run(body)


def test_an_old_key_works_in_the_grace_only(keys: Path, tmp_path: Path) -> None:
    """A machine with the old secret and an old public.json connects until the grace is over."""

    async def body() -> None:
        now_s = 0.0
        machine = keys_of_machine(keys, tmp_path / "machine", "rollout")
        buffer = keyring(keys, KeyRole.BUFFER, clock=lambda: now_s)
        listener = keyed_listener(buffer, grant)
        link = keyed_link(address_of(listener), keyring(machine, KeyRole.ROLLOUT))
        assert await works(link, 1)
        rotate_keys(keys, "rollout", grace_s=1000, now_unix_s=1000.0)
        buffer.refresh()
        assert await works(link, 2)
        now_s = 2001.0
        assert not await works(link, 3, timeout_s=0.3)
        await until(lambda: listener.num_refused_frames == 1)
        late = keyed_link(address_of(listener), keyring(machine, KeyRole.ROLLOUT))
        assert not await works(late, 4, timeout_s=0.5)
        await until(lambda: listener.num_refused_handshakes >= 1)
        for own in (link, late):
            own.close()
        listener.close()

    run(body)


def test_a_server_whose_key_is_revoked_gets_nothing(keys: Path) -> None:
    async def body() -> None:
        received = []

        def handle(listener: Listener, envelope: Envelope) -> None:
            received.append(envelope.message)
            grant(listener, envelope)

        impostor, rollout = keyring(keys, KeyRole.BUFFER), keyring(keys, KeyRole.ROLLOUT)
        listener = keyed_listener(impostor, handle)
        link = keyed_link(address_of(listener), rollout)
        assert await works(link, 1)
        revoke_key(keys, "buffer")
        rollout.refresh()
        await asyncio.sleep(0.05)
        assert not await works(link, 2, timeout_s=0.5)
        assert [message.step for message in received] == [1]
        with pytest.raises(ConfigError, match="no valid key of role buffer"):
            keyed_link(address_of(listener), rollout)
        link.close()
        listener.close()

    run(body)


def test_a_link_finds_a_server_that_starts_later(keys: Path) -> None:
    """Also one that is replaced by a process with the same key, as after a crash."""

    async def body() -> None:
        link = keyed_link(tcp_address("127.0.0.1", port), keyring(keys, KeyRole.ROLLOUT))
        waiting = asyncio.create_task(works(link, 1))
        await asyncio.sleep(0.2)
        for step in (1, 2):
            listener = await at_port(port, keyring(keys, KeyRole.BUFFER))
            if step == 1:
                assert await waiting
            else:
                assert await works(link, step)
            listener.close()
        link.close()

    async def at_port(port: int, ring: Keyring) -> Listener:
        from areal_like.wire.curve import CurveServer

        listener: list[Listener] = []
        curve = CurveServer(ring, roles=[KeyRole.ROLLOUT], on_failure=lambda error: None)
        listener.append(
            Listener(
                host="127.0.0.1",
                port=port,
                handler=lambda envelope: grant(listener[0], envelope),
                max_message_bytes=1 << 20,
                curve=curve,
            )
        )
        return listener[0]

    with held_port() as port:
        run(body)


def test_a_port_that_is_taken_ends_the_rotation(
    keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        monkeypatch.setattr("areal_like.wire.curve._BIND_TIMEOUT_S", 0.3)
        errors: list[ArealError] = []
        buffer = keyring(keys, KeyRole.BUFFER)
        listener = keyed_listener(buffer, grant, on_failure=errors.append)
        bind = zmq.Socket.bind

        def taken(self: zmq.Socket[bytes], address: str) -> object:
            if address.startswith("tcp://"):
                raise zmq.ZMQError(zmq.EADDRINUSE)
            return bind(self, address)

        monkeypatch.setattr(zmq.Socket, "bind", taken)
        rotate_keys(keys, "buffer", grace_s=100)
        buffer.refresh()
        await until(lambda: bool(errors))
        assert f":{listener.port} again with the renewed key: Address already in use" in str(errors[0])
        listener.close()

    caplog.set_level(logging.ERROR)
    run(body)


def test_a_second_rotation_while_the_port_is_taken(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        errors: list[ArealError] = []
        buffer = keyring(keys, KeyRole.BUFFER)
        listener = keyed_listener(buffer, grant, on_failure=errors.append)
        bind, is_taken = zmq.Socket.bind, True

        def bound(self: zmq.Socket[bytes], address: str) -> object:
            if is_taken and address.startswith("tcp://"):
                raise zmq.ZMQError(zmq.EADDRINUSE)
            return bind(self, address)

        monkeypatch.setattr(zmq.Socket, "bind", bound)
        for _ in range(2):
            rotate_keys(keys, "buffer", grace_s=100)
            buffer.refresh()
        is_taken = False
        link = keyed_link(address_of(listener), keyring(keys, KeyRole.ROLLOUT))
        assert await works(link, 1) and not errors
        link.close()
        listener.close()

    run(body)


def test_a_failed_check_of_keys_ends_the_daemon(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        errors: list[ArealError] = []
        buffer = keyring(keys, KeyRole.BUFFER)
        listener = keyed_listener(buffer, grant, on_failure=errors.append)
        monkeypatch.setattr(buffer, "sender", None)
        link = keyed_link(address_of(listener), keyring(keys, KeyRole.ROLLOUT))
        await until(lambda: bool(errors))
        assert "keys cannot be checked any more: TypeError" in str(errors[0])
        link.close()
        listener.close()

    run(body)


def test_a_frame_of_another_version_is_readable(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad frames of a peer with a key are counted and answered as without keys."""

    async def body() -> None:
        listener = keyed_listener(keyring(keys, KeyRole.BUFFER), grant)
        received: list[object] = []
        link = keyed_link(address_of(listener), keyring(keys, KeyRole.ROLLOUT), handler=received.append)
        assert await works(link, 1)
        monkeypatch.setattr(codec, "WIRE_VERSION", codec.WIRE_VERSION + 1)
        frames = codec.encode(AllocVersion(step=1))
        monkeypatch.undo()
        link._pump.send(frames)
        await until(lambda: bool(received))
        assert isinstance(received[0], Refused) and received[0].field == "wire version"
        link.close()
        listener.close()

    run(body)


def test_a_stranger_has_little_time_for_a_handshake(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could send a frame of `max_message_bytes` before it has shown a key, on every connection."""
    monkeypatch.setattr(pump, "_HANDSHAKE_S", 0.3)

    async def body() -> None:
        listener = keyed_listener(keyring(keys, KeyRole.BUFFER), grant)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32))
        writer.write(b"\x06" + (1 << 19).to_bytes(8) + bytes(1 << 18))
        async with asyncio.timeout(HANG_LIMIT_S):
            await reader.read(-1)
        writer.close()
        await until(lambda: listener.num_refused_handshakes == 1)
        link = keyed_link(address_of(listener), keyring(keys, KeyRole.TRAINER))
        assert await works(link, 1)
        link.close()
        listener.close()

    run(body)
