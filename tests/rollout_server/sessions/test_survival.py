"""Sessions whose servers are killed, or only slow: every session is continued, with its own tokens, once.

The rollout servers' lease runners, sessions and journals around a real ledger, in virtual time. Only the
engine, the sockets and the HTTP servers are left out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pytest

from areal_like.chat.responses import parse_responses
from areal_like.config import from_mapping
from areal_like.errors import SessionGoneError, SessionMovedError
from areal_like.security.session_keys import SessionKeys, nonce_of
from areal_like.shards import WHOLE
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.producer import (
    AppendSession,
    FindSession,
    ForgetSession,
    Lease,
    ReadSession,
    SampleDone,
    ServerHeartbeat,
    ServerState,
)
from buffer.tickets import Verdict
from rollout_server.leases.held_leases import Place, SampleResult
from rollout_server.policy.generation import Generation
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.lease_runner import LeaseRunner
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.claimants import Claimant
from rollout_server.sessions.http.formats import session_rules
from rollout_server.sessions.open_session import OpenSession, SessionState
from rollout_server.sources import SampleSource
from rollout_server.tasks.base import make_task
from tests.rollout_server.test_environment_attempts import EOS, Ordinals
from tests.rollout_server.test_episodes import Digits
from tests.support import moved_clock
from tests.support.ledger_simulation import new_ledger
from tests.support.line_chat import LineChat
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S

TASK = {"name": "external"}
LEASE_TIMEOUT_S = 10.0
KILL_S = 20
"""A server is killed each time so many seconds have passed."""
SECRET = "5e" * 31
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of a world."""

    num_servers: int = 3
    num_agents: int = 24
    num_turns: int = 8
    think_s: float = 20.0
    """Mean pause of an agent after a turn."""
    most_s: int = 3000
    """By then all samples must have been made."""


SMALL = Scale()
LARGE = Scale(num_servers=8, num_agents=1000, num_turns=24, think_s=95.0, most_s=4500)
"""Each session lasts about forty minutes, and its server is killed every 160 s."""


class UniqueEngine:
    """Never says anything twice. A turn takes two seconds."""

    cache_salt = ""
    caches_prefixes = False
    count = itertools.count()

    def __init__(self, world: World) -> None:
        self.world = world

    async def generate(self, input_ids: Sequence[int], **options: Any) -> Generation:
        await asyncio.sleep(2.0)
        number, version = next(self.count), self.world.version
        tokens = np.array([*map(ord, f"reply {number}"), EOS], np.int32)
        self.world.num_sampled += 1
        self.world.versions[f"reply {number}"] = version
        self.world.prompts[f"reply {number}"] = list(input_ids)
        return Generation(
            output_ids=tokens,
            logprobs=np.full(len(tokens), -number / 1000, np.float32),
            versions=np.full(len(tokens), version, np.int32),
            finish_reason=FinishReason.STOP,
        )


