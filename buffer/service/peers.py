"""Who is connected: the job's directory service and the checks at the door.

A peer is known by its name; its socket's routing id changes with every reconnect and is bound to the name by `Hello`. The newest
incarnation of a name is the one that counts: the process that it replaced finds its routing id unknown, says hello again and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from areal_like.errors import RefusedError, StaleIncarnationError
from areal_like.shards import WHOLE, Shard
from areal_like.wire.messages.hello import Hello, Role


@dataclass(kw_only=True, slots=True, eq=False)
class Peer:
    """One registered process."""

    route: bytes
    """Routing id of its socket."""
    hello: Hello
    last_heard_s: float
    state: str = "starting"
    stats: dict[str, float] = field(default_factory=dict)
    """Of its last heartbeat."""


class PeerBook:
    """Peers by name and by routing id."""

    def __init__(
        self, *, job: str, dataset: str, settings: Mapping[Role, str] | None = None, shard: Shard = WHOLE
    ) -> None:
        """`dataset` and, by role, `settings` are what the buffer's own configuration gives; model and tokenizer are those of the first
        peer that was welcome."""
        self._settings = dict(settings or {})
        own = {"job": job, "num_shards": shard.count, "shard": shard.index, "dataset": dataset}
        self._expected: dict[str, tuple[object, str]] = {
            name: (value, "the buffer") for name, value in own.items()
        }
        self._by_name: dict[str, Peer] = {}
        self._by_route: dict[bytes, Peer] = {}
        self._retired: dict[tuple[str, int], dict[str, float]] = {}
        """Last statistics of every process that is not here, by name and incarnation."""

    def admit(self, route: bytes, hello: Hello, *, now_s: float) -> Peer:
        """Registers a peer. Raises RefusedError(field, reason) or StaleIncarnationError."""
        for name in ("job", "num_shards", "shard", "dataset", "model", "tokenizer"):
            expected, whose = self._expected.get(name, (getattr(hello, name), hello.name))
            if getattr(hello, name) != expected:
                reason = f"{hello.name} has {getattr(hello, name)!r}, {whose} has {expected!r}: start both with the same configuration"
                raise RefusedError(name, reason)
        expected = self._settings.get(hello.role, "")
        if hello.settings and expected and hello.settings != expected:
            reason = f"{hello.name} has {hello.settings!r}, the buffer has {expected!r}: start both with the same configuration"
            raise RefusedError("settings", reason)
        known = self._by_name.get(hello.name)
        if known is not None and known.hello.role is not hello.role:
            raise RefusedError(
                "name",
                f"{hello.name} is taken by a {known.hello.role.value}: give every daemon a name of its own",
            )
        if known is not None and known.hello.incarnation > hello.incarnation:
            raise StaleIncarnationError(
                f"a newer {hello.name} has registered (incarnation {known.hello.incarnation})"
            )
        is_same_process = known is not None and known.hello.incarnation == hello.incarnation
        if known is not None and not is_same_process:
            self._retire(known)
        if known is not None:
            self._by_route.pop(known.route, None)
        peer = Peer(
            route=route,
            hello=hello,
            last_heard_s=now_s,
            stats=self._retired.pop((hello.name, hello.incarnation), {}),
        )
        if known is not None and is_same_process:
            peer.state, peer.stats = known.state, known.stats
        self._by_name[hello.name] = self._by_route[route] = peer
        return peer

    def welcome(self, hello: Hello) -> None:
        """Nothing speaks against an admitted peer: whoever comes after the first has to have its model and tokenizer."""
        for name in ("model", "tokenizer"):
            self._expected.setdefault(name, (getattr(hello, name), hello.name))

    def at(self, route: bytes) -> Peer | None:
        """The peer behind a routing id."""
        return self._by_route.get(route)

    def named(self, name: str) -> Peer | None:
        """The peer of this name."""
        return self._by_name.get(name)

    def of(self, role: Role) -> list[Peer]:
        """All peers of a role, by name."""
        return sorted(
            (peer for peer in self._by_name.values() if peer.hello.role is role),
            key=lambda peer: peer.hello.name,
        )

    def forget(self, name: str) -> None:
        """The peer left or fell silent; if it speaks again it has to say hello."""
        peer = self._by_name.pop(name, None)
        if peer is not None:
            self._by_route.pop(peer.route, None)
            self._retire(peer)

    def total(self, stat: str) -> float:
        """Sum of a cumulative statistic over all rollout servers, those that left included."""
        present = (peer.stats for peer in self.of(Role.ROLLOUT))
        return sum(stats.get(stat, 0.0) for stats in (*self._retired.values(), *present))

    def _retire(self, peer: Peer) -> None:
        if peer.hello.role is Role.ROLLOUT:
            self._retired[peer.hello.name, peer.hello.incarnation] = peer.stats
