"""A bounded cache of records in memory, so that most groups need not be read back from disk.

    add -> PINNED (not durable yet) -> unpin -> KEPT -> evicted | removed

Groups leave the buffer roughly in the order in which their samples arrived. So a full cache does not keep the
newest record: the records needed next stay in memory. Served groups are evicted first, because they are
fetched again only after a trainer's crash. Pinned records are the only copy and are never evicted; their
number is limited, because servers send no new samples before an acknowledgement.

Routes are kept only while their record is pinned, because they are many times larger and fetched once.
"""

from __future__ import annotations

from areal_like.wire.records import Record


class RecordCache:
    """Records by ticket and sample index. Pure."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._records: dict[int, dict[int, Record]] = {}
        self._pinned: set[tuple[int, int]] = set()
        self._served: dict[int, None] = {}
        self.num_bytes = 0

    def add(self, record: Record) -> None:
        """Adds a record, pinned: there is no copy on disk yet."""
        self._records.setdefault(record.ticket_id, {})[record.sample_index] = record
        self._pinned.add((record.ticket_id, record.sample_index))
        self.num_bytes += record.num_bytes

    def unpin(self, ticket_id: int, sample_index: int) -> None:
        """The record is on disk: keep it in memory if there is room, without its routes."""
        self._pinned.discard((ticket_id, sample_index))
        record = self.get(ticket_id, sample_index)
        if record is not None and record.routes is not None:
            self._records[ticket_id][sample_index] = alone = record.without_routes()
            self.num_bytes -= record.num_bytes - alone.num_bytes
        while self.num_bytes > self._max_bytes and self._served:
            served = next(iter(self._served))
            del self._served[served]
            for index in list(self._records.get(served, ())):
                self._evict(served, index)
        if self.num_bytes > self._max_bytes:
            self._evict(ticket_id, sample_index)

    def get(self, ticket_id: int, sample_index: int) -> Record | None:
        return self._records.get(ticket_id, {}).get(sample_index)

    def mark_served(self, ticket_id: int) -> None:
        """A rank has fetched the group: its records are evicted before others."""
        if ticket_id in self._records:
            self._served[ticket_id] = None

    def remove(self, ticket_id: int) -> None:
        """Removes all records of a ticket, including pinned ones: they are no longer needed."""
        self._served.pop(ticket_id, None)
        for index in list(self._records.get(ticket_id, ())):
            self._pinned.discard((ticket_id, index))
            self._evict(ticket_id, index)

    def _evict(self, ticket_id: int, sample_index: int) -> None:
        records = self._records.get(ticket_id, {})
        if sample_index not in records or (ticket_id, sample_index) in self._pinned:
            return
        self.num_bytes -= records.pop(sample_index).num_bytes
        if not records:
            del self._records[ticket_id]
