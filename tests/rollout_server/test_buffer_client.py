"""The buffer client while its buffer restarts, at the same or another address, or cannot write."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import Config, from_mapping
from areal_like.failures import FailureKind
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.daemon import cancelled_on_exit
from areal_like.runtime.waits import PendingWaits
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.messages.hello import Goodbye, Hello, HelloRequired, Ok, Role, Welcome
from areal_like.wire.messages.producer import (
    HeartbeatAck,
    Lease,
    Leases,
    Purpose,
    SampleAck,
    SampleAcks,
    SampleFailed,
    ServerHeartbeat,
    ServerState,
)
from rollout_server.leases.client import BufferClient
from rollout_server.leases.held_leases import HeldLeases
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.ports import held_port
from tests.support.waiting import HANG_LIMIT_S

HELLO = Hello(
    role=Role.ROLLOUT,
    name="r",
    process="0" * 32,
    job="j",
    model="m",
    tokenizer="t",
    dataset="d",
    http_address="127.0.0.1:1",
)
LEASE = Lease(lease_id=1, ticket_id=1, prompt_index=0, purpose=Purpose.TRAIN, sample_indices=[0], seed=0)
FAILED = SampleFailed(
    lease_id=1, ticket_id=1, sample_index=0, kind=FailureKind.REWARD, num_tokens=0, error="no reason"
)


class PlayedBuffer:
    """Welcomes peers and counts messages; acknowledges samples if `acknowledging`."""

    def __init__(self, *, port: int = 0, acknowledging: bool = False) -> None:
        self.acknowledging = acknowledging
        self.trouble = ""
        self.received: Counter[str] = Counter()
        self.peer = b""
        self.listener = Listener(host="127.0.0.1", port=port, handler=self.handle, max_message_bytes=1 << 20)

    def handle(self, envelope: Envelope) -> None:
        self.received[type(envelope.message).__name__] += 1
        self.peer = envelope.peer
        match envelope.message:
            case Hello():
                self.listener.send(
                    envelope.peer, Welcome(job="j", incarnation=1, step=0, newest_version=0), rid=envelope.rid
                )
            case ServerHeartbeat():
                self.listener.send(
                    envelope.peer, HeartbeatAck(step=0, newest_version=0, trouble=self.trouble)
                )
            case Goodbye():
                # As a buffer replies to a heartbeat that follows the goodbye.
                self.listener.send(envelope.peer, HelloRequired())
                self.listener.send(envelope.peer, Ok(), rid=envelope.rid)
            case SampleFailed() if self.acknowledging:
                self.listener.send(
                    envelope.peer, SampleAcks(acks=[SampleAck(lease_id=1, sample_indices=[0])])
                )

    async def expect(self, name: str) -> None:
        async with asyncio.timeout(HANG_LIMIT_S):
            while not self.received[name]:
                await asyncio.sleep(0.01)

    async def lease(self, leases: list[Any]) -> None:
        """Sends LEASE once the client has registered; returns when the client has it in `leases`."""
        await self.expect("ServerHeartbeat")
        self.listener.send(self.peer, Leases(leases=[LEASE]))
        while not leases:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running_client(config: Config) -> AsyncIterator[tuple[BufferClient, HeldLeases, list[Any]]]:
    """Yields a client that serves, the leases that it holds, and those that it got."""
    held, leases = HeldLeases(engine_samples=4, max_episodes=8), list[Any]()
    client = BufferClient(
        config,
        hello=lambda: HELLO,
        held=held,
        waits=PendingWaits(),
        on_leases=leases.extend,
        on_abort=lambda _: None,
    )
    client.announce(state=ServerState.SERVING)
    async with cancelled_on_exit(asyncio.create_task(client.run())):
        yield client, held, leases
    client.close()


def test_messages_to_an_absent_buffer_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.leases.client._HELLO_TIMEOUT_S", 5.0)

    async def body() -> None:
        first = PlayedBuffer(port=port)
        config = from_mapping(
            {"runs_dir": str(tmp_path), "buffer": {"port": port}, "daemon": {"heartbeat_s": 1.0}}
        )
        async with running_client(config) as (client, held, leases):
            await first.lease(leases)
            first.listener.close()
            client.deliver(FAILED)
            for _ in range(150):  # heartbeats that would pile up
                advance(1.0)
                await asyncio.sleep(0.005)
            second = PlayedBuffer(port=port, acknowledging=True)
            await second.expect("SampleFailed")
            await second.expect("ServerHeartbeat")
            while held.num_unacknowledged:
                await asyncio.sleep(0.01)
            assert second.received["ServerHeartbeat"] < 40, second.received
            assert second.received["SampleFailed"] < 15, second.received
        second.listener.close()

    with held_port() as port:
        moved_clock.run(body())


def test_a_buffer_that_moved_gets_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_like.wire.buffer_connection.SILENT_AFTER_S", 0.3)
    monkeypatch.setattr("areal_like.wire.buffer_connection._FOLLOW_S", 0.05)
    monkeypatch.setattr("rollout_server.leases.client._HELLO_TIMEOUT_S", 0.5)
    config = from_mapping(
        {
            "name": "job",
            "runs_dir": str(tmp_path),
            "buffer": {"discovery": "run_dir"},
            "daemon": {"heartbeat_s": 0.02},
        }
    )

    async def body() -> None:
        first = PlayedBuffer()
        endpoint = RunPaths.of(config).endpoints / "buffer.json"
        write_json(endpoint, {"stream": f"tcp://127.0.0.1:{first.listener.port}"})
        async with running_client(config) as (client, held, leases):
            await first.lease(leases)
            first.listener.close()
            client.deliver(FAILED)
            second = PlayedBuffer(acknowledging=True)
            write_json(endpoint, {"stream": f"tcp://127.0.0.1:{second.listener.port}"})
            await second.expect("SampleFailed")
            while held.num_unacknowledged:
                await asyncio.sleep(0.01)
            assert second.received["Hello"] and str(second.listener.port) not in client.problem
        second.listener.close()

    asyncio.run(body())


def test_nothing_is_resent_to_a_buffer_that_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.leases.client._RESEND_AFTER_S", 0.05)

    async def body() -> None:
        buffer = PlayedBuffer()
        config = from_mapping(
            {
                "runs_dir": str(tmp_path),
                "buffer": {"port": buffer.listener.port},
                "daemon": {"heartbeat_s": 0.02},
            }
        )
        async with running_client(config) as (client, _, leases):
            await buffer.expect("ServerHeartbeat")
            buffer.trouble = "disk full"
            buffer.listener.send(buffer.peer, Leases(leases=[LEASE]))
            while not leases:
                await asyncio.sleep(0.01)
            while not client.is_stuck:
                await asyncio.sleep(0.01)
            client.deliver(FAILED)
            await asyncio.sleep(0.5)
            assert buffer.received["SampleFailed"] == 1
            buffer.trouble = ""
            async with asyncio.timeout(HANG_LIMIT_S):
                while buffer.received["SampleFailed"] < 3:
                    await asyncio.sleep(0.01)
        buffer.listener.close()

    asyncio.run(body())


def test_a_server_says_which_results_it_leaves_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        buffer = PlayedBuffer()
        port = {"port": buffer.listener.port}
        config = from_mapping({"runs_dir": str(tmp_path), "buffer": port, "daemon": {"heartbeat_s": 1.0}})
        async with running_client(config) as (client, _, leases):
            await buffer.lease(leases)
            client.deliver(FAILED)
            leaving = asyncio.create_task(client.leave())
            await asyncio.sleep(0.05)
            advance(10.0)
            await leaving
        buffer.listener.close()

    moved_clock.run(body())
    assert "the buffer has not acknowledged 1 samples" in caplog.text


def test_a_server_that_has_left_does_not_register_again(tmp_path: Path) -> None:
    async def body() -> None:
        buffer = PlayedBuffer()
        port = {"port": buffer.listener.port}
        config = from_mapping({"runs_dir": str(tmp_path), "buffer": port, "daemon": {"heartbeat_s": 1.0}})
        client = BufferClient(
            config,
            hello=lambda: HELLO,
            held=HeldLeases(engine_samples=4, max_episodes=8),
            waits=PendingWaits(),
            on_leases=lambda _: None,
            on_abort=lambda _: None,
        )
        running = asyncio.create_task(client.run())
        await buffer.expect("ServerHeartbeat")
        client.announce(state=ServerState.DRAINING)
        await client.leave()
        before = Counter(buffer.received)
        for _ in range(20):
            client.announce(state=ServerState.DRAINING)
            advance(1.0)
            await asyncio.sleep(0.005)
        assert buffer.received == before and before["Hello"] == before["Goodbye"] == 1
        assert not running.done(), "a server with several buffers would end its other connections"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        client.close()
        buffer.listener.close()

    moved_clock.run(body())
