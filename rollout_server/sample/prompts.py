"""Loads the prompts of leases in a thread, and lets one sample of a group compute a long prompt first.

A thread is needed because some tasks are slow and must not block the event loop.

    lease: waiting -> being loaded -> LoadedPrompt | Failure
                                   -> took too long: Failure; the thread is replaced
                   -> cancelled: skipped

There is only one thread, so that a task need not be thread-safe. The thread does not notify the event loop of
each prompt; the loop polls it every 10 ms. So prompts that load quickly are handed over in one turn of the
loop, and the time limit of an example needs no separate timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import RAISED_BY_TASKS
from areal_like.failures import FailureKind
from areal_like.wire.messages.producer import Lease, Purpose
from rollout_server.sources import SampleSources
from rollout_server.tasks.base import Example, Split

SPLITS: dict[Purpose, Split] = {Purpose.TRAIN: "train", Purpose.EVAL: "eval"}
_POLL_S = 0.01
LONG_PROMPT_TOKENS = 512
"""Prompts of at least this many tokens are computed by a leader first."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedPrompt:
    """An example and its token ids."""

    example: Example
    tokens_P: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The reason why there is no prompt or no sample."""

    reason: str
    kind: FailureKind = FailureKind.ENVIRONMENT
    """For a prompt: PROMPT if it cannot be used; ENVIRONMENT if the task failed to make one."""
    is_of_policy: bool = True
    """False if the policy did not cause it, so that its tokens are not trained on with reward 0."""


@dataclass(kw_only=True, slots=True)
class _Batch:
    """State shared by the thread and the event loop. Only `is_abandoned` is written by the event loop."""

    leases: list[Lease]
    is_wanted: Callable[[Lease], bool]
    prompts: list[LoadedPrompt | Failure] = field(default_factory=list)
    current: tuple[int, float]
    """Index of the lease being loaded, and when that started: one tuple, so that both are replaced
    atomically."""
    is_abandoned: bool = False


class PromptLoader:
    """Loads prompts in a thread. Belongs to one event loop; one `load` at a time."""

    def __init__(self, sources: SampleSources, *, timeout_s: float) -> None:
        """`timeout_s`: time limit of each example, from the start of its loading."""
        self._sources = sources
        self._timeout_s = timeout_s
        self._clock = asyncio.get_running_loop().time
        self._thread = _new_thread()

    async def load(
        self,
        leases: list[Lease],
        *,
        is_wanted: Callable[[Lease], bool],
        on_prompt: Callable[[Lease, LoadedPrompt | Failure], None],
    ) -> None:
        """Calls `on_prompt` for each lease in order, as soon as its prompt is loaded or has failed.

        `is_wanted` is called in the thread before a prompt is loaded; if it returns False, the prompt is
        skipped and `on_prompt` gets a Failure.
        """
        while leases:
            batch = _Batch(leases=leases, is_wanted=is_wanted, current=(0, self._clock()))
            num_loaded = await self._load_until_timeout(batch, on_prompt)
            if num_loaded < len(leases):
                self._replace_thread()
                limit = f"rollout.reward_timeout_s={self._timeout_s:g}"
                on_prompt(leases[num_loaded], Failure(reason=f"task.example() took longer than {limit}"))
            leases = leases[num_loaded + 1 :]

    def close(self) -> None:
        """Stops the thread without waiting for it, because an example may hang."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _load_until_timeout(
        self, batch: _Batch, on_prompt: Callable[[Lease, LoadedPrompt | Failure], None]
    ) -> int:
        """Returns the number of leases that were handed over before an example exceeded its time limit."""
        loading = asyncio.get_running_loop().run_in_executor(self._thread, self._load_in_thread, batch)
        num_loaded = 0
        try:
            while num_loaded < len(batch.leases):
                await asyncio.wait({loading}, timeout=_POLL_S)
                if loading.done():
                    loading.result()
                index, started_s = batch.current
                for prompt in batch.prompts[num_loaded:]:
                    on_prompt(batch.leases[num_loaded], prompt)
                    num_loaded += 1
                if index == num_loaded and self._clock() - started_s > self._timeout_s:
                    break
        finally:
            batch.is_abandoned = True
            loading.cancel()
        return num_loaded

    def _load_in_thread(self, batch: _Batch) -> None:
        for index, lease in enumerate(batch.leases):
            # After an example that exceeded its time limit, this thread must stop: another has replaced it.
            if batch.is_abandoned:
                return
            batch.current = (index, self._clock())
            if batch.is_wanted(lease):
                batch.prompts.append(self._make_prompt(lease))
            else:
                batch.prompts.append(Failure(reason="cancelled"))

    def _make_prompt(self, lease: Lease) -> LoadedPrompt | Failure:
        """Runs in the thread."""
        source = self._sources[lease.eval_set]
        split, index = SPLITS[lease.purpose], lease.prompt_index
        name = f"example({split!r}, {index})"
        try:
            example = source.task.example(split, index)
        except RAISED_BY_TASKS as error:  # only the samples of this lease fail
            return Failure(reason=f"{name}: {type(error).__name__}: {error}")
        if source.task.uses_sessions:  # the agent writes the prompts
            return LoadedPrompt(example=example, tokens_P=np.empty(0, np.int32))
        try:
            return LoadedPrompt(example=example, tokens_P=source.renderer.encode(example))
        except ValueError as error:
            return Failure(reason=f"{name}: {error}", kind=FailureKind.PROMPT)
        except RAISED_BY_TASKS as error:  # also raised by chat templates
            return Failure(reason=f"{name}: {type(error).__name__}: {error}")

    def _replace_thread(self) -> None:
        self._thread.shutdown(wait=False)
        self._thread = _new_thread()


def needs_leader(*, num_prompt_tokens: int, num_samples: int, caches_prefixes: bool) -> bool:
    """True if the samples of a lease should wait for the first of them to compute the prompt."""
    return caches_prefixes and num_samples > 1 and num_prompt_tokens >= LONG_PROMPT_TOKENS


class PromptLeader:
    """One sample of a group computes a long prompt, and the others find it in the engine's prefix cache.

        samples of one lease: leader at the engine -> its first token (or its end) -> the others at the engine

    An engine that gets all samples of a group at once computes their prompt once per sample: SGLang's `lpm`
    order puts requests with an equal prompt last, but still into the same batch while there is room. For
    short prompts the wait costs more than it saves, so all samples start at once. Belongs to one event loop.
    """

    def __init__(self, leader: int | None) -> None:
        """`leader`: index of the first sample; None: no sample waits."""
        self._leader = leader
        self._computed = asyncio.Event()
        if leader is None:
            self._computed.set()

    async def wait_turn(self, sample_index: int) -> None:
        """Returns when the sample may be sent to the engine."""
        if sample_index != self._leader:
            await self._computed.wait()

    def prompt_computed(self) -> None:
        """Lets the other samples start. Call at the leader's first token, and in any case at its end; later
        calls do nothing."""
        self._computed.set()


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="examples")
