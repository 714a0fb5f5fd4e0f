"""The connected peers: a directory by name and by route, and the checks of a Hello.

A peer is identified by its name. `Hello` binds the routing id of its socket (the route), which is different
for each connection, to the name. Only the newest incarnation of a name is kept: messages of the process
that it replaced come from an unknown route, so that process has to send Hello again and is refused
(`IncarnationTable`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from areal_like.errors import RefusedError
from areal_like.security.keys import AllowedKey
from areal_like.shards import WHOLE, Shard
from areal_like.wire.messages.hello import Hello, Role


@dataclass(kw_only=True, slots=True, eq=False)
class Peer:
    """One registered process."""

    route: bytes
    """Routing id of its socket."""
    hello: Hello
    last_heard_s: float
    key: AllowedKey | None = None
    """The key of its newest message; None without keys."""
    state: str = "starting"
    stats: dict[str, float] = field(default_factory=dict)
    """Statistics of its last heartbeat."""


class ConnectedPeers:
    """Peers by name and by route."""

    def __init__(
        self, *, job: str, dataset: str, settings: Mapping[Role, str] | None = None, shard: Shard = WHOLE
    ) -> None:
        """`dataset` and `settings` (by role) are fingerprints of the buffer's own configuration.

        Model and tokenizer must be those of the first peer that registers.
        """
        self._settings = dict(settings or {})
        own = {"job": job, "num_shards": shard.count, "shard": shard.index, "dataset": dataset}
        self._expected: dict[str, tuple[object, str]] = {
            name: (value, "the buffer") for name, value in own.items()
        }
        self._by_name: dict[str, Peer] = {}
        self._by_route: dict[bytes, Peer] = {}
        self._stats_of_gone: dict[tuple[str, int], dict[str, float]] = {}
        """Last statistics of rollout servers that are not connected any more, by name and incarnation."""

    def check(self, hello: Hello) -> None:
        """Raises RefusedError(field, reason) if a peer's configuration differs from the job's."""
        for name in ("job", "num_shards", "shard", "dataset", "model", "tokenizer"):
            expected, owner = self._expected.get(name, (getattr(hello, name), hello.name))
            if getattr(hello, name) != expected:
                reason = (
                    f"{hello.name} has {getattr(hello, name)!r}, {owner} has {expected!r}: "
                    "start both with the same configuration"
                )
                raise RefusedError(name, reason)
        expected = self._settings.get(hello.role, "")
        if hello.settings and expected and hello.settings != expected:
            reason = (
                f"{hello.name} has {hello.settings!r}, the buffer has {expected!r}: "
                "start both with the same configuration"
            )
            raise RefusedError("settings", reason)
        known = self._by_name.get(hello.name)
        if known is not None and known.hello.role is not hello.role:
            raise RefusedError(
                "name",
                f"{hello.name} is taken by a {known.hello.role.value}: give every daemon a different name",
            )

    def add(self, route: bytes, hello: Hello, *, now_s: float, key: AllowedKey | None = None) -> Peer:
        """Registers a peer that passed `check`.

        It replaces an older incarnation, or its own earlier route.
        """
        known = self._by_name.get(hello.name)
        is_same_process = known is not None and known.hello.incarnation == hello.incarnation
        if known is not None:
            self._by_route.pop(known.route, None)
            if not is_same_process:
                self._keep_stats(known)
        stats = self._stats_of_gone.pop((hello.name, hello.incarnation), {})
        peer = Peer(route=route, hello=hello, last_heard_s=now_s, key=key, stats=stats)
        if known is not None and is_same_process:
            peer.state, peer.stats = known.state, known.stats
        self._by_name[hello.name] = self._by_route[route] = peer
        return peer

    def expect_model_of(self, hello: Hello) -> None:
        """Makes `check` require this peer's model and tokenizer, unless an earlier call has set them."""
        for name in ("model", "tokenizer"):
            self._expected.setdefault(name, (getattr(hello, name), hello.name))

    def at(self, route: bytes) -> Peer | None:
        """The peer with this route."""
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

    def remove(self, name: str) -> None:
        """Removes a peer that left, was silent or was refused. Its next message gets HelloRequired."""
        peer = self._by_name.pop(name, None)
        if peer is not None:
            self._by_route.pop(peer.route, None)
            self._keep_stats(peer)

    def total(self, stat: str) -> float:
        """Sum of a cumulative statistic over all rollout servers, including those that have left."""
        connected = (peer.stats for peer in self.of(Role.ROLLOUT))
        return sum(stats.get(stat, 0.0) for stats in (*self._stats_of_gone.values(), *connected))

    def _keep_stats(self, peer: Peer) -> None:
        if peer.hello.role is Role.ROLLOUT:
            self._stats_of_gone[peer.hello.name, peer.hello.incarnation] = peer.stats
