"""Evaluations: rounds of tickets for the held-out prompts of one set, leased before train tickets.

    requested -> RUNNING -> every ticket evaluated or dropped -> DONE -> `eval.keep` newer ones -> RELEASED
                    `-> the trainer was replaced -> CANCELLED

A round is identified by its first ticket, because a trainer that resumes from an earlier checkpoint reuses
evaluation ids. Rounds and tickets are in the store: a restarted buffer continues a running round without
repeating its finished samples, and still has the results of finished rounds whose samples are kept.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from areal_like.config.evaluation import MAX_EVAL_PROMPTS, MAX_EVAL_SAMPLES, SET_NAME
from areal_like.errors import RefusedError
from areal_like.trajectory import LARGEST_REWARD
from areal_like.wire.messages.evaluation import EvalResult, SampleOutcome
from buffer.storage.base import EvaluationRow, Store
from buffer.tickets import State, Ticket

RUNNING, DONE, RELEASED, CANCELLED = "running", "done", "released", "cancelled"
_NUM_RESULTS_KEPT = 4
"""Number of newest finished evaluations of a set whose result can be requested again, regardless of
`eval.keep`."""


class EvalRound:
    """One evaluation of one set: its tickets, and a queue of those that must be leased."""

    def __init__(self, row: EvaluationRow, tickets: Iterable[Ticket]) -> None:
        """`tickets`: for a new round, all of its tickets; for a round restored from an earlier buffer, those
        that were not dropped."""
        self.row = row
        self.tickets = {ticket.ticket_id: ticket for ticket in tickets}
        """The round's tickets without those that were dropped, whose samples have all failed."""
        self.num_open = sum(not ticket.state.is_terminal for ticket in self.tickets.values())
        """Number of tickets that have not ended."""
        self.waiting: OrderedDict[int, None] = OrderedDict.fromkeys(
            ticket.ticket_id for ticket in self.tickets.values() if ticket.unleased
        )
        """Ids of the tickets to lease, the next one first."""

    @property
    def key(self) -> tuple[int, str]:
        """(id of the evaluation, name of the set), as a trainer requests it."""
        return self.row.eval_id, self.row.eval_set

    @property
    def is_done(self) -> bool:
        """True if every prompt was evaluated or has failed."""
        return self.num_open == 0

    def end(self, ticket: Ticket) -> None:
        """Counts a ticket that was evaluated or dropped."""
        self.num_open -= 1
        if ticket.state is State.DROPPED:
            del self.tickets[ticket.ticket_id]

    def result(self, step_of: Callable[[int], int]) -> EvalResult:
        """The numbers of every sample; `step_of`: optimizer step of a weights version."""
        num_samples = self.row.num_samples
        size = self.row.num_prompts * num_samples
        rewards, tokens = np.zeros(size), np.zeros(size, np.int32)
        outcomes = np.full(size, int(SampleOutcome.MISSING), np.uint8)
        versions: list[int] = []
        for ticket in self.tickets.values():
            for index, sample in ticket.samples.items():
                at = ticket.prompt_index * num_samples + index
                rewards[at] = min(max(sample.reward, -LARGEST_REWARD), LARGEST_REWARD)
                tokens[at] = min(sample.num_sampled, np.iinfo(np.int32).max)
                failed = SampleOutcome.FAILED if sample.failure else SampleOutcome(0)
                outcomes[at] = failed | (SampleOutcome.TRUNCATED if sample.is_truncated else 0)
                versions += (sample.oldest_version, sample.newest_version)
        oldest, newest = min(versions, default=-1), max(versions, default=-1)
        return EvalResult(
            eval_id=self.row.eval_id,
            eval_set=self.row.eval_set,
            num_samples=num_samples,
            rewards=rewards,
            tokens=tokens,
            outcomes=outcomes,
            oldest_version=oldest,
            newest_version=newest,
            oldest_step=step_of(oldest) if versions else -1,
            newest_step=step_of(newest) if versions else -1,
        )


