"""The connected peers: a directory by name and by route, and the checks of a Hello.

A peer is identified by its name. `Hello` binds the routing id of its socket (the route), which is different
for each connection, to the name. Only the newest incarnation of a name is kept: messages of the process
that it replaced come from an unknown route, so that process has to send Hello again and is refused
(`IncarnationTable`).

A refusal names the field that differs but not the values, because a peer could otherwise find them out one by
one; both values are in the log.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from areal_like.errors import RefusedError
from areal_like.hosts import is_loopback
from areal_like.security.keyring import Keyring
from areal_like.security.keys import AllowedKey, KeyRole
from areal_like.shards import WHOLE, Shard
from areal_like.wire.limits import bounded_stats
from areal_like.wire.messages.hello import Hello, Role
from buffer.tables.incarnations import TRAINER

log = logging.getLogger(__name__)

_OPTIONAL = ("dtype", "content", "eval_content")
"""Fields of a Hello that are compared only where they are not empty."""
_MAX_GONE = 1024
"""Number of departed servers whose statistics are kept separately, because they may come back."""
_SETTING = re.compile(r"(?:sampling|eval|buffer|distill|model|trainer)\.[\w.-]+", re.ASCII)
_SETTINGS = re.compile(f" (?={_SETTING.pattern}=)")
"""Separator between two settings of a Hello."""
_MOST_PER_S = {
    "tokens_generated": 1e6,
    "progress": 1e6,
    "busy_s": 1e3,
    "idle_s": 1e3,
    "starved_s": 1e3,
}
"""Totals of rollout servers that the buffer adds up -> an increase per second beyond that of any server.
(Seconds are sums over its engines.)"""
_RENEWAL_S = 3.0
"""Seconds without a message after which a peer is removed if its key was renewed and has expired: every
daemon reads its new key within a second, so such a peer has only the old key."""
_MAX_OWNERS = 4096
"""Number of names whose first key is remembered; the oldest are forgotten first."""
KEY_FIELDS = ("key", "key role", "key name")
"""Fields of the refusals that are counted as refused because of a key."""
ROLES = tuple(KeyRole(role.value) for role in Role)
"""Roles of the keys that may connect to a buffer."""
_EARLIER_S = 86_400.0
"""Seconds for which a server that the ledger knows may have worked before this buffer was started."""
_SPARE_S = 60.0
"""Seconds of work that a heartbeat may add beyond the time since the previous one, which may be late."""


def claimed_name(hello: Hello) -> str:
    """The name that a process claims: its own, or TRAINER for all ranks of a trainer."""
    return TRAINER if hello.role is Role.TRAINER else hello.name


class _Totals:
    """The totals that one rollout server claims (`_MOST_PER_S`), as far as it can have done that work.

    claim -> more than any server can have done: left out, and forgotten
          -> more than it can have done since its last claim: left out, and later ones are counted from here
          -> otherwise counted
    """

    def __init__(self, *, now_s: float, earlier_s: float) -> None:
        """`earlier_s`: seconds of earlier work that its first claim may add."""
        self.counted: dict[str, float] = {}
        """Name -> the sum of the increases that are counted."""
        self._claimed: dict[str, float] = {}
        self._since_s = self._taken_s = now_s
        self._spare_s = dict.fromkeys(_MOST_PER_S, earlier_s)
        """Name -> seconds of work that the next claim may add beyond the time since this one."""

    def take(self, stats: Mapping[str, float], *, now_s: float) -> list[str]:
        """Counts the totals in `stats`; returns the names of those that cannot be true."""
        absurd = []
        for name, most_per_s in _MOST_PER_S.items():
            left_s = self._spare_s[name] + now_s - self._taken_s
            if name in stats:
                claim, before = stats[name], self._claimed.get(name, 0.0)
                increase = max(0.0, claim - before)
                if not -1 < claim <= most_per_s * (_EARLIER_S + now_s - self._since_s):
                    absurd.append(name)
                else:
                    self._claimed[name] = claim
                    if increase > most_per_s * left_s:
                        absurd.append(name)
                    else:
                        self.counted[name] = self.counted.get(name, 0.0) + increase
                        left_s -= increase / most_per_s
            self._spare_s[name] = min(left_s, _SPARE_S)
        self._taken_s = now_s
        return absurd


@dataclass(kw_only=True, slots=True, eq=False)
class Peer:
    """One registered process."""

    route: bytes
    """Routing id of its socket."""
    hello: Hello
    """The peer's hello; its `incarnation` is the one that the ledger has granted."""
    last_heard_s: float
    totals: _Totals
    key: AllowedKey | None = None
    """The key of its newest message; None without keys."""
    state: str = "starting"
    stats: dict[str, float] = field(default_factory=dict)
    """Statistics of its last heartbeat; a server's totals as far as they are counted."""
    waits: dict[str, float] = field(default_factory=dict)
    """Name of a wait at its last heartbeat -> seconds."""


