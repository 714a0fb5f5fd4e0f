"""Prompts of leases, made by a task's code in a thread: it is slow for some data sets, and the loop must not wait for it.

    lease: waiting -> its turn in the thread -> prompt | why there is none
                                             -> too long: its thread is left behind, and those after it go on in a new one
                   -> cancelled: passed over

One thread, so that a task need not bear several at a time. The loop looks at it every few milliseconds rather than being called for each
prompt: prompts that were quick are handed over in one turn, and the limit of the one that is being made needs no timer of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from areal_like.wire.messages.producer import Lease, Purpose
from rollout_server.episodes.base import Tokenizer
from rollout_server.tasks.base import Example, Split, Task

SPLITS: dict[Purpose, Split] = {Purpose.TRAIN: "train", Purpose.EVAL: "eval"}
Prompt = tuple[Example, NDArray[np.int32]]

_LOOK_S = 0.01


@dataclass(kw_only=True, slots=True)
class _Run:
    """What thread and loop share: the thread writes, but for `is_left`."""

    leases: list[Lease]
    is_wanted: Callable[[Lease], bool]
    prompts: list[Prompt | str] = field(default_factory=list)
    at: tuple[int, float]
    """The lease whose turn it is, and since when: one object, so that no reader sees half of a step."""
    is_left: bool = False


class Examples:
    """The examples' thread. One event loop, one `prepare` at a time."""

    def __init__(self, task: Task, tokenizer: Tokenizer, *, timeout_s: float) -> None:
        """`timeout_s` is the limit of each example by itself, from when its turn comes."""
        self._task = task
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s
        self._thread = _thread()

    async def prepare(
        self,
        leases: list[Lease],
        *,
        is_wanted: Callable[[Lease], bool],
        on_prompt: Callable[[Lease, Prompt | str], None],
    ) -> None:
        """Calls `on_prompt` for each lease in order, as soon as it is known, with its prompt or why there is none.

        `is_wanted` is asked in the thread when a lease's turn comes; one that is not gets no prompt.
        """
        while leases:
            num_known = await self._run(
                _Run(leases=leases, is_wanted=is_wanted, at=(0, time.monotonic())), on_prompt
            )
            if num_known < len(leases):
                self._leave_thread()
                on_prompt(
                    leases[num_known],
                    f"task.example() took longer than rollout.reward_timeout_s={self._timeout_s:g}",
                )
            leases = leases[num_known + 1 :]

    def close(self) -> None:
        """Waits for nothing: an example may hang."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, run: _Run, on_prompt: Callable[[Lease, Prompt | str], None]) -> int:
        """How many leases got an answer before one took too long."""
        made = asyncio.get_running_loop().run_in_executor(self._thread, self._make, run)
        num_known = 0
        try:
            while num_known < len(run.leases):
                await asyncio.wait({made}, timeout=_LOOK_S)
                if made.done():
                    made.result()
                index, began_s = run.at
                for prompt in run.prompts[num_known:]:
                    on_prompt(run.leases[num_known], prompt)
                    num_known += 1
                if index == num_known and time.monotonic() - began_s > self._timeout_s:
                    break
        finally:
            run.is_left = True
            made.cancel()
        return num_known

    def _make(self, run: _Run) -> None:
        for index, lease in enumerate(run.leases):
            if run.is_left:  # one that ends after all must not make the rest beside the thread that took over
                return
            run.at = (index, time.monotonic())
            wanted = run.is_wanted(lease)
            run.prompts.append(
                self._prompt(SPLITS[lease.purpose], lease.prompt_index) if wanted else "cancelled"
            )

    def _prompt(self, split: Split, index: int) -> Prompt | str:
        """The prompt of an example, or why there is none. Runs in the thread."""
        try:
            example = self._task.example(split, index)
            return example, self._tokenizer.encode(example)
        except Exception as error:  # a researcher's code may raise anything, and the promise is that only its own samples fail
            return f"example({split!r}, {index}): {type(error).__name__}: {error}"

    def _leave_thread(self) -> None:
        self._thread.shutdown(wait=False)
        self._thread = _thread()


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="examples")
