"""Peers that disturb a job of benchmarks/bystanders.py: an external agent, and a rollout server.

    python -m benchmarks.disturbers agent URL
    python -m benchmarks.disturbers server RUN_DIRECTORY

Each process makes at most 50 requests or messages per second until SIGTERM, and then prints a line of JSON
with their number, their outcomes, and its CPU time. In a job without keys, neither needs a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.failures import FailureKind
from areal_like.runtime.command_line import load_config
from areal_like.wire.codec import encode
from areal_like.wire.messages.hello import Refused, Welcome
from areal_like.wire.messages.producer import HeartbeatAck, Lease, Leases, SampleDone, Samples
from areal_like.wire.records import Record
from benchmarks.broken_task import ESCAPES
from benchmarks.session_agents import Connection
from tests.attacks.attacker import Attacker
from tests.attacks.forgeries import HUGE, failure, heartbeat, server_hello
from tests.chaos.producer import synthetic

PAUSE_S = 0.02
"""Pause between two requests, in seconds."""
_CLAIM_WAIT_S = 1.0
_ABSURD_REWARDS: tuple[Any, ...] = (3e38, 1e300, -1e20, "much", None, [1.0], {"reward": 1}, True)
_MALFORMED = (b"{", b"\xff\xfe", b"[]", b'{"messages": 7}', b'{"messages": [{"role": 1}]}', b"[" * 5000)
_FREE_SAMPLES = 64
_AT_ONCE = 20
"""Messages that a server sends before it reads again."""


class Tally:
    """Outcomes of requests, and the pauses between them."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._started_s = time.monotonic()

    def report(self) -> str:
        """Returns a line of JSON."""
        return json.dumps(
            {
                "requests": self.outcomes.total(),
                "outcomes": dict(self.outcomes.most_common()),
                "seconds": round(time.monotonic() - self._started_s, 1),
                "cpu_s": round(time.process_time(), 2),
            }
        )


# --- agent ---


class BrokenAgent:
    """Claims sessions and misuses each of them in a different way."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._host, self._port = host, int(port)
        self.tally = Tally()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        for number in itertools.count():
            connection = Connection(self._host, self._port)
            with contextlib.suppress(OSError, EOFError, ValueError, KeyError):
                await self._one(connection, number)
            connection.close()
            await asyncio.sleep(PAUSE_S)

    async def _one(self, connection: Connection, number: int) -> None:
        body = {"wait_s": _CLAIM_WAIT_S, "name": "broken"}
        status, session = await self._post(connection, "/sessions", body, of="claim")
        if status != 200:
            await asyncio.sleep(0.2)
            return
        path, key = f"/sessions/{session['id']}/v1", session["api_key"]
        messages = [{"role": "user", "content": "1"}]
        match number % 5:
            case 0:  # no request to the model
                await self._post(connection, f"{path}/reward", {"reward": 0.0}, key=key, of="reward")
            case 1:  # only requests to a route that does not exist
                await self._post(connection, f"{path}/responses", {"input": "1"}, key=key, of="route")
            case 2:  # absurd rewards for a good conversation
                body = {"model": "policy", "messages": messages}
                await self._post(connection, f"{path}/chat/completions", body, key=key, of="turn")
                reward = _ABSURD_REWARDS[number // 5 % len(_ABSURD_REWARDS)]
                await self._post(connection, f"{path}/reward", {"reward": reward}, key=key, of="absurd")
            case 3:  # malformed bodies
                content = _MALFORMED[number // 5 % len(_MALFORMED)]
                await self._raw(f"{path}/chat/completions", content, key=key)
                await self._post(connection, f"{path}/chat/completions", {}, key="wrong", of="wrong key")
            case 4:  # an abandoned claim
                return
        await self._post(connection, f"{path}/end", {}, key=key, of="end")

    async def _post(
        self, connection: Connection, path: str, body: dict[str, Any], *, key: str = "", of: str
    ) -> tuple[int, Any]:
        status, response = await connection.post(path, body, api_key=key)
        self.tally.outcomes[f"{of} {status}"] += 1
        await asyncio.sleep(PAUSE_S)
        return status, response

    async def _raw(self, path: str, content: bytes, *, key: str) -> None:
        """Sends one request whose body is malformed."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nAuthorization: Bearer {key}\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        line = await asyncio.wait_for(reader.readline(), 10)
        self.tally.outcomes[f"malformed {line.split()[1].decode() if line else 'closed'}"] += 1
        writer.close()
        await asyncio.sleep(PAUSE_S)


# --- server ---


