"""Which sequence runs in which row of the batch: a pure state machine without tensors, threads or clocks.

    submit -> WAITING -> admit -> RUNNING -> finish -> FINISHED
                 ^                   |
                 +----- retract -----+        abort: WAITING or RUNNING -> FINISHED

Rows stay dense: the model works on rows 0..n-1 without gathering, so a row that was left is given to the next sequence that is
admitted, and what is then still empty is closed by moving the last rows down. Waiting is first come, first served; what was
retracted goes back to the front in its old order. A hole never outlives `admit`.

A sequence that gives way keeps its tokens: prompt and output so far are its context, and admitting it again means
computing the KV of that context under whatever weights are active. That one mechanism is `retract`, `recompute` and admission alike.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from areal_like.trajectory import FinishReason


class Status(Enum):
    """Where a sequence is. Every submitted sequence is in exactly one of these."""

    WAITING = "waiting"
    """In the queue; holds no row."""
    RUNNING = "running"
    """Holds a row; gains one token a step."""
    FINISHED = "finished"
    """Ended; the scheduler has forgotten it."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Checked sampling parameters of one sequence (names and meanings are SGLang's)."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    """All tokens that end the sequence, the model's own end-of-sequence tokens included unless they are to be ignored."""
    sampling_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Why a sequence ended."""

    reason: FinishReason
    matched: int | None = None
    """The stop token."""
    message: str = ""
    is_error: bool = False
    """The engine's fault (non-finite logits), not a request."""


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One continuation being sampled."""

    seq_id: str
    """Unique among those in the engine."""
    rid: str = ""
    """Id of the request it belongs to; shared by the samples of one."""
    prompt: tuple[int, ...]
    params: SamplingParams
    noise_key: int = 0
    """Seed of this sequence's random numbers (uint64): together with a token's index it decides the token's draw."""
    stream_interval: int = 0
    """Report partial output every so many tokens; 0: only the end."""
    owner: Any = None
    """Whoever waits for it; opaque to the engine."""
    status: Status = Status.WAITING
    row: int = -1
    output_ids: list[int] = field(default_factory=list)
    """Sampled tokens, brought up to date when the sequence leaves its row or is reported."""
    output_logprobs: list[float] = field(default_factory=list)
    version_spans: list[tuple[str, int, int]] = field(default_factory=list)
    """(version, start, end) over the output: which weights sampled which tokens."""
    finish: Finish | None = None

    @property
    def context(self) -> tuple[int, ...]:
        """Prompt and output so far; valid while not RUNNING."""
        return (*self.prompt, *self.output_ids) if self.output_ids else self.prompt


@dataclass(frozen=True)
class Move:
    """Row `source` is to be copied over row `target`."""

    source: int
    target: int


class Scheduler:
    """Queue and rows. Methods change the state at once and tell what the caller has to do to its arrays."""

    def __init__(self, *, num_rows: int, max_prefill_tokens: int) -> None:
        assert num_rows >= 1 and max_prefill_tokens >= 1
        self.num_rows = num_rows
        self.max_prefill_tokens = max_prefill_tokens
        """Context tokens to compute in one admission, so that a long queue cannot stall those who run; one sequence always may."""
        self.paused = False
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence | None] = []
        self.by_id: dict[str, Sequence] = {}

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self.by_id) - len(self.waiting)

    @property
    def num_free(self) -> int:
        """Rows that nobody holds."""
        return self.num_rows - self.num_running

    @property
    def runnable(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.by_id) and not self.paused

    def submit(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue. Its id must not be in use."""
        assert sequence.seq_id not in self.by_id, f"sequence id {sequence.seq_id} is in use"
        assert sequence.status is Status.WAITING and sequence.row == -1
        self.by_id[sequence.seq_id] = sequence
        self.waiting.append(sequence)

    def admit(self, *, is_cached: Callable[[tuple[int, ...]], bool]) -> tuple[list[Sequence], list[Move]]:
        """Gives rows to waiting sequences, holes first, then closes what holes are left.

        `is_cached`: whether a context costs nothing to bring in. A context that several bring in together is paid for once.
        Returns the admitted, and the moves that close holes (to be done in order, after which rows 0..num_running-1 are dense).
        """
        admitted: list[Sequence] = []
        holes = [row for row, sequence in enumerate(self.rows) if sequence is None]
        budget = self.max_prefill_tokens
        paid: set[tuple[int, ...]] = set()
        while self.waiting and (holes or len(self.rows) < self.num_rows):
            sequence = self.waiting[0]
            context = sequence.context
            if context not in paid and not is_cached(context):
                if len(context) > budget and paid:
                    break
                budget -= len(context)
                paid.add(context)
            self.waiting.popleft()
            if holes:
                sequence.row = holes.pop(0)
                self.rows[sequence.row] = sequence
            else:
                sequence.row = len(self.rows)
                self.rows.append(sequence)
            sequence.status = Status.RUNNING
            admitted.append(sequence)
        return admitted, self._close(holes)

    def _close(self, holes: list[int]) -> list[Move]:
        moves = []
        for target in holes:
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if target >= len(self.rows):
                break
            sequence = self.rows.pop()
            assert sequence is not None
            moves.append(Move(sequence.row, target))
            sequence.row = target
            self.rows[target] = sequence
        return moves

    def upcoming(self, limit: int) -> list[Sequence]:
        """The next `limit` sequences in the queue."""
        return list(itertools.islice(self.waiting, limit))

    def finish(self, sequence: Sequence, finish: Finish) -> None:
        """Ends a sequence wherever it is, and frees its row."""
        assert sequence.status is not Status.FINISHED
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self._leave_row(sequence)
        sequence.status = Status.FINISHED
        sequence.finish = finish
        del self.by_id[sequence.seq_id]

    def retract_all(self) -> None:
        """Sends every running sequence back to the front of the queue, in order of rows."""
        running = [sequence for sequence in self.rows if sequence is not None]
        for sequence in reversed(running):
            self._leave_row(sequence)
            sequence.status = Status.WAITING
            self.waiting.appendleft(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        assert self.rows[sequence.row] is sequence
        self.rows[sequence.row] = None
        sequence.row = -1
        while self.rows and self.rows[-1] is None:
            self.rows.pop()

    def check(self) -> None:
        """The conservation law: free and held rows make up all rows, and every sequence is in exactly one place."""
        running = [sequence for sequence in self.rows if sequence is not None]
        assert self.num_free + len(running) == self.num_rows and self.num_free >= 0
        assert all(
            sequence.status is Status.RUNNING and self.rows[sequence.row] is sequence for sequence in running
        )
        assert all(sequence.status is Status.WAITING and sequence.row == -1 for sequence in self.waiting)
        ids = [sequence.seq_id for sequence in (*running, *self.waiting)]
        assert len(ids) == len(set(ids)) == len(self.by_id)
        assert all(self.by_id[sequence.seq_id] is sequence for sequence in (*running, *self.waiting))
