"""Leases to samples: every sample of every lease is one small task that prompts, generates, scores and hands over.

    lease -> example, prompt tokens -> per sample: episode (engine) -> reward (worker process) -> answer

Samples start as soon as their prompt is there; those whose prompts are there together start in the same turn of the loop, so that the
engine client can send them as one request. A sample that cannot be made is an answer too (SampleFailed): the buffer decides whether to
try again. A sample lost with the engine is no answer: its lease goes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from areal_like.config import Config
from areal_like.errors import EngineError, RewardError
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone, SampleFailed
from areal_like.wire.records import Record
from rollout_server.buffer_client.lease_desk import Answer
from rollout_server.episodes.base import Episode, GenerationGate, PolicyClient, Tokenizer, Transcript
from rollout_server.episodes.prompt_loader import SPLITS, Examples, Prompt
from rollout_server.inference.client import EngineClient, Sampling
from rollout_server.rewards.pool import RewardPool
from rollout_server.tasks.base import Example, Task

log = logging.getLogger(__name__)

_ENGINE_GRACE_S = 0.5
"""After a failed request: a dying engine breaks its connections a moment before its end can be seen."""

_CLOSE_TIMEOUT_S = 5.0
_MAX_ERROR_CHARS = 500
_MAX_SEED = 1 << 31


class LeaseRunner:
    """Runs leases on the engine of the moment. One event loop; `close` cancels everything."""

    def __init__(
        self,
        config: Config,
        *,
        task: Task,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        episode: Episode,
        rewards: RewardPool,
        turnstile: GenerationGate,
        on_answer: Callable[[Answer], None],
    ) -> None:
        """`on_answer` is called once a sample, unless its lease was cancelled or the engine was lost."""
        self._tokenizer = tokenizer
        self._episode = episode
        self._rewards = rewards
        self._turnstile = turnstile
        self._on_answer = on_answer
        sampling = config.sampling
        self._sampling = Sampling(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            stop_token_ids=stop_token_ids,
        )
        self._examples = Examples(task, tokenizer, timeout_s=config.rollout.reward_timeout_s)
        self._waiting: list[Lease] = []
        self._preparing: asyncio.Task[None] | None = None
        self._samples: dict[int, set[asyncio.Task[None]]] = {}
        self.engine: EngineClient | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception of a sample that met a bug of ours."""
        self.num_done = 0
        self.num_failed = 0

    def start(self, leases: list[Lease]) -> None:
        """Begins to make every sample of these leases."""
        self._samples |= {lease.lease_id: set() for lease in leases}
        self._waiting += leases
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.create_task(self._prepare())
            self._preparing.add_done_callback(self._notice)

    def cancel(self, lease_ids: list[int]) -> None:
        """Stops making samples of these leases, at the engine too."""
        for lease_id in lease_ids:
            for task in self._samples.pop(lease_id, set()):
                task.cancel()

    async def close(self) -> None:
        """Cancels everything and waits for it."""
        preparing = {self._preparing} if self._preparing is not None else set()
        tasks = preparing.union(*self._samples.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
        self._examples.close()

    def _notice(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)

    def _begin(self, lease: Lease, sample_index: int, prompt: Prompt | str) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not tasks:
                self._samples.pop(lease.lease_id, None)
            self._notice(task)

        tasks = self._samples[lease.lease_id]
        task = asyncio.create_task(self._sample(lease, sample_index, prompt))
        tasks.add(task)
        task.add_done_callback(ended)

    async def _prepare(self) -> None:
        """Prompts of all waiting leases, those of the first message first."""
        while self._waiting:
            leases, self._waiting = self._waiting, []
            await self._examples.prepare(leases, is_wanted=self._is_wanted, on_prompt=self._begin_all)

    def _is_wanted(self, lease: Lease) -> bool:
        return lease.lease_id in self._samples

    def _begin_all(self, lease: Lease, prompt: Prompt | str) -> None:
        if self._is_wanted(lease):  # not cancelled meanwhile
            for sample_index in lease.sample_indices:
                self._begin(lease, sample_index, prompt)

    async def _sample(self, lease: Lease, sample_index: int, prompt: Prompt | str) -> None:
        """One sample to its answer."""
        try:
            if isinstance(prompt, str):
                raise RewardError(prompt)
            record = Record.of(
                lease.ticket_id, sample_index, await self._trajectory(lease, sample_index, *prompt)
            )
        except EngineError as error:
            engine = self.engine
            await asyncio.sleep(_ENGINE_GRACE_S)
            if engine is None or self.engine is not engine:
                return
            self._fail(lease, sample_index, str(error))
        except (RewardError, ValueError) as error:
            self._fail(lease, sample_index, str(error))
        else:
            self.num_done += 1
            self._on_answer(SampleDone(lease_id=lease.lease_id, record=record))

    async def _trajectory(
        self, lease: Lease, sample_index: int, example: Example, prompt_P: NDArray[np.int32]
    ) -> Trajectory:
        if self.engine is None:
            raise EngineError("there is no engine")
        loop = asyncio.get_running_loop()
        is_greedy = lease.purpose is Purpose.EVAL or sample_index in lease.greedy_indices
        sampling = replace(
            self._sampling,
            temperature=0.0 if is_greedy else self._sampling.temperature,
            sampling_seed=None if is_greedy else (lease.seed + sample_index) % _MAX_SEED,
        )
        rid = f"{lease.lease_id}.{sample_index}"
        speaker = PolicyClient(self.engine, sampling=sampling, rid=rid, turnstile=self._turnstile)
        transcript = Transcript()
        transcript.give(prompt_P)
        started_s = loop.time()
        completion = await self._episode.run(example, speaker, self._tokenizer, transcript)
        generation_s = loop.time() - started_s
        reward = await self._rewards.score(
            split=SPLITS[lease.purpose], index=lease.prompt_index, completion=completion
        )
        return transcript.to_trajectory(
            reward=reward.value,
            reward_components=reward.components,
            generation_s=generation_s,
            reward_s=reward.seconds,
            is_greedy=is_greedy,
        )

    def _fail(self, lease: Lease, sample_index: int, error: str) -> None:
        self.num_failed += 1
        log.warning("sample %d of ticket %d failed: %s", sample_index, lease.ticket_id, error)
        failed = SampleFailed(
            lease_id=lease.lease_id,
            ticket_id=lease.ticket_id,
            sample_index=sample_index,
            error=error[:_MAX_ERROR_CHARS],
        )
        self._on_answer(failed)
