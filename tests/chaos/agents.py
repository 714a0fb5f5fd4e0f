"""External agents that misbehave; a process of them may be killed or stopped at any time.

    python -m tests.chaos.agents '{"urls": [...], "num_agents": 32, ...}' FILE

Each agent claims a session at one of the servers, or a group of them, makes its turns with one of the APIs,
posts the number of its turns as the reward, and ends the session, until a server says that the job is over.
It claims, rewards and ends with the client; requests to the model are plain HTTP. What becomes of each
session is a line of FILE, written at once: `claimed`, and then one of

    ended       the agent has ended it after `num_turns` turns: it is a sample
    over, lost  it is none: the server, or the client if no server responds, has said why (`message`)
    refused     the model's response had another `status`
    silent, abandoned, unrewarded
                mishaps: the agent has left it before its first request, or after it, or posted no reward
    hung        a request was not answered within PATIENCE_S

The end of an agent is a line, too: `told` that the job is over, or `gave up` to find a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from areal_like.client.areal_like_client import (
    ClaimedGroup,
    ClaimedSession,
    JobOverError,
    RefusedError,
    SessionOverError,
    UnreachableError,
    claim,
    claim_group,
)
from benchmarks.conversations import ADD, CONVERSATIONS, Call, added
from benchmarks.session_agents import Connection

T = TypeVar("T")
PATIENCE_S = 60.0
_CLAIM_WAIT_S = 2.0
_PAUSE_AFTER_REFUSAL_S = 0.3
_NUM_TRIES = 3
_PAUSE_S = 0.1
"""Between two tries."""
_NO_ROOM = ("context_length_exceeded", "turn_limit_exceeded")
_NO_ROOM_IN_MESSAGES = "prompt is too long"
_JOB_OVER = "the job has ended:"
"""Begin of the message that says so: Messages has no codes."""
_EACH_GROUP = 8
"""One in so many agents claims groups, if the plan has groups."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one process of agents does."""

    urls: list[str]
    num_agents: int
    pause_s: float
    """Mean pause after a turn."""
    min_turns: int = 1
    max_turns: int = 3
    num_sessions: int = 0
    """Sessions of each agent, which ends after them; 0: it goes on until the job is over."""
    mishaps: dict[str, float] = field(default_factory=dict)
    """Name -> probability: `silent`, `abandoned`, `unrewarded` in each session, `repeated` in each turn."""
    apis: list[str] = field(default_factory=lambda: ["chat"])
    """Those of the agents, in turn."""
    has_tools: bool = False
    """Three of five agents offer ADD."""
    has_groups: bool = False
    gives_up_s: float = 0.0
    """An agent ends if it has reached no server for this time; 0: it never does."""
    outage_s: float = 0.0
    """How long a request is sent again, at least, while it gets no response or, in a session, status 503: as
    by an SDK with many retries."""
    seed: int = 0