@dataclass(eq=False)
class Server:
    """One process of a rollout server: its runner, and its side of the protocol as a ShardedBufferClient."""

    world: World
    name: str
    incarnation: int
    is_dead: bool = False
    working: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it works; a server that hangs neither sends nor receives."""
    held: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.working.set()
        self.book = SessionBook()
        self.book.keys.set_secret(WHOLE, SECRET)
        config = from_mapping(
            {
                "sampling": {"max_new_tokens": 40},
                "rollout": {
                    "max_context": 4000,
                    "sample_timeout_s": 2.0 * self.world.scale.most_s,
                    "reward_timeout_s": 100.0,
                },
                "task": TASK,
                "sessions": {"idle_timeout_s": 300.0},
                "episode": {"max_turns": 50},
            }
        )
        chat = LineChat(Ordinals(), stop_token_ids=[EOS], vocab_size=1 << 20, template_kwargs={})
        source = SampleSource(
            task=make_task(TASK, seed=0),
            renderer=Digits(stop_token_ids=(EOS,), chat=chat),  # type: ignore[arg-type]
            context_tokens=4000,
            rewards=None,  # type: ignore[arg-type]
        )
        self.runner = LeaseRunner(
            config,
            {"": source},
            gate=GenerationGate(),
            buffers=self,  # type: ignore[arg-type]
            book=self.book,
        )
        self.runner.engine = UniqueEngine(self.world)  # type: ignore[assignment]
        self.register()

    def register(self) -> None:
        self.world.ledger.dispatcher.register_server(
            self.name, incarnation=self.incarnation, weights_version=self.world.version, now_s=now_s()
        )

    def beat(self) -> None:
        holding = sum(map(len, self.held.values()))
        message = ServerHeartbeat(
            state=ServerState.SERVING,
            free_samples=self.world.scale.num_agents - holding,
            holding_samples=holding,
            weights_version=self.world.version,
            leases=list(self.held),
        )
        if self.name not in self.world.ledger.servers:  # as after HelloRequired
            self.register()
        self.world.ledger.dispatcher.heartbeat(self.name, message, now_s=now_s())

    def take(self, leases: list[Lease]) -> None:
        self.held |= {lease.lease_id: set(lease.sample_indices) for lease in leases}
        self.runner.start(leases)

    def abort(self, lease_ids: list[int]) -> None:
        self.runner.cancel([one for one in lease_ids if self.held.pop(one, None) is not None])

    async def kill(self) -> None:
        """Nothing that it does from now on has an effect."""
        self.is_dead = True
        await self.runner.close()

    def moved(self, lease_id: int, sample_index: int, place: Place) -> None:
        pass

    def deliver(self, result: SampleResult) -> None:
        if self.is_dead:
            return
        assert isinstance(result, SampleDone), result
        (verdict,) = self.world.ledger.intake.samples_done(self.name, [result])
        self.world.verdicts.append(verdict)
        if verdict is Verdict.ACCEPTED:
            key = result.ticket_id, result.sample_index
            assert key not in self.world.samples, "a sample was accepted twice"
            self.world.samples[key] = result.record.trajectory()
        if (held := self.held.get(result.lease_id)) is not None:
            held.discard(result.sample_index)
            if not held:
                del self.held[result.lease_id]

    async def _reaches(self) -> None:
        await self.working.wait()
        if self.is_dead:
            await asyncio.Event().wait()

    async def append_session(self, entry: AppendSession) -> str:
        await self._reaches()
        refused = self.world.ledger.journals.append(self.name, entry)
        self.world.refused += refused == "lease"
        self.world.num_bytes += len(entry.data)
        await self._reaches()  # the reply may be lost as well
        return refused

    async def forget_session(self, forgotten: ForgetSession) -> str:
        await self._reaches()
        return self.world.ledger.journals.forget(self.name, forgotten)

    async def read_session(self, lease: Lease, sample_index: int) -> tuple[str, list[bytes]]:
        await self._reaches()
        request = ReadSession(
            lease_id=lease.lease_id, ticket_id=lease.ticket_id, sample_index=sample_index, first=0
        )
        journal, entries = self.world.ledger.journals.reader(self.name, request)()
        return ("" if journal is None else journal.session), entries


def now_s() -> float:
    return asyncio.get_running_loop().time()


class World:
    """The ledger, its servers and their agents."""

    def __init__(self, scale: Scale = SMALL) -> None:
        self.scale = scale
        self.ledger = new_ledger(
            group_size=4,
            groups_per_step=scale.num_agents // 4,
            max_staleness=2,
            lease_timeout_s=LEASE_TIMEOUT_S,
        )
        self.version = 0
        self.num_sampled = self.refused = self.num_bytes = 0
        self.versions: dict[str, int] = {}
        """Of each text that was sampled."""
        self.prompts: dict[str, list[int]] = {}
        self.samples: dict[tuple[int, int], Trajectory] = {}
        self.verdicts: list[Verdict] = []
        self.servers: dict[str, Server] = {}
        self.zombies: list[Server] = []
        for number in range(scale.num_servers):
            self.start(f"rollout-{number}", incarnation=1)

    def start(self, name: str, *, incarnation: int) -> None:
        self.servers[name] = Server(self, name, incarnation)

    async def second(self) -> None:
        """One second passes."""
        advance(1.0)
        for server in self.servers.values():
            if server.working.is_set():
                server.beat()
        self.ledger.dispatcher.expire(now_s=now_s())
        for name, leases in self.ledger.dispatcher.grant(now_s=now_s()).items():
            self.servers[name].take(leases)
        for name, lease_ids in self.ledger.state.leases.take_aborts().items():
            self.servers[name].abort(lease_ids)
        for _ in range(12):
            await asyncio.sleep(0)
        for server in self.servers.values():
            while server.runner._loading is not None and not server.runner._loading.done():
                await asyncio.sleep(0.001)  # a thread loads the prompts

    async def kill(self, name: str) -> None:
        server = self.servers[name]
        await server.kill()
        self.start(name, incarnation=server.incarnation + 1)

    def push(self) -> None:
        """Other weights of the same step."""
        self.version = self.ledger.trainer.alloc_version(incarnation=1, step=0)

    def find(self, id: str) -> OpenSession | None:
        """The session at the server that has its lease; None: not yet."""
        can_continue, name = self.ledger.journals.find(FindSession(session=id))
        if not can_continue:
            raise SessionGoneError("it is over")
        return self.servers[name].book._sessions.get(id) if name else None

    def offered(self) -> tuple[Server, OpenSession] | None:
        for server in self.servers.values():
            if server.working.is_set() and (session := server.book.offer()) is not None:
                return server, session
        return None


@dataclass(eq=False)
class Agent:
    """Makes a sample of so many turns, and repeats what gets no response."""

    world: World
    number: int
    replies: list[str] = field(default_factory=list)
    id: str = ""
    place: tuple[int, int] = (0, 0)
    key: str = ""
    num_moves: int = 0
    last: OpenSession | None = None

    async def run(self) -> None:
        await self.claim()
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"go {self.number}"}]
        for turn in range(self.world.scale.num_turns):
            reply = await self.turn(messages, is_lost=(self.number + turn) % 4 == 0)
            self.replies.append(reply)
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": f"tool {turn}"},
            ]
            await asyncio.sleep(self.world.scale.think_s * (0.5 + (self.number * 7 + turn * 3) % 10 / 10))
        await self.at_session(lambda session: session.post_reward(value=self.number / 100))
        await self.at_session(OpenSession.end_recorded)

    async def claim(self) -> None:
        while (found := self.world.offered()) is None:
            await asyncio.sleep(1.0)
        server, session = found
        session.claimant, session.claim_id = (
            Claimant(address="1.2.3.4", name=f"{self.number}"),
            f"claim {self.number}",
        )
        await session.offered(nonce=nonce_of(session.api_key))
        session.claim()
        server.book.take_back(session)
        self.id, self.key, self.place = session.id, session.api_key, (session.group, session.sample)

    async def turn(self, messages: list[dict[str, Any]], *, is_lost: bool) -> str:
        """The reply. `is_lost`: the client does not get the first response, and asks again."""
        seen: list[str] = []

        async def ask(session: OpenSession) -> str:
            call = session.begin(
                str(messages).encode(), lambda: session.sample_turn(messages), is_repetition=bool(seen)
            )
            reply = (await call.turn()).reply.text
            if is_lost and not seen:
                seen.append(reply)
                raise TimeoutError
            call.is_delivered = True
            return reply

        reply = await self.at_session(ask)
        assert reply is not None and seen in ([], [reply]), "a finished turn was sampled again"
        return reply

    async def at_session(self, use: Callable[[OpenSession], Awaitable[T]]) -> T | None:
        """Repeats a request until it has a response. None: the session is over, and so is the request's
        purpose."""
        while True:
            try:
                session = self.world.find(self.id)
                if session is None or session.state is SessionState.WAITING:
                    await asyncio.sleep(1.0)
                    continue
                assert session.api_key == self.key, "a session keeps its key"
                self.num_moves += self.last is not None and self.last is not session
                self.last = session
                async with asyncio.timeout(15.0):
                    return await use(session)
            except (SessionMovedError, TimeoutError):
                await asyncio.sleep(1.0)
            except SessionGoneError:
                assert self.place in self.world.samples or len(self.replies) == self.world.scale.num_turns
                return None


def check(world: World, agents: list[Agent]) -> None:
    """Every sample has the turns that its agent has read, as they were sampled, and its reward once."""
    assert len(world.samples) == len(agents) and len({agent.id for agent in agents}) == len(agents)
    for agent in agents:
        trajectory = world.samples[agent.place]
        assert not trajectory.segments and trajectory.num_turns == world.scale.num_turns
        assert trajectory.reward == agent.number / 100
        tokens, found = trajectory.tokens, []
        ends = np.flatnonzero((tokens == EOS) & (trajectory.loss_mask == 1)).tolist()
        for end in ends:
            start = end
            while trajectory.loss_mask[start - 1]:
                start -= 1
            text = "".join(map(chr, tokens[start:end]))
            found.append(text)
            assert set(trajectory.versions[start : end + 1]) == {world.versions[text]}
            assert np.allclose(trajectory.logprobs[start : end + 1], -int(text.split()[1]) / 1000)
            # The policy sampled exactly after the tokens that precede the turn in the record.
            assert world.prompts[text] == tokens[:start].tolist()
        assert found == agent.replies


async def play(world: World, agents: list[Agent], disturb: Callable[[int], Awaitable[None]]) -> int:
    """Runs the agents; returns after how many seconds all samples were made. `disturb` is called each
    second."""
    running = asyncio.gather(*(agent.run() for agent in agents))
    try:
        async with asyncio.timeout(HANG_LIMIT_S * 1000):
            for second in itertools.count():
                await disturb(second)
                await world.second()
                if running.done() and len(world.samples) == len(agents):
                    break
                assert second < world.scale.most_s, [agent.replies for agent in agents]
        await running
        return second
    finally:
        running.cancel()
        for server in (*world.servers.values(), *world.zombies):
            await server.runner.close()


@pytest.mark.parametrize(
    "scale",
    [SMALL, pytest.param(LARGE, marks=[pytest.mark.chaos, pytest.mark.timeout(3600)])],
    ids=["small", "large"],
)
def test_sessions_survive_their_servers(scale: Scale) -> None:
    """Every 20 s one of the servers is killed and starts again; weights are pushed meanwhile. 24 sessions of
    8 turns at 3 servers, each of which is killed once a minute; and 1,000 sessions of forty minutes."""

    async def body() -> None:
        world = World(scale)
        agents = [Agent(world, number) for number in range(scale.num_agents)]

        async def disturb(second: int) -> None:
            if second % KILL_S == KILL_S - 1:
                await world.kill(f"rollout-{second // KILL_S % scale.num_servers}")
            if second % 35 == 34:
                world.push()

        num_seconds = await play(world, agents, disturb)
        check(world, agents)
        num_moves = sum(agent.num_moves for agent in agents)
        assert num_moves > scale.num_agents
        assert sum(len(set(one.versions)) > 2 for one in world.samples.values()) > scale.num_agents // 2
        assert set(world.verdicts) == {Verdict.ACCEPTED} and world.ledger.state.num_journal_bytes == 0
        tokens = sum(len(one.tokens) for one in world.samples.values())
        assert world.num_bytes < 100 * tokens, "each turn is written once"
        num_turns = scale.num_agents * scale.num_turns
        assert num_turns <= world.num_sampled < 2 * num_turns
        print(
            f"{len(world.samples)} samples in {num_seconds} s, {num_seconds // KILL_S} kills, "
            f"{num_moves} moves, {world.num_sampled} turns sampled for {num_turns}"
        )

    moved_clock.run(body())


def test_a_server_that_was_only_slow_adds_nothing() -> None:
    async def body() -> None:
        world = World()
        agents = [Agent(world, number) for number in range(SMALL.num_agents)]

        async def disturb(second: int) -> None:
            server = world.servers[f"rollout-{second // 60 % SMALL.num_servers}"]
            if second % 60 == 20:
                server.working.clear()
            if second % 60 == 45:  # its leases have expired, and others continue its sessions
                server.working.set()

        await play(world, agents, disturb)
        check(world, agents)
        assert world.refused > 0, "no server tried to write under a lost lease"
        assert sum(agent.num_moves for agent in agents) > SMALL.num_agents // 2

    moved_clock.run(body())


def test_responses_and_rewards_move_with_a_session() -> None:
    async def body() -> None:
        world = World()
        await world.second()
        agent = Agent(world, 1)
        await agent.claim()
        first = world.find(agent.id)
        assert first is not None
        request = parse_responses(
            {"input": "hi", "instructions": "be brief", "metadata": {"a": "b"}}, session_rules("policy")
        )
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        call = first.begin(
            b"digest", lambda: first.sample_turn(messages), is_repetition=False, response=request
        )
        turn = asyncio.create_task(call.turn())
        await _until(world, turn)
        await first.post_reward(value=None, completion_id="", turns={f"resp_{call.id}": 0.5}, label="hard")
        await first.post_reward(value=2.0, metrics={"errors": 3.0})
        name = next(name for name, server in world.servers.items() if agent.id in server.book._sessions)
        await world.kill(name)
        while (second := world.find(agent.id)) is None:
            await world.second()
        assert second is not first and second.has_rewards and second.reward == 2.0
        assert (second.label, second.metrics) == ("hard", {"errors": 3.0})
        kept = second.kept.find(call.id)
        assert kept is not None and [one["role"] for one in kept.messages] == ["user", "assistant"]
        assert kept.request.echo["metadata"] == {"a": "b"} and kept.request.instructions == "be brief"
        assert kept.messages[-1]["content"] == (await turn).reply.text
        await second.delete_response(call.id)
        again = second.begin(
            b"digest", lambda: second.sample_turn(messages), is_repetition=True, response=request
        )
        assert again.id == call.id and (await again.turn()).reply == (await turn).reply
        await second.end_recorded()
        assert second.end_answer == {"id": agent.id, "ended": True, "problem": None}
        await _until(world, asyncio.create_task(_sample(world, agent)))
        assert world.samples[agent.place].reward == 2.5
        for server in world.servers.values():
            await server.runner.close()

    moved_clock.run(body())


async def _until(world: World, task: asyncio.Task[Any]) -> None:
    while not task.done():
        await world.second()
    await task


async def _sample(world: World, agent: Agent) -> None:
    while agent.place not in world.samples:
        await asyncio.sleep(1.0)


def test_a_key_opens_its_session_at_any_server() -> None:
    here, there, other_run = SessionKeys(), SessionKeys(), SessionKeys()
    for keys in (here, there):
        keys.set_secret(WHOLE, SECRET)
    other_run.set_secret(WHOLE, "77" * 31)
    key = here.new_key("17-3-52")
    assert there.is_key("17-3-52", key) and there.key_of("17-3-52", nonce_of(key)) == key
    assert here.new_key("17-3-52") != key
    for id in ("17-3-53", "17-3-52-2", "18-3-52", "17-3-5", "", "x"):
        assert not there.is_key(id, key)
    for wrong in ("", ".", key[:-1], key + "x", nonce_of(key), "\N{SNOWMAN}" + key):
        assert not there.is_key("17-3-52", wrong)
    assert not other_run.is_key("17-3-52", key) and not SessionKeys().is_key("17-3-52", key)
