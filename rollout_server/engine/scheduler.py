"""Continuous batching: which sequence runs in which row of the batch. No tensors, threads or clocks.

    submit -> WAITING -> admit -> RUNNING -> finish -> FINISHED
                 ^                   |
                 +----- preempt -----+        abort: WAITING or RUNNING -> FINISHED

A row is a sequence's slot in the KV cache and its index in the batch. Rows stay dense, because the model
works on rows 0..n-1 without gathering: a freed row goes to the next sequence that is admitted, and remaining
holes (free rows below an occupied one) are closed by moving the last rows down. So there is no hole after
`admit`. Admission is first come, first served; preempted sequences return to the front of the queue in their
old order.

A preempted sequence keeps its tokens. Its prompt and output are its context, and admitting it again computes
the KV of that context under the weights that are active then. Preemption, KV recomputation after a weight
update and first admission are therefore one mechanism.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from numpy.typing import NDArray

from areal_like.trajectory import FinishReason


class Status(Enum):
    """State of a sequence. Every submitted sequence is in exactly one of these."""

    WAITING = "waiting"
    """In the queue; holds no row."""
    RUNNING = "running"
    """Holds a row; gains one token per step."""
    FINISHED = "finished"
    """Ended; no longer in the scheduler."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Checked sampling parameters of one sequence (names and meanings are SGLang's)."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    """All tokens that end the sequence, the model's end-of-sequence tokens included unless the request sets
    `ignore_eos`."""
    sampling_seed: int | None = None
    stream_interval: int = 0
    """Tokens between two chunks of a stream; 0: the engine's default."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The reason why a sequence ended."""

    reason: FinishReason
    matched: int | None = None
    """The stop token that was sampled, where the reason is STOP."""
    message: str = ""
    is_error: bool = False
    """True if the engine aborted the sequence because of an error (logits that are not finite)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedVersion:
    """The weights with which the engine samples: those of one update, or the base with one adapter."""

    version: str
    """Version as the trainer numbers it."""
    serial: int
    """Distinguishes KV computed under these weights from all other KV; grows from update to update."""
    slot: int
    """Slot of the adapter in `AdapterSlots`; -1 without one."""


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One sample of one prompt, and its output so far."""

    seq_id: str
    """Unique among the sequences in the engine."""
    rid: str = ""
    """Id of the request; shared by its samples."""
    prompt: tuple[int, ...]
    params: SamplingParams
    rng_key: int = 0
    """uint64; key and token index together determine the random number with which the token is drawn."""
    stream_interval: int = 0
    """Tokens between two reports of partial output; 0: only the finished sequence is reported."""
    keeps_prefix: bool = False
    """True if a later request may continue this sequence (the next turn of a conversation)."""
    owner: Any = None
    """The HTTP request (OpenRequest). The engine only passes it along."""
    sample_index: int = 0
    """Index among the samples of its prompt in the request, which share a seed."""
    return_logprob: bool = False
    """True if the response includes log-probs."""
    return_routes: bool = False
    """True if the response includes the routes of all tokens but the last, where the engine records them."""
    status: Status = Status.WAITING
    row: int = -1
    """-1 while not RUNNING."""
    served: ServedVersion | None = None
    """The weights that sample its next token; None until it gets its first row."""
    output_ids: list[int] = field(default_factory=list)
    """Sampled tokens; updated only when the sequence leaves its row or is reported."""
    output_logprobs: list[float] = field(default_factory=list)
    version_spans: list[tuple[str, int, int]] = field(default_factory=list)
    """(version, start, end) over the output: the weight version that sampled these tokens."""
    routes_TLK: NDArray[Any] | None = None
    """[tokens, layers, experts] chosen for each token that went through the model, in its first pass;
    updated only when the sequence leaves its row."""
    finish: Finish | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV did not have to be computed for this sequence."""
    made_s: float = field(default_factory=time.perf_counter)
    """When the request arrived."""

    @property
    def context(self) -> tuple[int, ...]:
        """Prompt and output so far; valid while not RUNNING."""
        return (*self.prompt, *self.output_ids) if self.output_ids else self.prompt


@dataclass(frozen=True)
class Move:
    """An instruction to copy row `source` over row `target`."""

    source: int
    target: int


class Scheduler:
    """The queue and the rows.

    Methods change the state at once and return what the caller must do to its arrays.
    """

    def __init__(self, *, num_rows: int, max_prefill_tokens: int) -> None:
        assert num_rows >= 1 and max_prefill_tokens >= 1, "the engine needs a row and room to prefill"
        self.num_rows = num_rows
        self.max_prefill_tokens = max_prefill_tokens
        """Maximum number of context tokens to compute in one call of `admit`, so that a long queue does not
        stall the running sequences. The first admitted sequence may exceed it; otherwise a long one would
        wait forever."""
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
        """Rows that no sequence holds."""
        return self.num_rows - self.num_running

    @property
    def runnable(self) -> bool:
        """True if there are sequences and generation is not paused."""
        return bool(self.by_id) and not self.paused

    def submit(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue. Its id must not be in use."""
        assert sequence.seq_id not in self.by_id, f"sequence id {sequence.seq_id} is in use"
        assert sequence.status is Status.WAITING and sequence.row == -1, f"{sequence.seq_id} is not new"
        self.by_id[sequence.seq_id] = sequence
        self.waiting.append(sequence)

    def admit(self, *, num_to_compute: Callable[[Sequence], int]) -> tuple[list[Sequence], list[Move]]:
        """Gives rows to waiting sequences, holes first, then closes the holes that remain.

        `num_to_compute`: tokens of a sequence's context whose KV is not in a cache. A context that several
        sequences share counts once. Returns the admitted sequences and the moves that close holes. Once the
        caller has made the moves, in order, rows 0..num_running-1 are occupied.
        """
        admitted: list[Sequence] = []
        holes = [row for row, sequence in enumerate(self.rows) if sequence is None]
        budget = self.max_prefill_tokens
        to_compute: set[tuple[int, ...]] = set()
        while self.waiting and (holes or len(self.rows) < self.num_rows):
            sequence = self.waiting[0]
            context = sequence.context
            if context not in to_compute and (num_tokens := num_to_compute(sequence)):
                if num_tokens > budget and to_compute:
                    break
                budget -= num_tokens
                to_compute.add(context)
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
        """Moves the last rows into the holes, lowest hole first."""
        moves = []
        for target in holes:
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if target >= len(self.rows):
                break
            sequence = self.rows.pop()
            assert sequence is not None, "empty rows at the end were dropped above"
            moves.append(Move(sequence.row, target))
            sequence.row = target
            self.rows[target] = sequence
        return moves

    def upcoming(self, limit: int) -> Iterator[Sequence]:
        """The next `limit` sequences in the queue."""
        return itertools.islice(self.waiting, limit)

    def finish(self, sequence: Sequence, finish: Finish) -> None:
        """Ends a waiting or running sequence and frees its row."""
        assert sequence.status is not Status.FINISHED, f"{sequence.seq_id} has ended already"
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self._free_row_of(sequence)
        sequence.status = Status.FINISHED
        sequence.finish = finish
        del self.by_id[sequence.seq_id]

    def preempt_all(self) -> None:
        """Sends every running sequence back to the front of the queue, in order of rows."""
        running = [sequence for sequence in self.rows if sequence is not None]
        for sequence in reversed(running):
            self._free_row_of(sequence)
            sequence.status = Status.WAITING
            self.waiting.appendleft(sequence)

    def _free_row_of(self, sequence: Sequence) -> None:
        assert self.rows[sequence.row] is sequence, f"{sequence.seq_id} does not hold row {sequence.row}"
        self.rows[sequence.row] = None
        sequence.row = -1
        while self.rows and self.rows[-1] is None:
            self.rows.pop()

    def check(self) -> None:
        """Asserts that free and held rows add up to all rows, and that each sequence is in one place."""
        running = [sequence for sequence in self.rows if sequence is not None]
        assert self.num_free + len(running) == self.num_rows and self.num_free >= 0
        assert all(
            sequence.status is Status.RUNNING and self.rows[sequence.row] is sequence for sequence in running
        )
        assert all(sequence.status is Status.WAITING and sequence.row == -1 for sequence in self.waiting)
        ids = [sequence.seq_id for sequence in (*running, *self.waiting)]
        assert len(ids) == len(set(ids)) == len(self.by_id)
        assert all(self.by_id[sequence.seq_id] is sequence for sequence in (*running, *self.waiting))