class _RefusedError(Exception):
    """The server responded with another status than 200."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(str(error["message"]))
        self.status, self.code = status, error.get("code") or ""

    @property
    def is_no_room(self) -> bool:
        """True if the sample has had all turns for which there is room."""
        return self.code in _NO_ROOM or str(self).startswith(_NO_ROOM_IN_MESSAGES)


class _HungError(Exception):
    """The server did not respond."""


class Agents:
    """The agents of one process."""

    def __init__(self, plan: Plan, file: Path) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._file = file.open("a", buffering=1)

    async def run(self) -> None:
        """Until the job is over."""
        # A claim waits in a thread, and asyncio's own executor has only a few.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2 * self._plan.num_agents))
        await asyncio.gather(*map(self._agent, range(self._plan.num_agents)))

    async def _agent(self, number: int) -> None:
        reached_s = time.monotonic()
        num_sessions = 0
        while num_sessions < (self._plan.num_sessions or math.inf):
            try:
                num_sessions += await self._work(number, self._rng.choice(self._plan.urls))
            except JobOverError as over:
                self._note("told", message=str(over))
                return
            except UnreachableError as error:
                if 0 < self._plan.gives_up_s < time.monotonic() - reached_s:
                    self._note("gave up", message=str(error))
                    return
                await asyncio.sleep(_PAUSE_AFTER_REFUSAL_S)
                continue
            except RefusedError as refused:
                self._note("no session", message=str(refused))
                await asyncio.sleep(_PAUSE_AFTER_REFUSAL_S)
            except _HungError:
                self._note("hung", at="claim")
            reached_s = time.monotonic()

    async def _work(self, number: int, url: str) -> int:
        """Claims, and makes the samples; returns how many sessions it had. Raises JobOverError; of the claim
        RefusedError, UnreachableError."""
        is_group = self._plan.has_groups and number % _EACH_GROUP == 0
        claims: Callable[..., ClaimedGroup | ClaimedSession | None] = claim_group if is_group else claim
        claimed = await self._called(claims, url, wait_s=_CLAIM_WAIT_S, name="chaos")
        if claimed is None:
            return 0
        sessions = claimed.sessions if isinstance(claimed, ClaimedGroup) else (claimed,)
        for session in sessions:
            self._note("claimed", id=session.id, url=url, api=self._api(number), is_group=is_group)
        mishap = self._mishap("silent", "abandoned", "unrewarded")
        if mishap == "silent":
            for session in sessions:
                self._note("silent", id=session.id)
            return len(sessions)
        max_turns = 1 if mishap == "abandoned" else self._plan.max_turns
        made = await asyncio.gather(
            *(self._conversed(session, number, max_turns=max_turns) for session in sessions),
            return_exceptions=True,
        )
        turns = {one.id: ids for one, ids in zip(sessions, made, strict=True) if isinstance(ids, list)}
        if mishap == "abandoned":
            for id in turns:
                self._note("abandoned", id=id)
        elif turns:
            await self._finish(claimed, turns, is_rewarded=mishap != "unrewarded")
        for problem in made:
            if isinstance(problem, BaseException):
                raise problem
        return len(sessions)

    async def _conversed(self, session: ClaimedSession, number: int, *, max_turns: int) -> list[str] | None:
        """The ids of the session's turns, or None if it is no sample and that is noted. Raises
        JobOverError."""
        prompt = session.example.get("prompt") or session.example["index"]
        tools = [ADD] if self._plan.has_tools and number % 5 < 3 else []
        conversation = CONVERSATIONS[self._api(number)](str(prompt), tools=tools)
        url = urlsplit(session.base_url)
        assert url.hostname is not None and url.port is not None
        connection = Connection(url.hostname, url.port)
        num_turns = self._rng.randint(min(self._plan.min_turns, max_turns), max_turns)
        ids: list[str] = []
        try:
            while True:
                path = f"{url.path}/{conversation.route}"
                response = await self._asked(connection, path, conversation.body(), key=session.api_key)
                reply = conversation.take(response)
                ids.append(reply.id)
                if len(ids) == num_turns:
                    return ids
                for call in reply.calls:
                    self._note("call", name=call.name)
                    conversation.give(call, _result(call))
                if not reply.calls:
                    conversation.say(f"{len(ids)}+{num_turns}")
                await asyncio.sleep(self._plan.pause_s * self._rng.uniform(0.5, 1.5))
        except _RefusedError as refused:
            if refused.is_no_room and ids:
                return ids
            if refused.status not in (401, 410):
                self._note("refused", id=session.id, status=refused.status, message=str(refused))
                return None
            self._note("over", id=session.id, message=str(refused))
            if str(refused).startswith(_JOB_OVER):
                raise JobOverError(str(refused)) from None
        except _HungError:
            self._note("hung", id=session.id)
        except (OSError, EOFError):
            await self._ask_why(session)
        finally:
            connection.close()
        return None

    async def _ask_why(self, session: ClaimedSession) -> None:
        """Notes what the client says of a session whose request got no response. Raises JobOverError."""
        try:
            await self._called(session.heartbeat)
        except SessionOverError as over:
            self._note("over", id=session.id, message=str(over))
            if isinstance(over, JobOverError):
                raise
        except UnreachableError as error:
            self._note("lost", id=session.id, message=str(error))
        else:
            self._note("lost", id=session.id, message="the session is open")

    async def _finish(
        self, claimed: ClaimedSession | ClaimedGroup, turns: dict[str, list[str]], *, is_rewarded: bool
    ) -> None:
        """Posts the rewards and ends the sessions, by their ids with the ids of their turns. Raises
        JobOverError."""
        try:
            unmade = await self._rewarded(claimed, turns) if is_rewarded else set()
            if isinstance(claimed, ClaimedGroup):
                unmade |= set(await self._called(claimed.end))
            elif not await self._called(claimed.end):
                unmade.add(claimed.id)
        except SessionOverError as over:
            for id in turns:
                self._note("over", id=id, message=str(over))
            if isinstance(over, JobOverError):
                raise
            return
        except UnreachableError as error:
            for id in turns:
                self._note("lost", id=id, message=str(error))
            return
        sessions = claimed.sessions if isinstance(claimed, ClaimedGroup) else (claimed,)
        for session in sessions:
            if (ids := turns.get(session.id)) is None:
                continue
            if session.id not in unmade:
                self._note("ended", id=session.id, num_turns=len(ids))
            elif is_rewarded:
                await self._ask_why(session)
            else:
                self._note("unrewarded", id=session.id)

    async def _rewarded(
        self, claimed: ClaimedSession | ClaimedGroup, turns: dict[str, list[str]]
    ) -> set[str]:
        """Posts as much reward as there are turns, for the sample or in parts for its turns, some of it
        twice; returns the ids of sessions that are over."""
        if isinstance(claimed, ClaimedGroup):
            values = {one.id: float(len(turns.get(one.id, ()))) for one in claimed.sessions}
            return set(await self._called(claimed.reward, values))
        ids = turns[claimed.id]
        if self._rng.random() < 0.5:
            await self._called(claimed.reward, float(len(ids)))
        else:
            for _ in range(2):
                await self._called(claimed.reward, turns=dict.fromkeys(ids, 1.0))
        return set()

    async def _asked(
        self, connection: Connection, path: str, body: dict[str, Any], *, key: str
    ) -> dict[str, Any]:
        """The response, after some repetitions as those of an SDK. Raises _RefusedError, _HungError, OSError,
        EOFError."""
        count = 0
        if self._mishap("repeated"):
            with contextlib.suppress(OSError):
                await connection.send(path, body, api_key=key)
                await asyncio.sleep(self._rng.choice([0.0, 0.005, 0.05]))
                count = 1
            connection.close()
        end_s = time.monotonic() + self._plan.outage_s
        while True:
            headers = {"x-stainless-retry-count": str(count)}
            count += 1
            limit = asyncio.timeout(PATIENCE_S)
            try:
                async with limit:
                    status, response = await connection.post(path, body, api_key=key, headers=headers)
            except (OSError, EOFError):  # also TimeoutError
                if limit.expired():
                    raise _HungError from None
                if count >= _NUM_TRIES and time.monotonic() >= end_s:
                    raise
                await asyncio.sleep(_PAUSE_S)
                continue
            if status == 503 and time.monotonic() < end_s:
                await asyncio.sleep(_PAUSE_S)
                continue
            if status != 200:
                raise _RefusedError(status, response["error"])
            return dict(response)

    async def _called(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Calls a function of the client, in a thread, and again while there is no response. Raises as it
        does, and _HungError."""
        end_s = time.monotonic() + self._plan.outage_s
        while True:
            limit = asyncio.timeout(PATIENCE_S)
            try:
                async with limit:
                    return await asyncio.to_thread(function, *args, **options)
            except TimeoutError:
                if limit.expired():
                    raise _HungError from None
                raise
            except UnreachableError:
                if time.monotonic() >= end_s:
                    raise
            await asyncio.sleep(_PAUSE_S)

    def _api(self, number: int) -> str:
        return self._plan.apis[number % len(self._plan.apis)]

    def _mishap(self, *names: str) -> str:
        drawn = self._rng.random()
        for name in names:
            drawn -= self._plan.mishaps.get(name, 0.0)
            if drawn < 0:
                return name
        return ""

    def _note(self, kind: str, **facts: Any) -> None:
        event = {"kind": kind, "at_s": round(time.monotonic(), 3), **facts}
        self._file.write(json.dumps(event) + "\n")


def _result(call: Call) -> str:
    try:
        return added(call)
    except ValueError as error:
        return str(error)


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
