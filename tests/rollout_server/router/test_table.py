"""The routing table alone: servers that come, go, hang and take sessions over, in virtual time."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.router.places import BodyPlaces
from rollout_server.router.table import (
    Ask,
    ClaimWay,
    Listed,
    Pause,
    RoutingTable,
    Server,
    SessionWay,
    Stop,
)

LEASE_S = 10.0


def listed(*names: str, silent_s: float = 0.0, num_waiting: int = 0) -> list[Listed]:
    return [
        Listed(name=name, url=f"http://{name}:1", silent_s=silent_s, num_waiting=num_waiting)
        for name in names
    ]


def table_of(*names: str, num_waiting: int = 0) -> RoutingTable:
    table = RoutingTable(lease_timeout_s=LEASE_S)
    table.see(listed(*names, num_waiting=num_waiting), now_s=0.0)
    return table


def asked(way: ClaimWay | SessionWay, *, now_s: float = 0.0) -> str:
    step = way.next(now_s=now_s)
    assert isinstance(step, Ask), step
    return step.server.name


def test_claims_go_where_sessions_wait() -> None:
    table = table_of("a", "b", "c")
    table.see([*listed("a", "c"), *listed("b", num_waiting=2)], now_s=0.0)
    ways = [ClaimWay(table=table, end_s=30.0) for _ in range(2)]
    assert [asked(way) for way in ways] == ["b", "b"]
    ways.append(ClaimWay(table=table, end_s=30.0))
    assert asked(ways[-1]) in ("a", "c"), "both sessions of b are being claimed"
    ways[0].claimed(num_sessions=1)
    ways[0].done()
    ways[1].none()
    step = ways[1].next(now_s=1.0)
    assert isinstance(step, Ask) and 0 < step.wait_s <= 29.0, "now it waits"
    for way in ways:
        way.close()
    assert table.num_claims == 0 and not any(one.num_claims for one in table.servers.values())


def test_waiting_claims_are_spread_over_the_servers() -> None:
    table = table_of(*"abcd")
    found = Counter(asked(ClaimWay(table=table, end_s=30.0)) for _ in range(20))
    assert set(found.values()) == {5} and len(found) == 4


def test_a_claim_without_time_asks_a_few_servers_once() -> None:
    table = table_of(*"abcdefgh")
    way, seen = ClaimWay(table=table, end_s=0.0), []
    while isinstance(step := way.next(now_s=0.0), Ask):
        assert step.wait_s == 0.0
        seen.append(step.server.name)
        way.none()
    assert step is Stop.NONE_WAITS and len(seen) == len(set(seen)) == 4


def test_a_claim_waits_for_a_server() -> None:
    table = RoutingTable(lease_timeout_s=LEASE_S)
    way = ClaimWay(table=table, end_s=5.0)
    assert isinstance(way.next(now_s=0.0), Pause) and way.next(now_s=5.0) is Stop.NO_SERVER
    table.see(listed("a"), now_s=5.0)
    assert asked(way, now_s=5.0) == "a"


def test_a_request_follows_its_session() -> None:
    table = table_of("a", "b", "c")
    table.learn("1-0-1", table.servers["b"], b"digest")
    way = SessionWay(table=table, id="1-0-1", limit_s=30.0)
    assert asked(way) == "b"
    way.elsewhere("http://c:1", now_s=0.0)
    assert asked(way) == "c"
    way.done()
    stranger = SessionWay(table=table, id="1-0-1", limit_s=30.0)
    assert asked(stranger) == "b"
    stranger.elsewhere("http://169.254.169.254:80", now_s=0.0)
    assert isinstance(stranger.next(now_s=0.0), Pause), "no buffer has named that one"
    assert asked(stranger, now_s=0.1) in ("a", "c")


def test_what_may_have_arrived_is_a_repetition() -> None:
    table = table_of("a", "b")
    way = SessionWay(table=table, id="1-0-1", limit_s=30.0)
    first = asked(way)
    way.failed(is_sent=False, now_s=0.0)
    assert not way.is_repetition and asked(way) != first, "the other one, at once"
    way.failed(is_sent=True, now_s=0.0)
    assert way.is_repetition and isinstance(way.next(now_s=0.0), Pause)


def test_the_search_for_a_server_begins_with_the_trouble() -> None:
    """A turn may have been sampled for an hour when its server dies."""
    table = table_of("a")
    way = SessionWay(table=table, id="1-0-1", limit_s=30.0)
    assert asked(way) == "a"
    way.moved(now_s=3600.0)
    now_s, last = 3600.0, 0.0
    while not isinstance(step := way.next(now_s=now_s), Stop):
        if isinstance(step, Pause):
            assert last <= step.seconds <= 1.0
            last, now_s = step.seconds, now_s + step.seconds
        else:
            way.moved(now_s=now_s)
    assert step is Stop.NOT_CONTINUED and 3628.0 < now_s <= 3630.0


def test_a_server_that_no_buffer_hears_is_lost_and_comes_back() -> None:
    table = table_of("a", "b")
    hung = table.servers["a"]
    assert table.see([*listed("a", silent_s=9.0), *listed("b")], now_s=9.0) == []
    assert table.see([*listed("a", silent_s=11.0), *listed("b")], now_s=11.0) == [hung]
    assert [one.name for one in table.available(now_s=11.0)] == ["b"]
    assert table.see([*listed("a", silent_s=12.0), *listed("b")], now_s=12.0) == [], "once"
    table.see(listed("a", "b"), now_s=13.0)
    assert {one.name for one in table.available(now_s=13.0)} == {"a", "b"} and table.servers["a"] is hung
    assert table.see(listed("b"), now_s=20.0) == [], "its buffer may have just started again"
    assert table.see(listed("b"), now_s=24.0) == [hung] and set(table.servers) == {"b"}


def test_a_process_at_another_address_is_another_server() -> None:
    table = table_of("a")
    old = table.servers["a"]
    table.failed(old, now_s=0.0)
    assert not table.available(now_s=0.0)
    table.see([Listed(name="a", url="http://a:2", silent_s=0.0)], now_s=0.1)
    assert [one.url for one in table.available(now_s=0.1)] == ["http://a:2"]


def test_sessions_are_bounded_and_strangers_change_nothing() -> None:
    table = RoutingTable(lease_timeout_s=LEASE_S, max_sessions=20)
    table.see(listed("a"), now_s=0.0)
    for number in range(30):
        table.learn(f"{number}-0-1", table.servers["a"], b"digest")
    assert len(table.sessions) == 20 and "0-0-1" not in table.sessions
    assert table.is_known("20-0-1", b"digest") and not table.is_known("20-0-1", b"other")
    way = SessionWay(table=table, id="made-up", limit_s=1.0)
    assert asked(way) == "a"
    way.done()
    assert len(table.sessions) == 20


def test_strangers_cannot_take_the_memory_of_known_sessions() -> None:
    places = BodyPlaces(max_bytes=100, max_bytes_of_others=50, max_requests=2)
    assert not places.problem("s", 40, is_known=False) and places.problem("s", 20, is_known=False)
    assert not places.problem("s", 60, is_known=True) and not places.problem("s", 1, is_known=True)
    assert "2 requests of this session" in places.problem("s", 1, is_known=True)
    assert "memory" in places.problem("t", 60, is_known=True)
    for num_bytes, is_known in ((40, False), (60, True), (1, True)):
        places.leave("s", num_bytes, is_known=is_known)
    assert (places.num_bytes, places.num_bytes_of_others, places._num_requests) == (0, 0, {})


@dataclass
class World:
    """Servers and sessions; what a router sees of them is `poll`, and the responses of `respond`."""

    rng: random.Random
    names: tuple[str, ...]
    now_s: float = 0.0
    dead: set[str] = field(default_factory=set)
    died_s: dict[str, float] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)

    def poll(self, table: RoutingTable) -> None:
        alive = [name for name in self.names if name not in self.dead]
        gone = [name for name in self.dead if self.now_s - self.died_s[name] < 30.0]
        table.see(
            [
                *listed(*alive),
                *(one for name in gone for one in listed(name, silent_s=self.now_s - self.died_s[name])),
            ],
            now_s=self.now_s,
        )

    def step(self) -> None:
        """The buffer gives the sessions of a dead server to others after a lease's time."""
        alive = [name for name in self.names if name not in self.dead]
        for id, name in self.holder.items():
            if name in self.dead and self.now_s - self.died_s[name] > LEASE_S and alive:
                self.holder[id] = self.rng.choice(alive)

    def kill(self, name: str) -> None:
        if name not in self.dead:
            self.dead.add(name)
            self.died_s[name] = self.now_s

    def restart(self, name: str) -> None:
        """It has lost its sessions, which others continue."""
        self.dead.discard(name)
        for id, at in self.holder.items():
            if at == name:
                self.holder[id] = self.rng.choice([one for one in self.names if one not in self.dead])

    def respond(self, way: SessionWay, server: Server) -> bool:
        """True: it has the session."""
        holder = self.holder[way.id]
        if server.name in self.dead:
            way.failed(is_sent=self.rng.random() < 0.5, now_s=self.now_s)
        elif server.name == holder:
            way.done()
            way.table.learn(way.id, server, b"")
            return True
        elif holder in self.dead and self.now_s - self.died_s[holder] > 0.5 * LEASE_S:
            way.moved(now_s=self.now_s)
        else:
            way.elsewhere(f"http://{holder}:1", now_s=self.now_s)
        return False


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 32), num_servers=st.integers(2, 5), num_kills=st.integers(0, 6))
def test_every_request_reaches_its_session_while_servers_die(
    seed: int, num_servers: int, num_kills: int
) -> None:
    rng = random.Random(seed)
    world = World(rng=rng, names=tuple(f"s{number}" for number in range(num_servers)))
    world.holder = {f"{number}-0-1": rng.choice(world.names) for number in range(8)}
    table = RoutingTable(lease_timeout_s=LEASE_S)
    strikes = sorted(rng.uniform(0.0, 60.0) for _ in range(num_kills))
    world.poll(table)
    next_poll_s = 1.0
    for _ in range(30):
        way = SessionWay(table=table, id=rng.choice(sorted(world.holder)), limit_s=LEASE_S + 20.0)
        num_asked, begun_s = 0, world.now_s
        while True:
            while strikes and strikes[0] <= world.now_s:
                strikes.pop(0)
                victim = rng.choice(world.names)
                if victim in world.dead:
                    world.restart(victim)
                elif len(world.dead) < num_servers - 1:
                    world.kill(victim)
            if world.now_s >= next_poll_s:
                world.poll(table)
                next_poll_s = world.now_s + 1.0
            world.step()
            step = way.next(now_s=world.now_s)
            assert not isinstance(step, Stop), (step, world)
            if isinstance(step, Pause):
                world.now_s += step.seconds
                continue
            num_asked += 1
            assert step.url == f"http://{step.server.name}:1"
            assert num_asked <= 6 + 4 * (world.now_s - begun_s), "a request must not run in circles"
            if world.respond(way, step.server):
                break
        world.now_s += rng.uniform(0.0, 4.0)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 32), num_servers=st.integers(1, 6))
