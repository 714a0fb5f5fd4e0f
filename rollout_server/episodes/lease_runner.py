"""Runs leases: each sample is one asyncio task that generates, scores and reports its result.

    lease -> prompt -> each sample: episode (engine) -> reward (worker process) -> SampleDone | SampleFailed

A sample starts as soon as its prompt is ready. Samples whose prompts are ready together start in the same
turn of the event loop, so that the engine client can send them as one request. Nothing is retried here: a
failed sample is reported with the kind of its failure, and the buffer decides about a retry. Where
`buffer.on_failure` says `zero` and there are sampled tokens, it is a sample with reward 0 instead. A sample
that is lost with the engine is not reported: the server gives its lease back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from areal_like.config import Config
from areal_like.errors import (
    ArealError,
    EngineError,
    EngineTimeoutError,
    EpisodeError,
    PromptRefusedError,
    RewardError,
    RewardTimeoutError,
)
from areal_like.failures import FailureKind, FailurePolicy
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone, SampleFailed
from areal_like.wire.records import Record
from rollout_server.buffer_client.held_leases import Place, SampleResult
from rollout_server.episodes.base import Episode, PolicyClient, Tokenizer
from rollout_server.episodes.prompt_leader import PromptLeader, needs_leader
from rollout_server.episodes.prompt_loader import SPLITS, FailedPrompt, Prompt, PromptLoader
from rollout_server.episodes.scoring import Outcome, add_up
from rollout_server.episodes.transcript import Transcript
from rollout_server.inference.client import EngineClient
from rollout_server.inference.generation_gate import GenerationGate
from rollout_server.inference.types import Sampling
from rollout_server.rewards.pool import RewardPool
from rollout_server.tasks.base import Completion, Task

log = logging.getLogger(__name__)

_ENGINE_GRACE_S = 0.5
"""Wait after a failed request before its sample is reported as failed. If the engine is dying, requests fail
shortly before the server notices the engine's end; these samples must not be reported."""
_CLOSE_TIMEOUT_S = 5.0
_MAX_ERROR_CHARS = 500
_MAX_SEED = 1 << 31
_KINDS: tuple[tuple[type[ArealError], FailureKind], ...] = (
    (EngineTimeoutError, FailureKind.TIMEOUT),
    (PromptRefusedError, FailureKind.PROMPT),
    (EngineError, FailureKind.ENGINE),
    (RewardTimeoutError, FailureKind.REWARD_TIMEOUT),
    (RewardError, FailureKind.REWARD),
    (EpisodeError, FailureKind.ENVIRONMENT),
)
"""Kinds of failures by exception; the first that fits."""


