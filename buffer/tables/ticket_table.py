"""The table of live tickets and their states, with a check that no ticket is ever lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from areal_like.shards import Shard
from areal_like.wire.messages.producer import Purpose
from buffer.prompts.order import Prompt
from buffer.storage.base import Store
from buffer.tickets import TERMINAL, Drop, SampleSummary, State, Ticket

_IS_OPEN = (State.QUEUED, State.LEASED)


class TicketTable:
    """Issues tickets and moves them between states; the only writer of `Ticket.state`.

    Tickets in a terminal state leave the table: their rows are in the store.
    """

    def __init__(self, store: Store, shard: Shard) -> None:
        self._store = store
        self._shard = shard
        self.num_issued = 0
        self.live: dict[int, Ticket] = {}
        """Ticket id -> ticket, in order of issue."""
        self._counts = {purpose: Counter(dict.fromkeys(State, 0)) for purpose in Purpose}
        self.num_partial = 0
        """Samples of train groups that are neither complete nor closed."""
        self._is_checked = False
        """False if a ticket was issued or moved since the last `check_conservation`."""
        self.on_move: Callable[[Ticket, State, State], None] | None = None
        """Called with each ticket that changes its state, the old state and the new one."""

    def restore(
        self,
        tickets: Iterable[Ticket],
        ended: Mapping[tuple[Purpose, State, Drop | None], int],
        *,
        last_id: int,
    ) -> None:
        """Continues from the rows of an earlier buffer.

        `tickets`: the live tickets, by id. `ended`: number of ended tickets by outcome. `last_id`: the
        largest ticket id; 0 if no ticket was issued.
        """
        self.num_issued = self._shard.local(last_id) if last_id else 0
        for ticket in tickets:
            self.live[ticket.ticket_id] = ticket
            self._counts[ticket.purpose][ticket.state] += 1
            if ticket.purpose is Purpose.TRAIN and ticket.state in _IS_OPEN:
                self.num_partial += len(ticket.samples)
        for (purpose, state, _), count in ended.items():
            self._counts[purpose][state] += count

    def issue(
        self,
        purpose: Purpose,
        prompt: Prompt,
        *,
        num_samples: int,
        num_greedy: int = 0,
        eval_id: int = 0,
        eval_set: str = "",
        max_staleness: int = 0,
    ) -> Ticket:
        """A new ticket, QUEUED. `num_greedy` of its `num_samples` are greedy."""
        self.num_issued += 1
        ticket = Ticket(
            ticket_id=self._shard.number(self.num_issued),
            purpose=purpose,
            prompt_index=prompt.index,
            num_samples=num_samples,
            num_greedy=num_greedy,
            parent=prompt.parent,
            num_reissues=prompt.num_reissues,
            eval_id=eval_id,
            eval_set=eval_set,
            max_staleness=max_staleness,
            unleased=set(range(num_samples)),
        )
        self.live[ticket.ticket_id] = ticket
        self._counts[purpose][ticket.state] += 1
        self._is_checked = False
        self._store.put_ticket(ticket)
        return ticket

    def issue_position(self, parts: Sequence[tuple[Ticket, int]], *, max_staleness: int) -> Ticket:
        """A new ticket for samples of closed groups, READY to be recorded at one position."""
        ticket = self.issue(
            Purpose.TRAIN, Prompt(index=-1), num_samples=len(parts), max_staleness=max_staleness
        )
        ticket.set_parts(parts)
        self._store.put_parts(ticket)
        self.move(ticket, State.READY)
        return ticket

    def has_issued(self, ticket_id: int) -> bool:
        return self._shard.owns(ticket_id) and 0 < self._shard.local(ticket_id) <= self.num_issued

    def of_purpose(self, purpose: Purpose) -> list[Ticket]:
        """Live tickets of a purpose, in order of issue."""
        return [ticket for ticket in self.live.values() if ticket.purpose is purpose]

    def add_sample(self, ticket: Ticket, sample_index: int, sample: SampleSummary) -> None:
        ticket.add_sample(sample_index, sample)
        if ticket.purpose is Purpose.TRAIN and ticket.state in _IS_OPEN:
            self.num_partial += 1

    def move(self, ticket: Ticket, state: State) -> None:
        """Changes a ticket's state (or writes its row again if only its leases changed)."""
        counts = self._counts[ticket.purpose]
        counts[ticket.state] -= 1
        counts[state] += 1
        self._is_checked = False
        before, ticket.state = ticket.state, state
        if ticket.purpose is Purpose.TRAIN and before in _IS_OPEN and state not in _IS_OPEN:
            self.num_partial -= 0 if ticket.parts else len(ticket.samples)
        if self.on_move is not None:
            self.on_move(ticket, before, state)
        if state.is_terminal:
            del self.live[ticket.ticket_id]
        self._store.put_ticket(ticket)

    def reopen(self, tickets: Sequence[Ticket]) -> None:
        """Makes TRAINED tickets BATCHED again, because a trainer repeats their steps."""
        if tickets:
            reopened = ((ticket.ticket_id, ticket) for ticket in tickets)
            self.live = dict(sorted([*self.live.items(), *reopened]))
        for ticket in tickets:
            self.move(ticket, State.BATCHED)

    def count(self, purpose: Purpose, *states: State) -> int:
        """Number of tickets of a purpose in any of these states."""
        counts = self._counts[purpose]
        return sum([counts[state] for state in states])

    def num_by_state(self) -> dict[State, int]:
        """Number of tickets in each state, over both purposes."""
        return {state: sum(counts[state] for counts in self._counts.values()) for state in State}

    def check_conservation(self) -> None:
        """Asserts that every issued ticket is in exactly one state. Constant time."""
        if self._is_checked:
            return
        train, evals = self._counts[Purpose.TRAIN], self._counts[Purpose.EVAL]
        num_counted = sum(train.values()) + sum(evals.values())
        num_live = num_counted - sum([train[state] + evals[state] for state in TERMINAL])
        assert num_counted == self.num_issued, (
            f"tickets are lost: {self.num_issued} issued, {self.num_by_state()}"
        )
        assert num_live == len(self.live), f"{len(self.live)} tickets in memory, {num_live} counted live"
        self._is_checked = True