def test_claims_end_in_time_and_leave_no_trace(seed: int, num_servers: int) -> None:
    rng = random.Random(seed)
    names = [f"s{number}" for number in range(num_servers)]
    table = table_of(*names)
    sessions, now_s = Counter(rng.choices(names, k=10)), 0.0
    for number in range(30):
        way = ClaimWay(table=table, end_s=now_s + rng.choice([0.0, 5.0, 30.0]))
        while not isinstance(step := way.next(now_s=now_s), Stop):
            if isinstance(step, Pause):
                now_s += step.seconds
            elif rng.random() < 0.1:
                way.failed(now_s=now_s)
            elif sessions[step.server.name]:
                sessions[step.server.name] -= 1
                way.claimed(num_sessions=1)
                way.done()
                break
            else:
                now_s += step.wait_s
                way.none()
            assert now_s <= way.end_s + 1e-6
        way.close()
        if number % 3 == 0:
            waiting = {one: sessions[one] for one in names}
            table.see([one for name in names for one in listed(name, num_waiting=waiting[name])], now_s=now_s)
    now_s += 10.0  # no server is avoided any more
    table.see([one for name in names for one in listed(name)], now_s=now_s)
    while sessions.total():
        way = ClaimWay(table=table, end_s=now_s + 100.0)
        while not isinstance(step := way.next(now_s=now_s), Ask) or not sessions[step.server.name]:
            assert isinstance(step, Ask), "a session waits at a server that responds"
            now_s += step.wait_s
            way.none()
        sessions[step.server.name] -= 1
        way.done()
        way.close()
    assert table.num_claims == 0 and not any(one.num_claims for one in table.servers.values())