class EvalTable:
    """Rounds in the order of their requests, and the finished ones whose samples are kept."""

    def __init__(self, store: Store, *, keep: int) -> None:
        """`keep`: finished rounds of each set whose samples are kept."""
        self._store = store
        self._keep = keep
        self.rounds: dict[tuple[int, str], EvalRound] = {}
        """Rounds whose result can be requested, running or finished."""
        self._round_of: dict[int, EvalRound] = {}
        """Ticket id -> running round."""
        self._kept: dict[str, deque[EvalRound]] = {}
        """Finished rounds with samples by set, the oldest first."""

    def begin(self, row: EvaluationRow, tickets: Iterable[Ticket]) -> None:
        """Adds a running round: a new one, or one restored from an earlier buffer."""
        self._store.put_row(row)
        round_ = EvalRound(row, tickets)
        # One of an earlier trainer has another place in the order.
        self.rounds.pop(round_.key, None)
        self.rounds[round_.key] = round_
        self._round_of |= dict.fromkeys(round_.tickets, round_)
        self._end_if_done(round_)

    def restore_finished(self, row: EvaluationRow, tickets: Iterable[Ticket]) -> None:
        """Adds a finished round restored from an earlier buffer, which kept its samples."""
        round_ = EvalRound(row, tickets)
        self.rounds[round_.key] = round_
        self._keep_samples(round_)

    def requested(self, key: tuple[int, str], *, size: tuple[int, int], min_version: int) -> EvalRound | None:
        """The round of this request, which may be a retry; None if the round has to be started.

        `size`: (prompts, samples of each). A finished round with other fields is not returned again.
        """
        round_ = self.rounds.get(key)
        if round_ is None or not round_.is_done:
            return round_
        row = round_.row
        if (row.num_prompts, row.num_samples, row.min_version) == (*size, min_version):
            return round_
        del self.rounds[key]
        return None

    def cancel(self, is_over: Callable[[EvaluationRow], bool]) -> list[Ticket]:
        """Cancels the running rounds for which `is_over` is true.

        Returns their tickets that have not ended, which the caller drops.
        """
        left = []
        for round_ in [one for one in self.rounds.values() if not one.is_done and is_over(one.row)]:
            self._store.put_row(dataclasses.replace(round_.row, state=CANCELLED))
            del self.rounds[round_.key]
            for ticket in round_.tickets.values():
                if ticket.state is State.EVALUATED:
                    self._store.release(ticket)
                else:
                    del self._round_of[ticket.ticket_id]
                    left.append(ticket)
        return left

    def forget_results(self) -> None:
        """A new trainer requests its own evaluations; samples of finished ones are kept as before."""
        assert all(round_.is_done for round_ in self.rounds.values())
        self.rounds.clear()

    def __contains__(self, ticket: Ticket) -> bool:
        """True if the ticket belongs to a running round."""
        return ticket.ticket_id in self._round_of

    @property
    def num_open(self) -> int:
        """Number of tickets of all rounds that have not ended."""
        return sum(round_.num_open for round_ in self.rounds.values())

    def peek_next(self, weights_version: int) -> int | None:
        """Id of the ticket that `take_next` would return."""
        round_ = self._next_round(weights_version)
        return None if round_ is None else next(iter(round_.waiting))

    def take_next(self, weights_version: int) -> int | None:
        """Id of the next ticket for a server with weights of this version, if there is one."""
        round_ = self._next_round(weights_version)
        return None if round_ is None else round_.waiting.popitem(last=False)[0]

    def requeue(self, ticket: Ticket) -> None:
        """Puts the ticket back at the front of the queue, because some of its samples must be leased
        again."""
        waiting = self._round_of[ticket.ticket_id].waiting
        if ticket.ticket_id not in waiting:
            waiting[ticket.ticket_id] = None
            waiting.move_to_end(ticket.ticket_id, last=False)

    def end(self, ticket: Ticket) -> None:
        """Counts a ticket that was evaluated or dropped; tickets of cancelled rounds are ignored."""
        if (round_ := self._round_of.pop(ticket.ticket_id, None)) is not None:
            round_.end(ticket)
            self._end_if_done(round_)

    def _next_round(self, weights_version: int) -> EvalRound | None:
        for round_ in self.rounds.values():
            if round_.waiting and weights_version >= round_.row.min_version:
                return round_
        return None

    def _end_if_done(self, round_: EvalRound) -> None:
        if round_.is_done:
            round_.row = dataclasses.replace(round_.row, state=DONE)
            self._store.put_row(round_.row)
            self._keep_samples(round_)
            of_set = [key for key, one in self.rounds.items() if one.is_done and key[1] == round_.key[1]]
            for key in of_set[:-_NUM_RESULTS_KEPT]:
                del self.rounds[key]

    def _keep_samples(self, round_: EvalRound) -> None:
        """Releases the samples of the set's older rounds, or those of this one if none are kept."""
        kept = self._kept.setdefault(round_.row.eval_set, deque())
        kept.append(round_)
        while len(kept) > self._keep:
            old = kept.popleft()
            self._store.put_row(dataclasses.replace(old.row, state=RELEASED))
            for ticket in old.tickets.values():
                self._store.release(ticket)


def check_request(eval_set: str, *, num_prompts: int, num_samples: int) -> None:
    """Raises RefusedError if an evaluation is empty or too large, or the name of its set is not valid."""
    if not SET_NAME.fullmatch(eval_set):
        raise RefusedError("eval_set", "is not the name of an evaluation set")
    if not 1 <= num_prompts <= MAX_EVAL_PROMPTS:
        raise RefusedError("num_prompts", f"want 1..{MAX_EVAL_PROMPTS}, got {num_prompts}")
    if num_samples < 1 or num_prompts * num_samples > MAX_EVAL_SAMPLES:
        raise RefusedError(
            "num_samples", f"want at least 1, and at most {MAX_EVAL_SAMPLES} in all, got {num_samples}"
        )


def tickets_of(row: EvaluationRow, tickets: Mapping[int, Ticket], *, num_shards: int) -> list[Ticket]:
    """The tickets of a round among those with these ids, in the order of their prompts."""
    ids = range(row.first_ticket, row.first_ticket + row.num_prompts * num_shards, num_shards)
    return [tickets[ticket_id] for ticket_id in ids if ticket_id in tickets]
