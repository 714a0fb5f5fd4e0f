"""Low-cost external agents: raw HTTP over asyncio, one persistent connection each.

    python -m benchmarks.session_agents '{"url": ..., "num_agents": 128, ...}' FILE

Each agent claims a session, makes its turns with a pause after each, posts the number of its turns as the
reward, ends the session, and claims the next one, until SIGTERM. A line of JSON is then written to FILE for
each turn and each session; `begun_s` and `ended_s` are times of CLOCK_MONOTONIC, which all processes of the
machine share.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.conversations import CONVERSATIONS

_CLAIM_WAIT_S = 20.0
_RETRY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of one process of agents."""

    url: str
    num_agents: int
    num_turns: int
    pause_s: float
    """Mean pause after a turn; each pause is between half and one and a half times the mean."""
    seed: int
    api: str = "chat"
    """Of CONVERSATIONS."""

    def dumps(self) -> str:
        """The plan as a command-line argument."""
        return json.dumps(asdict(self))


class Connection:
    """A persistent HTTP/1.1 connection of one client. `post` may raise OSError or EOFError; it can be used
    again after that."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(
        self, path: str, body: dict[str, Any], *, api_key: str = "", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Sends a request; returns status and JSON of the response."""
        await self.send(path, body, api_key=api_key, headers=headers)
        return await self.receive()

    async def send(
        self, path: str, body: dict[str, Any], *, api_key: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Sends the request only."""
        content = json.dumps(body).encode()
        fields = {
            "Host": f"{self._host}:{self._port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
        }
        if api_key:
            fields["Authorization"] = f"Bearer {api_key}"
        fields |= headers or {}
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {text}\r\n" for name, text in fields.items())
        if self._streams is None or self._streams[0].at_eof():
            self.close()
            self._streams = await asyncio.open_connection(self._host, self._port)
        self._streams[1].write(head.encode() + b"\r\n" + content)
        await self._streams[1].drain()

    async def receive(self) -> tuple[int, Any]:
        """Status and JSON of the response to the last request."""
        assert self._streams is not None
        reader = self._streams[0]
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            content = await reader.readexactly(int(fields["content-length"]))
        except (OSError, EOFError):
            self.close()
            raise
        if fields.get("connection") == "close":
            self.close()
        return int(head[0].split()[1]), json.loads(content)

    def close(self) -> None:
        """Closes the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Agents:
    """The agents of one process."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        host, _, port = plan.url.removeprefix("http://").partition(":")
        self._host, self._port = host, int(port)
        self._rng = random.Random(plan.seed)
        self.events: list[dict[str, Any]] = []

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until `stopping` is set."""
        agents = [asyncio.create_task(self._agent()) for _ in range(self._plan.num_agents)]
        stop = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([*agents, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in (*agents, stop):
            task.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
        for task in done:
            task.result()

    async def _agent(self) -> None:
        connection = Connection(self._host, self._port)
        try:
            while True:
                status, session = await connection.post("/sessions", {"wait_s": _CLAIM_WAIT_S})
                if status == 200:
                    await self._work(connection, session)
                else:
                    await asyncio.sleep(_RETRY_S)
        finally:
            connection.close()

    async def _work(self, connection: Connection, session: dict[str, Any]) -> None:
        path, key = f"/sessions/{session['id']}/v1", session["api_key"]
        conversation = CONVERSATIONS[self._plan.api](str(session["example"]["index"]))
        claimed_s = time.monotonic()
        for turn in range(self._plan.num_turns):
            begun_s = time.monotonic()
            body = conversation.body()
            status, answer = await connection.post(f"{path}/{conversation.route}", body, api_key=key)
            self._note("turn", session, status, begun_s=begun_s, turn=turn)
            if status != 200:
                return
            conversation.take(answer)
            conversation.say(f"tool {turn}")
            await asyncio.sleep(self._plan.pause_s * self._rng.uniform(0.5, 1.5))
        for route, body in (("reward", {"reward": float(self._plan.num_turns)}), ("end", {})):
            status, answer = await connection.post(f"{path}/{route}", body, api_key=key)
            if status != 200:
                break
        self._note("session", session, status, begun_s=claimed_s)

    def _note(self, kind: str, session: dict[str, Any], status: int, **facts: Any) -> None:
        ended_s = time.monotonic()
        self.events.append({"kind": kind, "id": session["id"], "status": status, "ended_s": ended_s, **facts})


async def main() -> None:
    """Runs the agents of one process."""
    agents = Agents(Plan(**json.loads(sys.argv[1])))
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    try:
        await agents.run(stopping)
    finally:
        Path(sys.argv[2]).write_text("".join(f"{json.dumps(event)}\n" for event in agents.events))


if __name__ == "__main__":
    asyncio.run(main())
