"""A rollout server in its own process, and a fake buffer on a real socket."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from areal_like.config import Config, from_mapping
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import save_config
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.messages.hello import Goodbye, Hello, HelloRequired, Ok, Welcome
from areal_like.wire.messages.producer import (
    HeartbeatAck,
    Lease,
    Leases,
    Purpose,
    SampleAck,
    SampleAcks,
    SampleDone,
    SampleFailed,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from tests.support import warm_start
from tests.support.waiting import HANG_LIMIT_S, wait_until_ready

ROOT = Path(__file__).resolve().parents[2]


def ack_of(result: SampleDone | SampleFailed) -> SampleAcks:
    """The acknowledgement of one sample."""
    return SampleAcks(acks=[SampleAck(lease_id=result.lease_id, sample_indices=[result.sample_index])])


class PlayedBuffer:
    """Welcomes peers and acknowledges samples; keeps all messages for `expect`, each sample separately."""

    def __init__(self) -> None:
        self.received: queue.Queue[Any] = queue.Queue()
        self.acknowledging = True
        """True: samples are acknowledged as they arrive."""
        self.newest_version = 0
        self.hellos: list[Hello] = []
        self.beat: ServerHeartbeat | None = None
        """The last heartbeat."""
        self._peer = b""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listener: Listener = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        self.port = self._listener.port

    async def _open(self) -> Listener:
        return Listener(host="127.0.0.1", port=0, handler=self._on_message, max_message_bytes=1 << 24)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._listener.close()

    def send(self, message: Any) -> None:
        self._loop.call_soon_threadsafe(self._listener.send, self._peer, message)

    def lease(
        self, lease_id: int, *, samples: int | list[int], prompt: int = 0, purpose: Purpose = Purpose.TRAIN
    ) -> Lease:
        indices = list(range(samples)) if isinstance(samples, int) else samples
        return Lease(
            lease_id=lease_id,
            ticket_id=100 + lease_id,
            prompt_index=prompt,
            purpose=purpose,
            eval_set="eval" if purpose is Purpose.EVAL else "",
            sample_indices=indices,
            seed=lease_id * 64,
        )

    def grant(self, *leases: Lease) -> None:
        self.send(Leases(leases=list(leases)))

    def acknowledge(self, result: SampleDone | SampleFailed) -> None:
        self.send(ack_of(result))

    def expect(
        self, kind: type | tuple[type, ...], *, count: int = 1, timeout_s: float = HANG_LIMIT_S
    ) -> list[Any]:
        """The next `count` messages of a kind; others are skipped."""
        deadline_s = time.monotonic() + timeout_s
        found: list[Any] = []
        while len(found) < count:
            try:
                message = self.received.get(timeout=max(0.01, deadline_s - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"{len(found)} of {count} {kind} within {timeout_s} s; last heartbeat {self.beat}"
                ) from None
            if isinstance(message, kind):
                found.append(message)
        return found

    def expect_beat(
        self, accept: Callable[[ServerHeartbeat], bool], *, timeout_s: float = HANG_LIMIT_S
    ) -> ServerHeartbeat:
        """Waits until the newest heartbeat is accepted."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if (beat := self.beat) is not None and accept(beat):
                return beat
            time.sleep(0.01)
        raise AssertionError(f"no such heartbeat within {timeout_s} s; the last is {self.beat}")

    def restart(self) -> None:
        """Acts like a restarted buffer, at which no peer is registered."""
        self.send(HelloRequired())

    def _on_message(self, envelope: Envelope) -> None:
        message, self._peer = envelope.message, envelope.peer
        match message:
            case Hello():
                self.hellos.append(message)
                welcome = Welcome(job=message.job, incarnation=1, step=0, newest_version=self.newest_version)
                self._answer(envelope, welcome)
            case ServerHeartbeat():
                self.beat = message
                self._answer(envelope, HeartbeatAck(step=0, newest_version=self.newest_version))
                return
            case Goodbye():
                self._answer(envelope, Ok())
        for part in message.samples if isinstance(message, Samples) else [message]:
            if self.acknowledging and isinstance(part, SampleDone | SampleFailed):
                self._listener.send(envelope.peer, ack_of(part))
            self.received.put(part)

    def _answer(self, envelope: Envelope, answer: Any) -> None:
        self._listener.send(envelope.peer, answer, rid=envelope.rid)


def job(directory: Path, *, port: int, model_dir: Path, **overrides: Any) -> Config:
    """A small job's configuration; `overrides` are whole sections."""
    mapping = {
        "name": "job",
        "runs_dir": str(directory / "runs"),
        "model": {"path": str(model_dir)},
        "buffer": {"port": port},
        "rollout": {"max_running": 16, "queue_samples": 8},
        "daemon": {"heartbeat_s": 0.1, "log_level": "DEBUG"},
        "eval": {"num_prompts": 8},
    }
    return from_mapping(mapping | overrides)


class ServerProcess:
    """`python -m rollout_server` with this configuration, or another daemon beside it (`module`)."""

    def __init__(self, config: Config, *, name: str = "rollout-0", module: str = "rollout_server") -> None:
        self.paths = RunPaths.of(config)
        path = self.paths.config
        save_config(config, path)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", module, "--name", name, "--config", str(path)]
        self.process = warm_start.Popen(
            command, cwd=path.parent, env=environment, stderr=subprocess.PIPE, text=True
        )

    def wait_until(self, probe: Callable[[], bool], *, what: str) -> None:
        """Waits for `probe` as long as the server and its engine make progress."""
        wait_until_ready(self.process, logs=self.paths.logs, probe=probe, what=what)

    def wait_for_beat(
        self, buffer: PlayedBuffer, accept: Callable[[ServerHeartbeat], bool]
    ) -> ServerHeartbeat:
        """As `PlayedBuffer.expect_beat`, for a heartbeat that needs a start of the server or its engine."""
        self.wait_until(lambda: buffer.beat is not None and accept(buffer.beat), what="heartbeat")
        assert buffer.beat is not None
        return buffer.beat

    def wait_serving(self, buffer: PlayedBuffer) -> None:
        """Waits until the server announces SERVING."""
        self.wait_for_beat(buffer, lambda beat: beat.state is ServerState.SERVING)

    def terminate(self, *, timeout_s: float = HANG_LIMIT_S) -> tuple[int, float, str]:
        """Sends SIGTERM; returns the exit code, the seconds that the drain took, and stderr."""
        started_s = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=timeout_s, started_s=started_s)

    def wait(
        self, *, timeout_s: float = HANG_LIMIT_S, started_s: float | None = None
    ) -> tuple[int, float, str]:
        """Waits for the server's end; returns as `terminate`."""
        started_s = time.monotonic() if started_s is None else started_s
        _, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, time.monotonic() - started_s, errors

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextmanager
def serving(config: Config) -> Iterator[ServerProcess]:
    """A server process, killed at the end if it still runs."""
    server = ServerProcess(config)
    try:
        yield server
    finally:
        server.close()


def wait_until(accept: Callable[[], bool], *, timeout_s: float = HANG_LIMIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not accept():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.02)