class LeaseRunner:
    """Runs leases on the current engine. Belongs to one event loop; `close` cancels everything."""

    def __init__(
        self,
        config: Config,
        *,
        task: Task,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        episode: Episode,
        rewards: RewardPool,
        gate: GenerationGate,
        on_result: Callable[[SampleResult], None],
        on_move: Callable[[int, int, Place], None] = lambda lease_id, sample_index, place: None,
    ) -> None:
        """`on_result` is called once per sample, unless its lease was cancelled or the engine lost;
        `on_move` with (lease id, sample index, place) when a sample leaves the engine or comes back."""
        self._tokenizer = tokenizer
        self._episode = episode
        self._rewards = rewards
        self._gate = gate
        self._on_result = on_result
        self._on_move = on_move
        sampling = config.sampling
        self._sampling = Sampling(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            stop_token_ids=stop_token_ids,
            stop=sampling.stop,
        )
        self._sample_timeout_s = config.rollout.sample_timeout_s or math.inf
        self._on_failure = config.buffer.on_failure
        self._prompts = PromptLoader(task, tokenizer, timeout_s=config.rollout.reward_timeout_s)
        self._waiting: list[Lease] = []
        """Leases whose prompts are not being loaded yet."""
        self._loading: asyncio.Task[None] | None = None
        self._samples: dict[int, set[asyncio.Task[None]]] = {}
        """Tasks by lease; a lease is removed when its last task ends, or when it is cancelled."""
        self.engine: EngineClient | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception of a prompt or sample task that raises unexpectedly."""
        self.num_done = 0
        self.num_failed = Counter[FailureKind]()
        """Failed samples by kind, those with reward 0 included."""

    def start(self, leases: list[Lease]) -> None:
        """Starts every sample of these leases."""
        self._samples |= {lease.lease_id: set() for lease in leases}
        self._waiting += leases
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load_prompts())
            self._loading.add_done_callback(self._report_unexpected)

    def cancel(self, lease_ids: list[int]) -> None:
        """Cancels the samples of these leases; their requests at the engine are aborted."""
        for lease_id in lease_ids:
            for task in self._samples.pop(lease_id, set()):
                task.cancel()

    async def close(self) -> None:
        """Cancels everything and waits for it."""
        loading = {self._loading} if self._loading is not None else set()
        tasks = loading.union(*self._samples.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
        self._prompts.close()

    def _report_unexpected(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _load_prompts(self) -> None:
        """Loads the prompts of all waiting leases, in the order in which the leases were granted."""
        while self._waiting:
            leases, self._waiting = self._waiting, []
            await self._prompts.load(leases, is_wanted=self._is_wanted, on_prompt=self._start_samples)

    def _is_wanted(self, lease: Lease) -> bool:
        return lease.lease_id in self._samples

    def _start_samples(self, lease: Lease, prompt: Prompt | FailedPrompt) -> None:
        if self._is_wanted(lease):  # the lease may have been cancelled in the meantime
            leader = PromptLeader(self._leader_of(lease, prompt))
            for sample_index in lease.sample_indices:
                self._start_sample(lease, sample_index, prompt, leader)

    def _leader_of(self, lease: Lease, prompt: Prompt | FailedPrompt) -> int | None:
        """The sample that computes the prompt before the others; None if all start at once."""
        is_needed = not isinstance(prompt, FailedPrompt) and needs_leader(
            num_prompt_tokens=len(prompt.tokens_P),
            num_samples=len(lease.sample_indices),
            caches_prefixes=self.engine is not None and self.engine.caches_prefixes,
        )
        return lease.sample_indices[0] if is_needed else None

    def _start_sample(
        self, lease: Lease, sample_index: int, prompt: Prompt | FailedPrompt, leader: PromptLeader
    ) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not tasks:
                self._samples.pop(lease.lease_id, None)
            self._report_unexpected(task)

        tasks = self._samples[lease.lease_id]
        task = asyncio.create_task(self._make_sample(lease, sample_index, prompt, leader))
        tasks.add(task)
        task.add_done_callback(ended)

    async def _make_sample(
        self, lease: Lease, sample_index: int, prompt: Prompt | FailedPrompt, leader: PromptLeader
    ) -> None:
        """Makes one sample and reports its result."""
        if isinstance(prompt, FailedPrompt):
            self._report_failed(lease, sample_index, prompt.kind, prompt.reason, Transcript())
            return
        engine, transcript = self.engine, Transcript()
        try:
            await leader.wait_turn(sample_index)
            record = await self._make_record(lease, sample_index, prompt, transcript, leader)
        except (EngineError, EpisodeError, RewardError) as error:
            kind = next(kind for cause, kind in _KINDS if isinstance(error, cause))
            if isinstance(error, EngineError):
                await asyncio.sleep(_ENGINE_GRACE_S)
                if engine is None or self.engine is not engine:
                    return
            self._report_failed(lease, sample_index, kind, str(error), transcript)
        else:
            self.num_done += 1
            self._on_result(SampleDone(lease_id=lease.lease_id, record=record))
        finally:
            leader.prompt_computed()

    async def _make_record(
        self,
        lease: Lease,
        sample_index: int,
        prompt: Prompt,
        transcript: Transcript,
        leader: PromptLeader,
    ) -> Record:
        if self.engine is None:
            raise EngineError("there is no engine")
        loop = asyncio.get_running_loop()
        is_greedy = _is_greedy(lease, sample_index)
        sampling = replace(
            self._sampling,
            temperature=0.0 if is_greedy else self._sampling.temperature,
            sampling_seed=None if is_greedy else (lease.seed + sample_index) % _MAX_SEED,
        )
        rid = f"{lease.lease_id}.{sample_index}"
        client = self.engine.episode(on_first_token=leader.prompt_computed)
        policy = PolicyClient(
            client, sampling=sampling, rid=rid, gate=self._gate, timeout_s=self._sample_timeout_s
        )
        transcript.append_context(prompt.tokens_P)
        started_s = loop.time()
        text = await self._run_episode(prompt, policy, transcript)
        leader.prompt_computed()  # an answer of one token was not reported before
        generation_s = loop.time() - started_s
        self._on_move(lease.lease_id, sample_index, Place.REWARD)
        completion = Completion(
            text,
            token_ids=transcript.sampled,  # type: ignore[arg-type]  # an array is as good as a sequence
            turn_lengths=[end - first for first, end in transcript.spans],
            finish_reason=transcript.finish_reason,
        )
        reward = await self._rewards.score(
            split=SPLITS[lease.purpose], index=lease.prompt_index, completion=completion
        )
        try:
            outcome = add_up(reward.score, num_turns=len(completion.turn_lengths))
        except ValueError as error:
            raise RewardError(str(error)) from None
        try:
            trajectory = transcript.to_trajectory(
                outcome, generation_s=generation_s, reward_s=reward.seconds, is_greedy=is_greedy
            )
        except ValueError as error:
            raise EngineError(f"the engine's answer cannot be used: {error}") from None
        try:
            return Record.of(lease.ticket_id, sample_index, trajectory)
        except ValueError as error:  # too many components
            raise RewardError(f"the reward cannot be stored: {error}") from None

    async def _run_episode(self, prompt: Prompt, policy: PolicyClient, transcript: Transcript) -> str:
        """The completion. Raises EngineError, RewardError, or EpisodeError for any other exception."""
        try:
            return await self._episode.run(prompt.example, policy, self._tokenizer, transcript)
        except (EngineError, EpisodeError, RewardError):
            raise
        except Exception as error:  # an episode's code may raise anything; only its own sample fails
            raise EpisodeError(f"the episode raised {type(error).__name__}: {error}") from error

    def _report_failed(
        self, lease: Lease, sample_index: int, kind: FailureKind, error: str, transcript: Transcript
    ) -> None:
        """Reports a failed sample: with reward 0 if its policy is `zero`, else for the buffer to decide."""
        self.num_failed[kind] += 1
        log.warning("sample %d of ticket %d failed (%s): %s", sample_index, lease.ticket_id, kind, error)
        record = None
        if self._on_failure.policy(kind) is FailurePolicy.ZERO:
            record = _record_of_zero(lease, sample_index, transcript)
        if record is not None:
            self._on_result(SampleDone(lease_id=lease.lease_id, record=record, failure=kind.value))
            return
        failed = SampleFailed(
            lease_id=lease.lease_id,
            ticket_id=lease.ticket_id,
            sample_index=sample_index,
            kind=kind,
            num_tokens=transcript.num_sampled,
            error=error[:_MAX_ERROR_CHARS],
        )
        self._on_result(failed)


def _is_greedy(lease: Lease, sample_index: int) -> bool:
    return lease.purpose is Purpose.EVAL or sample_index in lease.greedy_indices


def _record_of_zero(lease: Lease, sample_index: int, transcript: Transcript) -> Record | None:
    """The record of a failed sample with reward 0; None if it has no tokens that can be trained on."""
    if not transcript.num_sampled or transcript.finish_reason is FinishReason.ABORT:
        return None
    try:
        trajectory = transcript.to_trajectory(Outcome(), is_greedy=_is_greedy(lease, sample_index))
        return Record.of(lease.ticket_id, sample_index, trajectory)
    except ValueError:
        return None