class ConnectedPeers:
    """Peers by name and by route."""

    def __init__(
        self,
        *,
        job: str,
        dataset: str,
        settings: Mapping[Role, str] | None = None,
        shard: Shard = WHOLE,
        max_peers: int = 1024,
        only_loopback: bool = False,
    ) -> None:
        """`dataset` and `settings` (by role) are fingerprints of the buffer's own configuration.

        Model, tokenizer and dtype must be those of the first peer that registers. `only_loopback`: refuses
        peers with other addresses.
        """
        self._max_peers, self._only_loopback = max_peers, only_loopback
        self._settings = dict(settings or {})
        own = {"job": job, "num_shards": shard.count, "shard": shard.index, "dataset": dataset}
        self._expected: dict[str, tuple[object, str]] = {
            name: (value, "the buffer") for name, value in own.items()
        }
        self._by_name: dict[str, Peer] = {}
        self._by_route: dict[bytes, Peer] = {}
        self._gone: dict[tuple[str, int], Peer] = {}
        """Rollout servers that are no longer connected, by name and incarnation."""
        self._stats_of_long_gone: dict[str, float] = {}
        """Sums over servers that left earlier than those."""

    def check(self, hello: Hello) -> None:
        """Raises RefusedError(field, reason) if a peer's configuration differs from the job's.

        Also raises it for a name of the other role, an address outside this machine, and too many peers."""
        for name in ("job", "num_shards", "shard", "dataset", "model", "tokenizer", *_OPTIONAL):
            expected, owner = self._expected.get(name, (getattr(hello, name), hello.name))
            # The trainer does not know the content, and peers of an earlier release send no dtype.
            is_compared = name not in _OPTIONAL or getattr(hello, name)
            if is_compared and getattr(hello, name) != expected:
                _refuse_difference(hello, name, expected=expected, owner=owner)
        expected = self._settings.get(hello.role, "")
        if hello.settings and expected and hello.settings != expected:
            _refuse_difference(hello, "settings", expected=expected, owner="the buffer")
        # Otherwise a server could keep a trainer from registering by taking its name.
        is_rank_name = hello.name == TRAINER or hello.name.startswith(f"{TRAINER}-")
        if is_rank_name is not (hello.role is Role.TRAINER):
            raise RefusedError(
                "name",
                f"a {hello.role.value} cannot have the name {hello.name}: give every daemon a different name,"
                f" and only ranks of the trainer names that begin with {TRAINER}-",
            )
        self._check_addresses(hello)
        if hello.name not in self._by_name and len(self._by_name) >= self._max_peers:
            raise RefusedError(
                "peers", f"{self._max_peers} peers are registered: raise buffer.max_peers to have more"
            )

    def _check_addresses(self, hello: Hello) -> None:
        """Raises RefusedError for an address of another machine: without keys it may not take part."""
        for name in ("http_address", "weights_address"):
            address: str = getattr(hello, name)
            if self._only_loopback and address and not _is_local(address):
                raise RefusedError(
                    name,
                    "is not an address of this machine alone, and the buffer listens on loopback without "
                    "keys: set buffer.host and security.keys to use several machines",
                )

    def add(
        self,
        route: bytes,
        hello: Hello,
        *,
        now_s: float,
        key: AllowedKey | None = None,
        is_new: bool = False,
    ) -> Peer:
        """Registers a peer that passed `check`, with the incarnation that the ledger has granted.

        It replaces an older incarnation, or its own earlier route. `is_new`: the ledger has not known this
        process, so it cannot have worked yet.
        """
        known = self._by_name.get(hello.name)
        before = self._gone.pop((hello.name, hello.incarnation), None)
        if known is not None:
            self._by_route.pop(known.route, None)
            if known.hello.incarnation == hello.incarnation:
                before = known
            else:
                self._keep_stats(known)
        earlier_s = _SPARE_S if is_new else _EARLIER_S
        totals = before.totals if before is not None else _Totals(now_s=now_s, earlier_s=earlier_s)
        peer = Peer(route=route, hello=hello, last_heard_s=now_s, totals=totals, key=key)
        if before is not None:
            peer.stats = before.stats
        if before is not None and before is known:
            peer.state = before.state
        self._by_name[hello.name] = self._by_route[route] = peer
        return peer

    def holders(self, name: str, process: str) -> list[Peer]:
        """The connected processes to query before another one may have the name (`claimed_name`). For a
        trainer's ranks this is rank 0, without which the others do nothing, or all ranks if rank 0 is
        absent."""
        if name != TRAINER:
            holder = self._by_name.get(name)
            return [holder] if holder is not None and holder.hello.process != process else []
        ranks = [peer for peer in self.of(Role.TRAINER) if peer.hello.process != process]
        return [peer for peer in ranks if peer.hello.rank == 0] or ranks

    def take_name(self, name: str, *, kept: str = "") -> None:
        """Removes the processes that have a name (`claimed_name`), except the process `kept`."""
        members = self.of(Role.TRAINER) if name == TRAINER else [self._by_name.get(name)]
        for peer in members:
            if peer is not None and peer.hello.process != kept:
                self.remove(peer.hello.name)

    def expect_model_of(self, hello: Hello) -> None:
        """Makes `check` require this peer's model, tokenizer, dtype and content of the task's data, unless an
        earlier call has set them."""
        for name in ("model", "tokenizer", *_OPTIONAL):
            if name not in _OPTIONAL or getattr(hello, name):
                self._expected.setdefault(name, (getattr(hello, name), hello.name))

    def at(self, route: bytes) -> Peer | None:
        return self._by_route.get(route)

    def named(self, name: str) -> Peer | None:
        return self._by_name.get(name)

    def count(self, role: Role) -> int:
        """Number of peers of a role."""
        return sum([peer.hello.role is role for peer in self._by_name.values()])

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
        servers = [peer for peer in self._by_name.values() if peer.hello.role is Role.ROLLOUT]
        all_stats = [self._stats_of_long_gone, *(peer.stats for peer in (*self._gone.values(), *servers))]
        return sum(stats.get(stat, 0.0) for stats in all_stats)

    def take_stats(self, peer: Peer, stats: Mapping[str, float], *, now_s: float) -> str:
        """Replaces a peer's statistics; returns which of a server's totals cannot be true, or "".

        Such a total adds nothing, because it would stay in the sums over all servers.
        """
        bounded = bounded_stats(stats)
        if peer.hello.role is Role.TRAINER:
            peer.stats = bounded
            return ""
        absurd = peer.totals.take(bounded, now_s=now_s)
        plain = {name: value for name, value in bounded.items() if name not in _MOST_PER_S}
        peer.stats = plain | peer.totals.counted
        return ", ".join(f"{name} {bounded[name]:g}" for name in absurd)

    def _keep_stats(self, peer: Peer) -> None:
        if peer.hello.role is Role.ROLLOUT:
            self._gone[peer.hello.name, peer.hello.incarnation] = peer
            if len(self._gone) > _MAX_GONE:
                oldest = next(iter(self._gone))
                for stat, value in self._gone.pop(oldest).stats.items():
                    self._stats_of_long_gone[stat] = self._stats_of_long_gone.get(stat, 0.0) + value


