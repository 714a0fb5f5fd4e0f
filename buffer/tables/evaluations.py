"""Held-out evaluations: rounds of greedy one-sample tickets, leased before train tickets."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from areal_like.wire.messages.consumer import EvalResult
from buffer.tickets import SampleSummary, Ticket

_NUM_DONE_KEPT = 4
"""Finished evaluations whose result can still be requested."""


class EvalRound:
    """One evaluation.

    OPEN -> (every ticket evaluated or failed) -> DONE, kept so that a repeated request gets the result.
    """

    def __init__(self, *, eval_id: int, num_prompts: int, min_version: int) -> None:
        self.eval_id = eval_id
        self.num_prompts = num_prompts
        self.min_version = min_version
        self.queue: deque[int] = deque()
        """Ids of tickets that are under no lease."""
        self.num_failed = 0
        self._num_evaluated = 0
        self._sum_reward = 0.0
        self._sum_tokens = 0
        self._versions: tuple[int, int] | None = None

    def add(self, sample: SampleSummary) -> None:
        """Counts an evaluated prompt."""
        self._num_evaluated += 1
        self._sum_reward += sample.reward
        self._sum_tokens += sample.num_sampled
        oldest, newest = self._versions or (sample.oldest_version, sample.newest_version)
        self._versions = (min(oldest, sample.oldest_version), max(newest, sample.newest_version))

    @property
    def is_done(self) -> bool:
        """True if every prompt was evaluated or has failed."""
        return self._num_evaluated + self.num_failed == self.num_prompts

    def result(self) -> EvalResult:
        """Mean reward over all prompts, of which a failed one counts 0, and tokens of evaluated ones."""
        count = max(1, self._num_evaluated)
        oldest, newest = self._versions or (self.min_version, self.min_version)
        return EvalResult(
            eval_id=self.eval_id,
            num_evaluated=self._num_evaluated,
            num_failed=self.num_failed,
            mean_reward=self._sum_reward / max(1, self._num_evaluated + self.num_failed),
            mean_tokens=self._sum_tokens / count,
            oldest_version=oldest,
            newest_version=newest,
        )


class EvalTable:
    """Rounds by eval id, in the order of their requests.

    Not stored: a restarted buffer cancels the tickets of all rounds.
    """

    def __init__(self) -> None:
        self.rounds: dict[int, EvalRound] = {}

    def begin(self, round_: EvalRound, tickets: Sequence[Ticket]) -> None:
        """Adds a round, and deletes the oldest finished ones."""
        self.rounds[round_.eval_id] = round_
        round_.queue.extend(ticket.ticket_id for ticket in tickets)
        done = [eval_id for eval_id, round_ in self.rounds.items() if round_.is_done]
        for eval_id in done[:-_NUM_DONE_KEPT]:
            del self.rounds[eval_id]

    def clear(self) -> None:
        """Deletes all rounds: the trainer that requested them has been replaced."""
        self.rounds.clear()

    @property
    def has_queued(self) -> bool:
        """True if a ticket of any round waits for a lease."""
        return any(round_.queue for round_ in self.rounds.values())

    def peek_next(self, weights_version: int) -> int | None:
        """Id of the ticket that `take_next` would return."""
        for round_ in self.rounds.values():
            if round_.queue and weights_version >= round_.min_version:
                return round_.queue[0]
        return None

    def take_next(self, weights_version: int) -> int | None:
        """Id of the next ticket for a server with weights of this version, if there is one."""
        for round_ in self.rounds.values():
            if round_.queue and weights_version >= round_.min_version:
                return round_.queue.popleft()
        return None

    def requeue(self, ticket: Ticket) -> None:
        """The sample of the ticket has to be leased again, before other tickets of its round."""
        self.rounds[ticket.eval_id].queue.appendleft(ticket.ticket_id)

    def add(self, ticket: Ticket, sample: SampleSummary) -> None:
        """Counts an evaluated ticket."""
        self.rounds[ticket.eval_id].add(sample)

    def add_failure(self, ticket: Ticket) -> None:
        """Counts a dropped ticket. Tickets of an earlier buffer's rounds are ignored."""
        if ticket.eval_id in self.rounds:
            self.rounds[ticket.eval_id].num_failed += 1
