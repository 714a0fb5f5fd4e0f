"""Where peers look for the buffer: settings, or the file that it writes into the run's directory."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import Config, from_mapping
from areal_like.errors import ArealError
from areal_like.paths import RunPaths, write_json
from areal_like.wire.addresses import buffer_addresses, buffer_lookup, wait_for_addresses
from areal_like.wire.buffer_connection import BufferConnection
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.messages.consumer import FinishRun, VersionGranted
from tests.support.waiting import HANG_LIMIT_S


def config_in(directory: Path, **buffer: Any) -> Config:
    return from_mapping(
        {"name": "job", "runs_dir": str(directory), "buffer": {"discovery": "run_dir"} | buffer}
    )


def test_the_address_is_in_the_runs_directory(tmp_path: Path) -> None:
    config = config_in(tmp_path, num_shards=2)
    with pytest.raises(ArealError, match="buffer-0 has written no address"):
        buffer_addresses(config)
    for shard, port in enumerate((5000, 6000)):
        file = RunPaths.of(config).endpoints / f"buffer-{shard}.json"
        write_json(file, {"stream": f"tcp://10.0.0.{shard}:{port}"})
    assert buffer_addresses(config) == ["tcp://10.0.0.0:5000", "tcp://10.0.0.1:6000"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"stream": 5}', '{"stream": "ipc:///tmp/x"}', '{"stream": "tcp://a b:1"}'),
        json.dumps({"stream": f"tcp://{'a' * 400}:1"}),
    ],
)
def test_a_file_without_an_address_is_no_buffer(tmp_path: Path, content: str) -> None:
    config = config_in(tmp_path)
    look_up = buffer_lookup(config, 0)
    assert look_up is not None and look_up() is None
    file = RunPaths.of(config).endpoints / "buffer.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert look_up() is None


def test_a_peer_may_start_before_the_buffer(tmp_path: Path) -> None:
    config = config_in(tmp_path, num_shards=2)
    endpoints = RunPaths.of(config).endpoints

    async def run() -> None:
        waiting = asyncio.create_task(wait_for_addresses(config))
        for shard in (0, 1):
            await asyncio.sleep(0)
            assert not waiting.done()
            write_json(endpoints / f"buffer-{shard}.json", {"stream": "tcp://10.0.0.1:5000"})
        await waiting
        (endpoints / "buffer-1.json").unlink()
        await wait_for_addresses(config, gives_up=lambda: True)
        await wait_for_addresses(from_mapping({"buffer": {"port": 5000}}))

    asyncio.run(run())


def test_a_request_without_reply_follows_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer's request is sent again where the buffer was started again, not where it was."""
    monkeypatch.setattr("areal_like.wire.buffer_connection.SILENT_AFTER_S", 0.2)
    monkeypatch.setattr("areal_like.wire.buffer_connection._FOLLOW_S", 0.05)

    async def body() -> None:
        received = asyncio.Event()

        def ignore(_: Envelope) -> None:
            received.set()

        def answer(envelope: Envelope) -> None:
            second.send(envelope.peer, VersionGranted(version=7), rid=envelope.rid)

        first = Listener(host="127.0.0.1", port=0, handler=ignore, max_message_bytes=1 << 20)
        second = Listener(host="127.0.0.1", port=0, handler=answer, max_message_bytes=1 << 20)
        addresses, reopened = [f"tcp://127.0.0.1:{first.port}"], list[bool]()

        class Connection(BufferConnection):
            def reopened(self) -> None:
                super().reopened()
                reopened.append(True)

            def on_message(self, message: Any) -> None:
                raise AssertionError(message)

            def hello_required(self) -> None:
                raise AssertionError("this test registers nothing")

            def fatal(self, error: ArealError) -> None:
                raise error

        connection = Connection(addresses[0], max_message_bytes=1 << 20, look_up=lambda: addresses[-1])
        pending = asyncio.create_task(connection.call(FinishRun(), timeout_s=HANG_LIMIT_S))
        await received.wait()
        await asyncio.sleep(0.5)
        assert not reopened, "the file names the same address"
        addresses.append(f"tcp://127.0.0.1:{second.port}")
        assert await pending == VersionGranted(version=7)
        assert reopened == [True] and connection.address == addresses[-1]
        connection.close()
        first.close()
        second.close()

    asyncio.run(body())
