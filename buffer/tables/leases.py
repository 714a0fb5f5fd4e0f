"""Who is making what: rollout servers, their credit, and the leases they hold.

    lease: GRANTED -> finished (every sample delivered, failed or dropped) | lost (expired, returned, server replaced or silent)

Credit is a server's capacity (`free + holding` of its last heartbeat) minus what this book says it owes. Unlike a running
difference of grants and returns it cannot drift when a heartbeat crosses a grant on the wire.
A heartbeat renews the leases it names. A lease that it does not name runs out: the server never got it or forgot it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from areal_like.errors import StaleIncarnationError
from areal_like.shards import Shard
from areal_like.wire.messages.producer import ServerHeartbeat, ServerState
from buffer.storage.base import LeaseRow, Store
from buffer.tickets import LeaseRecord, Ticket


@dataclass(kw_only=True, slots=True, eq=False)
class Server:
    """One registered rollout server."""

    name: str
    incarnation: int
    weights_version: int
    last_heard_s: float
    state: ServerState = ServerState.STARTING
    capacity_samples: int = 0
    owed_samples: int = 0
    """Samples of its live leases that have not come."""
    leases: dict[int, LeaseRecord] = field(default_factory=dict)
    lost: set[int] | None = None
    """Leases taken from it that it may still work on. None: not reconciled since it registered, any lease it names may be such a one."""

    @property
    def free_samples(self) -> int:
        """Samples it can take now."""
        return self.capacity_samples - self.owed_samples if self.state is ServerState.SERVING else 0

    def can_take(self, num_samples: int) -> bool:
        """A ticket is leased whole. An idle server takes one that is larger than all it has: nobody could ever take it otherwise."""
        return self.free_samples >= num_samples or (self.free_samples > 0 and not self.leases)


class LeaseTable:
    """Servers and leases. Every method that takes leases away returns them; the ledger decides what becomes of their samples."""

    def __init__(self, store: Store, *, lease_timeout_s: float, first_lease_id: int, shard: Shard) -> None:
        """`first_lease_id`: as the shard counts."""
        self._store = store
        self._shard = shard
        self._timeout_s = lease_timeout_s
        self._next_id = first_lease_id
        self._expiry: list[tuple[float, int]] = []
        self.servers: dict[str, Server] = {}
        self.leases: dict[int, LeaseRecord] = {}

    def restore(self, rows: Iterable[LeaseRow], tickets: Mapping[int, Ticket], *, now_s: float) -> None:
        """Leases of an earlier life go on, with a fresh expiry, as those of servers that have not said hello yet."""
        for row in rows:
            ticket = tickets[row.ticket_id]
            lease = LeaseRecord(
                lease_id=row.lease_id,
                ticket_id=row.ticket_id,
                server=row.server,
                weights_step=row.weights_step,
                outstanding=set(row.outstanding & ticket.unleased),
                expires_s=now_s + self._timeout_s,
            )
            server = self.servers.get(row.server)
            if server is None:
                server = Server(
                    name=row.server, incarnation=row.server_incarnation, weights_version=0, last_heard_s=now_s
                )
                self.servers[row.server] = server
            self._next_id = max(self._next_id, self._shard.local(row.lease_id) + 1)
            self._enter(lease, server, ticket)

    def register(
        self, name: str, *, incarnation: int, weights_version: int, now_s: float
    ) -> list[LeaseRecord]:
        """A server said hello; the leases of an earlier incarnation are lost. Raises StaleIncarnationError for an older one."""
        known = self.servers.get(name)
        if known is not None and known.incarnation > incarnation:
            raise StaleIncarnationError(
                f"{name} was started again: incarnation {known.incarnation} is newer than {incarnation}"
            )
        if known is not None and known.incarnation == incarnation:
            known.last_heard_s, known.weights_version = now_s, weights_version
            return []
        lost = self.remove(name)
        self.servers[name] = Server(
            name=name, incarnation=incarnation, weights_version=weights_version, last_heard_s=now_s
        )
        return lost

    def remove(self, name: str) -> list[LeaseRecord]:
        """A server is gone; its leases are lost."""
        server = self.servers.pop(name, None)
        return [self._take(lease) for lease in list(server.leases.values())] if server else []

    def heartbeat(self, name: str, beat: ServerHeartbeat, *, now_s: float) -> list[int]:
        """Renews what the server names; returns the ids among those that are not its own (any more), to be aborted there."""
        server = self.servers[name]
        server.last_heard_s, server.state, server.weights_version = now_s, beat.state, beat.weights_version
        server.capacity_samples = beat.free_samples + beat.holding_samples
        foreign = []
        for lease_id in beat.leases:
            lease = server.leases.get(lease_id)
            if lease is not None:
                lease.expires_s = now_s + self._timeout_s
            elif server.lost is None or lease_id in server.lost:
                # Others that are not ours have just been delivered: the heartbeat was written before their acknowledgement came.
                foreign.append(lease_id)
        server.lost = set(foreign)
        return foreign

    def take_back(self, name: str, lease_ids: list[int]) -> list[LeaseRecord]:
        """A server returned leases; unknown ids are ignored (they were lost before)."""
        held = self.servers[name].leases
        return [self._take(held[lease_id]) for lease_id in dict.fromkeys(lease_ids) if lease_id in held]

    def expired(self, *, now_s: float) -> tuple[list[LeaseRecord], list[str]]:
        """Leases that nobody renewed in time, and the names of servers that fell silent (now removed)."""
        lost = []
        while self._expiry and self._expiry[0][0] <= now_s:
            lease = self.leases.get(heapq.heappop(self._expiry)[1])
            if lease is None:
                continue
            if lease.expires_s > now_s:
                heapq.heappush(self._expiry, (lease.expires_s, lease.lease_id))
            else:
                self.revoke(lease)
                lost.append(lease)
        silent = [
            server.name for server in self.servers.values() if server.last_heard_s + self._timeout_s <= now_s
        ]
        for name in silent:
            lost += self.remove(name)
        return lost, silent

    def grant(self, server: Server, ticket: Ticket, *, weights_step: int, now_s: float) -> LeaseRecord:
        """Leases all unleased samples of a ticket to a server."""
        lease = LeaseRecord(
            lease_id=self._shard.number(self._next_id),
            ticket_id=ticket.ticket_id,
            server=server.name,
            weights_step=weights_step,
            outstanding=set(ticket.unleased),
            expires_s=now_s + self._timeout_s,
        )
        self._next_id += 1
        self._enter(lease, server, ticket)
        self._store.put_lease(lease, server_incarnation=server.incarnation)
        return lease

    def undeliverable(self, name: str) -> None:
        """The server cannot be reached: no credit until its next heartbeat."""
        self.servers[name].capacity_samples = 0

    def settle(self, lease: LeaseRecord, sample_index: int, *, arrived: bool) -> bool:
        """One sample of a live lease has arrived, or is not to be made under it any more. Returns whether that was the lease's last."""
        lease.outstanding.remove(sample_index)
        server = self.servers[lease.server]
        server.owed_samples -= 1
        if not lease.outstanding:
            self._take(lease)
        elif not arrived:  # else the sample's own row says so
            self._store.put_lease(lease, server_incarnation=server.incarnation)
        return not lease.outstanding

    def revoke(self, lease: LeaseRecord) -> None:
        """Takes a lease away on the buffer's initiative; the server is told, again with each heartbeat that still names it."""
        self._take(lease)
        server = self.servers[lease.server]
        if server.lost is not None:
            server.lost.add(lease.lease_id)

    def _enter(self, lease: LeaseRecord, server: Server, ticket: Ticket) -> None:
        ticket.unleased -= lease.outstanding
        ticket.leases[lease.lease_id] = server.leases[lease.lease_id] = self.leases[lease.lease_id] = lease
        server.owed_samples += len(lease.outstanding)
        heapq.heappush(self._expiry, (lease.expires_s, lease.lease_id))

    def _take(self, lease: LeaseRecord) -> LeaseRecord:
        self._store.end_lease(lease.lease_id)
        del self.leases[lease.lease_id]
        server = self.servers.get(lease.server)
        if server is not None:
            del server.leases[lease.lease_id]
            server.owed_samples -= len(lease.outstanding)
        return lease