class LyingServer:
    """A rollout server without an engine that sends forged samples for its leases and reports nonsense."""

    def __init__(self, config: Config, address: str) -> None:
        self._config = config
        self._address = address
        self._held: dict[int, Lease] = {}
        self._version = 0
        self.tally = Tally()

    def run(self, is_over: Callable[[], bool]) -> None:
        """Joins, sends forgeries, and joins again when it is refused."""
        for number in itertools.count():
            with Attacker(self._address) as connection:
                response = connection.call(server_hello(self._config, f"liar-{number % 4}"), timeout_s=2.0)
                self.tally.outcomes[outcome_of(response)] += 1
                lies = self._lies()
                until_s = time.monotonic() + 10.0
                while not is_over() and isinstance(response, Welcome) and time.monotonic() < until_s:
                    self._send(connection, lies)
                    self._read(connection)
            self._held.clear()
            if is_over():
                return
            time.sleep(0.5)

    def _send(self, connection: Attacker, lies: Iterator[tuple[str, Any]]) -> None:
        for kind, message in itertools.islice(lies, _AT_ONCE):
            frames = message if isinstance(message, list) else encode(message, rid=1)
            connection.try_send(frames)
            self.tally.outcomes[kind] += 1
            time.sleep(PAUSE_S)

    def _read(self, connection: Attacker) -> None:
        for message in connection.received(wait_s=0.0):
            if isinstance(message, Leases):
                self._held |= {lease.lease_id: lease for lease in message.leases}
            elif isinstance(message, HeartbeatAck):
                self._version = message.newest_version
        connection.inbox.clear()

    def _lies(self) -> Iterator[tuple[str, Any]]:
        """Yields (kind, message or frames)."""
        for number in itertools.count():
            true = heartbeat(free=_FREE_SAMPLES, version=self._version, leases=tuple(self._held))
            yield "heartbeat", true
            match number % 10:
                case 7:
                    stats = {"tokens_generated": 1e300, "running": -1e300, f"{ESCAPES}x": 1e17}
                    yield "absurd statistics", replace(true, stats=stats, waits={f"engine: {ESCAPES}": 1e17})
                case 8:
                    yield "absurd credit", replace(true, free_samples=HUGE, leases=[-1, HUGE])
                case 9:
                    yield "absurd version", replace(true, weights_version=HUGE)
            for lease in list(self._held.values())[:4]:
                yield from self._about(lease, number)

    def _about(self, lease: Lease, number: int) -> Iterator[tuple[str, Any]]:
        index = lease.sample_indices[0] if lease.sample_indices else 0
        match (number + lease.ticket_id) % 5:
            case 0:
                yield (
                    "failed",
                    replace(
                        failure(
                            lease_id=lease.lease_id,
                            ticket_id=lease.ticket_id,
                            index=index,
                            kind=FailureKind.ENGINE,
                        ),
                        error=f"{ESCAPES}lies",
                    ),
                )
                self._held.pop(lease.lease_id, None)
            case 1:
                yield "future version", self._forged(lease, index, version=2_000_000_000)
                self._held.pop(lease.lease_id, None)
            case 2:
                yield "wrong sample", self._forged(lease, index + 1000, version=0)
            case 3:
                frames = encode(self._forged(lease, index, version=0))
                yield "torn record", [frames[0], *(frame[:-8] + bytes(8) for frame in frames[1:])]
            case 4:
                yield "another's ticket", self._forged(replace(lease, ticket_id=1), index, version=0)

    def _forged(self, lease: Lease, index: int, *, version: int) -> Samples:
        trajectory = synthetic(lease.ticket_id, index, num_tokens=8, version=version)
        record = Record.of(lease.ticket_id, index, trajectory)
        return Samples(samples=[SampleDone(lease_id=lease.lease_id, record=record)])


def outcome_of(response: Any) -> str:
    """Returns the outcome of a hello."""
    if isinstance(response, Refused):
        return f"refused: {response.field}"
    return "joined" if isinstance(response, Welcome) else "no response"


def main() -> None:
    """Disturbs until SIGTERM."""
    kind, target = sys.argv[1:]
    is_over = False

    def end(*_: object) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, end)
    if kind == "server":
        config = load_config(["--config", f"{target}/config.yaml"])
        endpoint = json.loads((Path(target) / "endpoints" / "buffer.json").read_text())
        server = LyingServer(config, str(endpoint["stream"]))
        server.run(lambda: is_over)
        print(server.tally.report(), flush=True)
        return
    agent = BrokenAgent(target)

    async def run() -> None:
        work = asyncio.create_task(agent.run())
        while not is_over:
            await asyncio.sleep(0.1)
        work.cancel()
        await asyncio.wait([work])

    asyncio.run(run())
    print(agent.tally.report(), flush=True)


if __name__ == "__main__":
    main()