class PeerKeys:
    """Checks which key may act as which peer, on a job with keys. Without keys every check passes.

    A key has one role, and a name belongs to the key that registered it first, for as long as that key is
    valid: a server's key does not help to take over another server's name. Several processes may share a key.
    A renewed key has the name of the old one, so it keeps what the old one registered.
    """

    def __init__(self, keyring: Keyring | None) -> None:
        self._keyring = keyring
        self._owners: dict[str, AllowedKey] = {}
        """Name of a peer -> key that registered it first."""

    def _is_valid(self, key: AllowedKey) -> bool:
        """True if exactly this key is valid."""
        return self._keyring is None or self._keyring.sender(key.public) is not None

    def _has_successor(self, key: AllowedKey) -> bool:
        """True if a valid key has the name and role of this one, which may be the key itself."""
        return self._keyring is None or self._keyring.is_named(key.name, key.role)

    def check_hello(self, hello: Hello, key: AllowedKey | None) -> None:
        """Raises RefusedError if this key may not register this peer."""
        if key is None:
            return
        if not self._is_valid(key):  # no longer: the peer has waited for the name
            raise RefusedError("key", f"the key {key.name} is revoked or has expired")
        if KeyRole(hello.role.value) is not key.role:
            raise RefusedError(
                "key role", f"the key {key.name} of role {key.role.value} is not a {hello.role.value}'s"
            )
        owner = self._owners.get(hello.name)
        if owner is not None and owner.name != key.name and self._has_successor(owner):
            raise RefusedError(
                "key name",
                f"{hello.name} was registered with the key {owner.name}, not {key.name}: "
                "choose another name, or revoke that key",
            )

    def registered(self, name: str, key: AllowedKey | None) -> None:
        if key is not None:
            self._owners.pop(name, None)
            self._owners[name] = key
            while len(self._owners) > _MAX_OWNERS:
                del self._owners[next(iter(self._owners))]

    def check_message(self, peer: Peer, key: AllowedKey | None) -> None:
        """Raises RefusedError if a message comes with another key than the hello of its peer."""
        if key is not None and (peer.key is None or peer.key.name != key.name):
            known = "none" if peer.key is None else peer.key.name
            raise RefusedError("key", f"{peer.hello.name} registered with the key {known}, not {key.name}")

    def revoked(self, peers: Iterable[Peer], *, now_s: float) -> list[Peer]:
        """The peers whose key is no longer valid and was not renewed."""
        return [
            peer
            for peer in peers
            if peer.key is not None
            and not self._is_valid(peer.key)
            and not (self._has_successor(peer.key) and now_s - peer.last_heard_s < _RENEWAL_S)
        ]


def _refuse_difference(hello: Hello, name: str, *, expected: object, owner: str) -> NoReturn:
    own = getattr(hello, name)
    log.warning("%s refused (%s): it has %r, %s has %r", hello.name, name, own, owner, expected)
    which = f" in {', '.join(names)}" if (names := _differing(own, expected)) else ""
    raise RefusedError(
        name,
        f"differs from the job's{which}; the buffer's log has both values (of long ones the digests): start "
        "both with the same configuration",
    )


def _differing(own: object, expected: object) -> list[str]:
    """Names of the settings that differ, if both values are texts of settings (`shared_settings`)."""
    ours, theirs = (
        dict(part.partition("=")[::2] for part in _SETTINGS.split(str(each))) for each in (own, expected)
    )
    # Only the job's names are reported: the peer's names are text of its own choice.
    return [name for name, value in theirs.items() if _SETTING.fullmatch(name) and ours.get(name) != value]


def _is_local(address: str) -> bool:
    """True for an address that only reaches the machine that connects to it."""
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    return host in ("0.0.0.0", "::") or is_loopback(host)
