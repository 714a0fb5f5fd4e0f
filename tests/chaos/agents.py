"""External agents that misbehave; a process of them may be killed or stopped at any time.

    python -m tests.chaos.agents '{"urls": [...], "num_agents": 32, ...}' FILE

Each agent claims a session at one of the servers, makes its turns, posts the number of its turns as the
reward, and ends the session. What becomes of each session is a line of FILE, written at once. A request that
is not answered within PATIENCE_S is a line `hung`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.session_agents import Connection

PATIENCE_S = 60.0
_CLAIM_WAIT_S = 2.0
_PAUSE_AFTER_REFUSAL_S = 0.3
_NUM_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one process of agents does."""

    urls: list[str]
    num_agents: int
    pause_s: float
    """Mean pause after a turn."""
    max_turns: int = 3
    mishaps: dict[str, float] = field(default_factory=dict)
    """Name -> probability: `silent` and `abandoned` in each session, `repeated` in each turn."""
    seed: int = 0


class _SessionOverError(Exception):
    """The server answered with another status than 200."""


class _HungError(Exception):
    """The server did not answer."""


class Agents:
    """The agents of one process."""

    def __init__(self, plan: Plan, file: Path) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._file = file.open("a", buffering=1)

    async def run(self) -> None:
        """Until the process is ended."""
        await asyncio.gather(*(self._agent() for _ in range(self._plan.num_agents)))

    async def _agent(self) -> None:
        while True:
            host, _, port = self._rng.choice(self._plan.urls).removeprefix("http://").partition(":")
            connection = Connection(host, int(port))
            try:
                status, session = await self._answered(
                    connection, "/sessions", {"wait_s": _CLAIM_WAIT_S, "name": "chaos"}
                )
                if status == 200:
                    await self._work(connection, session)
                else:
                    self._note("no session", status=status)
                    await asyncio.sleep(_PAUSE_AFTER_REFUSAL_S)
            except (OSError, EOFError):
                await asyncio.sleep(_PAUSE_AFTER_REFUSAL_S)
            except _HungError:
                self._note("hung", at="claim")
            finally:
                connection.close()

    async def _work(self, connection: Connection, session: dict[str, Any]) -> None:
        id, path, key = session["id"], f"/sessions/{session['id']}/v1", session["api_key"]
        self._note("claimed", id=id)
        mishap = self._mishap("silent", "abandoned")
        if mishap == "silent":
            self._note("silent", id=id)
            return
        num_turns = self._rng.randint(1, self._plan.max_turns)
        messages = [{"role": "user", "content": str(session["example"]["index"])}]
        try:
            for turn in itertools.count(1):
                body = {"model": "policy", "messages": messages}
                answer = await self._asked(connection, f"{path}/chat/completions", body, key=key)
                if turn == num_turns:
                    break
                if mishap == "abandoned":
                    self._note("abandoned", id=id)
                    return
                messages += [answer["choices"][0]["message"], {"role": "user", "content": f"tool {turn}"}]
                await asyncio.sleep(self._plan.pause_s * self._rng.uniform(0.5, 1.5))
            await self._asked(connection, f"{path}/reward", {"reward": float(num_turns)}, key=key)
            await self._asked(connection, f"{path}/end", {}, key=key)
            self._note("ended", id=id, num_turns=num_turns)
        except _SessionOverError as error:
            self._note("refused", id=id, status=error.args[0], message=error.args[1])
        except _HungError:
            self._note("hung", id=id)
        except (OSError, EOFError) as error:
            self._note("lost", id=id, error=f"{type(error).__name__}: {error}")

    async def _asked(
        self, connection: Connection, path: str, body: dict[str, Any], *, key: str
    ) -> dict[str, Any]:
        """The answer, after some repetitions as those of an SDK. Raises _SessionOverError, OSError."""
        first = 0
        if path.endswith("completions") and self._mishap("repeated"):
            await connection.send(path, body, api_key=key)
            await asyncio.sleep(self._rng.choice([0.0, 0.005, 0.05]))
            connection.close()
            first = 1
        for count in range(first, _NUM_TRIES):
            headers = {"x-stainless-retry-count": str(count)}
            try:
                status, answer = await self._answered(connection, path, body, key=key, headers=headers)
            except (OSError, EOFError):
                if count == _NUM_TRIES - 1:
                    raise
                await asyncio.sleep(0.1)
                continue
            if status != 200:
                raise _SessionOverError(status, answer["error"]["message"])
            return dict(answer)
        raise AssertionError

    async def _answered(
        self,
        connection: Connection,
        path: str,
        body: dict[str, Any],
        *,
        key: str = "",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        limit = asyncio.timeout(PATIENCE_S)
        try:
            async with limit:
                return await connection.post(path, body, api_key=key, headers=headers)
        except TimeoutError:
            if limit.expired():
                raise _HungError from None
            raise

    def _mishap(self, *names: str) -> str:
        drawn = self._rng.random()
        for name in names:
            drawn -= self._plan.mishaps.get(name, 0.0)
            if drawn < 0:
                return name
        return ""

    def _note(self, kind: str, **facts: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **facts}) + "\n")


def events_of(files: list[Path]) -> list[dict[str, Any]]:
    """What the agents have written; a process that was killed may have written a part of its last line."""
    events = []
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


def kinds_of(events: list[dict[str, Any]]) -> Counter[str]:
    """How many events there are of each kind; refusals by their status."""
    return Counter(
        f"{event['kind']} {event['status']}" if "status" in event else event["kind"] for event in events
    )


def dumps(plan: Plan) -> str:
    """As an argument of the command line."""
    return json.dumps(asdict(plan))


if __name__ == "__main__":
    asyncio.run(Agents(Plan(**json.loads(sys.argv[1])), Path(sys.argv[2])).run())
