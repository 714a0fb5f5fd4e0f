"""Rollout servers, their credit (samples they can take), and the leases they hold.

    lease: GRANTED -> finished    every sample was delivered, failed or dropped
                   -> lost        it expired or was returned, or its server was replaced or silent

Credit is a server's capacity (`free + holding` of its last heartbeat) minus the samples of its leases in this
table. A running sum of grants and returns could become wrong when a heartbeat and a grant cross on the wire;
this difference cannot. A heartbeat renews the leases it names. Other leases of the server expire, because the
server never received them or has lost them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from areal_like.shards import Shard
from areal_like.wire.messages.producer import ServerHeartbeat, ServerState
from buffer.storage.base import LeaseRow, Store
from buffer.tables.server_health import ServerHealth
from buffer.tables.server_order import ServerOrder
from buffer.tickets import LeaseRecord, Ticket

_MAX_REMOVED = 1024
"""Number of removed servers whose health is remembered."""


@dataclass(kw_only=True, slots=True, eq=False)
class Server:
    """One registered rollout server."""

    name: str
    incarnation: int
    weights_version: int
    last_heard_s: float
    state: ServerState = ServerState.STARTING
    health: ServerHealth = field(default_factory=ServerHealth)
    is_cordoned: bool = False
    """True while an operator withholds new leases from it."""
    capacity_samples: int = 0
    owed_samples: int = 0
    """Samples of its live leases that have not arrived yet."""
    leases: dict[int, LeaseRecord] = field(default_factory=dict)
    renewed_until_s: float = -math.inf
    """No lease of the server expires earlier. Set by a heartbeat that names exactly the server's current
    leases."""
    check_s: float = 0.0
    """Earliest time at which a lease of the server can expire, or the server can count as silent."""
    lost: set[int] | None = None
    """Lost leases that the server may still work on. None until its first heartbeat, which may name leases of
    an earlier buffer."""

    @property
    def credit(self) -> int:
        """Samples that the server has room for, whether or not it is held back."""
        return self.capacity_samples - self.owed_samples if self.state is ServerState.SERVING else 0

    @property
    def is_held_back(self) -> bool:
        """True while it gets no leases, because of an operator or its failures."""
        return self.is_cordoned or self.health.quarantine is not None

    @property
    def free_samples(self) -> int:
        """Samples that the server can take now."""
        return 0 if self.is_held_back else self.credit


class LeaseTable:
    """Servers and leases. Methods that end leases return them; `TicketLifecycle` requeues their samples."""

    def __init__(self, store: Store, *, lease_timeout_s: float, first_lease_id: int, shard: Shard) -> None:
        """`first_lease_id`: counted within the shard."""
        self._store = store
        self._shard = shard
        self._timeout_s = lease_timeout_s
        self._next_id = first_lease_id
        self.may_grant = True
        """False while no lease may be granted (`Ledger.hold_grants`)."""
        self.servers: dict[str, Server] = {}
        self.in_quarantine: set[str] = set()
        """Servers whose quarantine may have to be ended."""
        self._checks: list[tuple[float, str]] = []
        """Heap of (`Server.check_s`, name). Entries of servers that were removed are skipped."""
        self._order = ServerOrder()
        self._slots: dict[str, int] = {}
        """Samples that each serving server holds or has room for."""
        self.num_slots = 0
        """Their sum, as of the last use of `order`."""
        self._changed: set[str] = set()
        """Servers whose position in the order may have changed."""
        self.live: dict[int, LeaseRecord] = {}
        self.on_end: Callable[[LeaseRecord], None] | None = None
        """Called with each lease that ends."""
        self._aborts: dict[str, set[int]] = {}
        self._health_of_removed: dict[str, tuple[int, ServerHealth]] = {}
        """Incarnation and health of the servers that were removed most recently."""

    def restore(self, rows: Iterable[LeaseRow], tickets: Mapping[int, Ticket], *, now_s: float) -> None:
        """Restores leases of an earlier buffer with a new expiry time; their servers have yet to register."""
        for row in rows:
            ticket = tickets[row.ticket_id]
            lease = LeaseRecord(
                lease_id=row.lease_id,
                ticket_id=row.ticket_id,
                server=row.server,
                weights_step=row.weights_step,
                outstanding=set(row.outstanding & ticket.unleased),
                expires_s=now_s + self._timeout_s,
                granted_s=now_s,
            )
            server = self.servers.get(row.server)
            if server is None:
                server = Server(
                    name=row.server, incarnation=row.server_incarnation, weights_version=0, last_heard_s=now_s
                )
                self.servers[row.server] = server
                self._check_later(server)
            self._next_id = max(self._next_id, self._shard.local(row.lease_id) + 1)
            self._add(lease, server, ticket)

    def register_server(
        self, name: str, *, incarnation: int, weights_version: int, now_s: float
    ) -> list[LeaseRecord]:
        """Registers a server and returns the leases of its earlier incarnation, which are lost.

        The caller has checked with `IncarnationTable` that no newer incarnation is registered.
        """
        known = self.servers.get(name)
        assert known is None or known.incarnation <= incarnation
        if known is not None and known.incarnation == incarnation:
            known.last_heard_s, known.weights_version = now_s, weights_version
            self._changed.add(name)
            return []
        lost = self.remove_server(name)
        before, health = self._health_of_removed.pop(name, (0, ServerHealth()))
        self.servers[name] = server = Server(
            name=name,
            incarnation=incarnation,
            weights_version=weights_version,
            last_heard_s=now_s,
            health=health if before == incarnation else ServerHealth(),
        )
        self._check_later(server)
        if server.health.quarantine is not None:
            self.in_quarantine.add(name)
        return lost

    def remove_server(self, name: str) -> list[LeaseRecord]:
        """Removes a server and returns its leases, which are lost."""
        server = self.servers.pop(name, None)
        if server is None:
            return []
        self._changed.add(name)
        # Leaving and registering again must not end a quarantine.
        self._health_of_removed[name] = (server.incarnation, server.health)
        if len(self._health_of_removed) > _MAX_REMOVED:
            del self._health_of_removed[next(iter(self._health_of_removed))]
        return [self._remove(lease) for lease in list(server.leases.values())]

    def heartbeat(self, name: str, beat: ServerHeartbeat, *, now_s: float) -> None:
        """Updates a server, renews its leases that the heartbeat names, and aborts others that it names."""
        server = self.servers[name]
        capacity = beat.free_samples + beat.holding_samples
        if (server.state, server.weights_version, server.capacity_samples) != (
            beat.state,
            beat.weights_version,
            capacity,
        ):
            server.state, server.weights_version = beat.state, beat.weights_version
            server.capacity_samples = capacity
            self._changed.add(name)
        server.last_heard_s, expires_s = now_s, now_s + self._timeout_s
        if beat.leases == [*server.leases]:  # nearly always: a server names them as they were granted
            server.renewed_until_s, server.lost = expires_s, set()
            return
        foreign = []
        for lease_id in beat.leases:
            lease = server.leases.get(lease_id)
            if lease is not None:
                lease.expires_s = expires_s
            elif server.lost is None or lease_id in server.lost:
                # Any other unknown lease has just finished: the server sent the heartbeat before it received
                # the acknowledgement.
                foreign.append(lease_id)
        server.lost = set(foreign)
        if foreign:
            self._aborts.setdefault(name, set()).update(foreign)

    def return_leases(self, name: str, lease_ids: list[int]) -> list[LeaseRecord]:
        """Ends leases that a server returns. Ids of other leases are ignored: they were lost before."""
        held = self.servers[name].leases
        return [self._remove(held[lease_id]) for lease_id in dict.fromkeys(lease_ids) if lease_id in held]

    def expire(self, *, now_s: float) -> tuple[list[LeaseRecord], list[str]]:
        """Ends leases that were not renewed in time, and removes silent servers.

        Returns (lost leases, names of the removed servers).
        """
        lost: list[LeaseRecord] = []
        silent: list[str] = []
        while self._checks and self._checks[0][0] <= now_s:
            check_s, name = heapq.heappop(self._checks)
            server = self.servers.get(name)
            if server is None or server.check_s != check_s:
                continue
            server.check_s = math.inf  # there may be another entry with this time
            if server.renewed_until_s <= now_s:
                for lease in [lease for lease in server.leases.values() if lease.expires_s <= now_s]:
                    self._take_from_server(lease)
                    lost.append(lease)
            if server.last_heard_s + self._timeout_s <= now_s:
                silent.append(name)
            else:
                self._check_later(server)
        for lease in lost:
            if lease.server not in silent:
                self._aborts.setdefault(lease.server, set()).add(lease.lease_id)
        for name in silent:
            lost += self.remove_server(name)
        return lost, silent

    def grant(
        self,
        server: Server,
        ticket: Ticket,
        *,
        weights_step: int,
        now_s: float,
        max_samples: int | None = None,
    ) -> LeaseRecord:
        """Leases the unleased samples of a ticket to a server: all, or the first `max_samples` of them."""
        lease = LeaseRecord(
            lease_id=self._shard.number(self._next_id),
            ticket_id=ticket.ticket_id,
            server=server.name,
            weights_step=weights_step,
            outstanding=set(sorted(ticket.unleased)[:max_samples]),
            expires_s=now_s + self._timeout_s,
            granted_s=now_s,
        )
        self._next_id += 1
        self._add(lease, server, ticket)
        self._store.put_lease(lease, server_incarnation=server.incarnation)
        return lease

    def clear_credit(self, name: str) -> None:
        """The server cannot be reached, so it gets no lease until its next heartbeat."""
        self.servers[name].capacity_samples = 0
        self._changed.add(name)

    def remove_sample(self, lease: LeaseRecord, sample_index: int, *, arrived: bool) -> bool:
        """Removes a sample that arrived or failed from a live lease.

        Returns True if it was the last sample of the lease.
        """
        lease.outstanding.remove(sample_index)
        server = self.servers[lease.server]
        server.owed_samples -= 1
        self._changed.add(lease.server)
        if not lease.outstanding:
            self._remove(lease)
        elif not arrived:
            # The row of a sample that arrived is enough: recovery removes such samples from leases.
            self._store.put_lease(lease, server_incarnation=server.incarnation)
        return not lease.outstanding

    def revoke(self, lease: LeaseRecord) -> None:
        """Ends a lease and aborts it at its server, again after each heartbeat that still names it."""
        self._take_from_server(lease)
        self._aborts.setdefault(lease.server, set()).add(lease.lease_id)

    def take_aborts(self) -> dict[str, list[int]]:
        """Leases to abort, by server, since the last call."""
        aborts, self._aborts = self._aborts, {}
        return {name: sorted(lease_ids) for name, lease_ids in aborts.items()}

    def end_backoffs(self, *, now_s: float) -> None:
        """Ends the quarantines whose time is over."""
        for name in list(self.in_quarantine):
            server = self.servers.get(name)
            if server is not None:
                server.health.end_backoff(now_s=now_s)
            if server is None or server.health.quarantine is None:
                self.in_quarantine.remove(name)

    @property
    def order(self) -> ServerOrder:
        """The current order of servers with credit, including those that are held back."""
        for name in self._changed:
            self.num_slots -= self._slots.pop(name, 0)
            if (server := self.servers.get(name)) is None:
                self._order.remove(name)
            else:
                if server.state is ServerState.SERVING:
                    self._slots[name] = max(0, server.capacity_samples)
                    self.num_slots += self._slots[name]
                self._order.put(
                    name,
                    free_samples=server.credit,
                    weights_version=server.weights_version,
                    is_idle=not server.leases,
                )
        self._changed.clear()
        return self._order

    def _check_later(self, server: Server) -> None:
        server.check_s = server.last_heard_s + self._timeout_s
        if server.renewed_until_s < server.check_s:
            first_s = min([lease.expires_s for lease in server.leases.values()], default=math.inf)
            server.check_s = min(server.check_s, max(first_s, server.renewed_until_s))
        heapq.heappush(self._checks, (server.check_s, server.name))

    def _take_from_server(self, lease: LeaseRecord) -> None:
        self._remove(lease)
        server = self.servers[lease.server]
        if server.lost is not None:
            server.lost.add(lease.lease_id)

    def _add(self, lease: LeaseRecord, server: Server, ticket: Ticket) -> None:
        ticket.unleased -= lease.outstanding
        ticket.leases[lease.lease_id] = server.leases[lease.lease_id] = self.live[lease.lease_id] = lease
        server.owed_samples += len(lease.outstanding)
        self._changed.add(server.name)

    def _remove(self, lease: LeaseRecord) -> LeaseRecord:
        self._store.end_lease(lease.lease_id)
        del self.live[lease.lease_id]
        if self.on_end is not None:
            self.on_end(lease)
        server = self.servers.get(lease.server)
        if server is not None:
            del server.leases[lease.lease_id]
            server.owed_samples -= len(lease.outstanding)
            self._changed.add(server.name)
        return lease
