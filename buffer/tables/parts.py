"""Samples of closed groups: *loose* parts, which wait for a position, and those that are in a position.

A closed group stays here until all of its samples are placed or given up, and after that until no position
needs its records any more.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from buffer.tickets import State, Ticket

Part = tuple[Ticket, int]
"""A closed group and the index of one of its samples."""


class PartTable:
    """Closed groups and their parts. Pure."""

    def __init__(self) -> None:
        self.groups: dict[int, Ticket] = {}
        """Closed groups with records that are still needed, by id."""
        self._loose: dict[tuple[int, int], int] = {}
        """(ticket id, sample index) of each loose part -> the step at which its group was closed."""
        self._heap: list[tuple[int, int, int]] = []
        """(step at which the group was closed, ticket id, sample index), with outdated entries."""
        self._positions: dict[int, int] = {}
        """Ticket id of a closed group -> number of its samples in positions that are not released."""
        self.num_late = 0
        """Samples of closed groups that have neither arrived nor been given up."""

    @property
    def num_loose(self) -> int:
        """Parts that wait for a position."""
        return len(self._loose)

    def add_group(self, group: Ticket) -> None:
        """Adds a group that was closed, without its samples."""
        self.groups[group.ticket_id] = group
        self._positions[group.ticket_id] = 0
        self.num_late += group.num_samples - len(group.samples.keys() | group.failed)

    def add(self, group: Ticket, sample_index: int, *, was_late: bool) -> None:
        """Adds a complete sample of a closed group. `was_late`: it arrived after the closing."""
        self._loose[group.ticket_id, sample_index] = group.close_step
        heapq.heappush(self._heap, (group.close_step, group.ticket_id, sample_index))
        self.num_late -= was_late

    def give_up(self, group: Ticket, sample_index: int) -> None:
        """Marks a sample as failed, a loose one or one that is not complete: it enters no position."""
        if self._loose.pop((group.ticket_id, sample_index), None) is None:
            self.num_late -= 1
        group.failed.add(sample_index)
        group.num_failures.setdefault(sample_index, 0)

    def pop(self) -> Part | None:
        """Takes the loose part whose group was closed first; None if there is none."""
        while self._heap:
            _, ticket_id, sample_index = heapq.heappop(self._heap)
            if self._loose.pop((ticket_id, sample_index), None) is not None:
                return self.groups[ticket_id], sample_index
        return None

    def place(self, position: Ticket) -> None:
        """The parts of this position, which were popped, are recorded."""
        for ticket_id, sample_index in position.parts:
            self.groups[ticket_id].placed[sample_index] = position.ticket_id
            self._positions[ticket_id] += 1

    def release(self, position: Ticket) -> list[Ticket]:
        """The records of a position are no longer needed. Returns the groups whose records are not either."""
        for ticket_id, _ in position.parts:
            self._positions[ticket_id] -= 1
        ids = dict.fromkeys(ticket_id for ticket_id, _ in position.parts)
        return [group for ticket_id in ids if (group := self.forget(self.groups[ticket_id])) is not None]

    def forget(self, group: Ticket) -> Ticket | None:
        """Removes a group, and returns it, if it has ended and no position needs its records."""
        if group.state is State.CLOSED or self._positions[group.ticket_id]:
            return None
        del self.groups[group.ticket_id], self._positions[group.ticket_id]
        return group

    def is_over(self, group: Ticket) -> bool:
        """True if every sample of a closed group is placed or given up."""
        return len(group.placed.keys() | group.failed) == group.num_samples

    def restore(self, groups: Iterable[Ticket], *, positions: Iterable[Ticket]) -> None:
        """Continues from the rows of an earlier buffer: its closed groups, and its positions with records."""
        for group in groups:
            self.add_group(group)
            for index in group.samples.keys() - group.placed.keys() - group.failed:
                self.add(group, index, was_late=False)
        for position in positions:
            for ticket_id, _ in position.parts:
                self._positions[ticket_id] += 1
