"""Runs leases: each sample is one asyncio task that generates, scores and reports its result.

    lease -> prompt --> each sample: engine -> reward (worker process) -> SampleDone | SampleFailed
    lease ------------> each sample: environment (worker process) <-> engine -> reward -> as above
    lease -> example -> each sample: session of an agent <-> engine -> reward -> as above

A sample starts as soon as its prompt is ready; a task with environments needs none. Samples whose prompts are
ready together start in the same turn of the event loop, so that the engine client can send them as one
request. A failed sample is reported with the kind of its failure, and the buffer decides about a retry. If
`buffer.on_failure` is `zero` and there are sampled tokens, it becomes a sample with reward 0 instead. A
sample that is lost with the engine is not reported: the server gives its lease back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from areal_like.config import Config
from areal_like.errors import (
    AgentLostError,
    ArealError,
    EngineError,
    EngineTimeoutError,
    EnvironmentLostError,
    EpisodeError,
    PromptRefusedError,
    RewardError,
    RewardTimeoutError,
    RoutesError,
    TeacherError,
)
from areal_like.failures import FailureKind, FailurePolicy
from areal_like.spans import recorder
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.producer import Lease, SampleDone, SampleFailed
from areal_like.wire.records import Record
from rollout_server.leases.client import ShardedBufferClient
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.attempt import NOT_WANTED, Attempt
from rollout_server.sample.maker import AttemptMaker
from rollout_server.sample.prompts import Failure, LoadedPrompt, PromptLeader, PromptLoader, needs_leader
from rollout_server.sessions.book import SERVER_ENDS, SessionBook
from rollout_server.sessions.journal import UnusableJournalError
from rollout_server.sources import SampleSources
from rollout_server.teachers.pool import TeacherPool

log = logging.getLogger(__name__)

_ENGINE_GRACE_S = 0.5
"""Wait between a failed request and reporting its sample as failed. If the engine is dying, requests fail
shortly before the server notices, and their samples must not be reported."""
_CLOSE_TIMEOUT_S = 5.0
_MAX_ERROR_CHARS = 500
_KINDS: tuple[tuple[type[ArealError], FailureKind], ...] = (
    (EngineTimeoutError, FailureKind.TIMEOUT),
    (PromptRefusedError, FailureKind.PROMPT),
    (RoutesError, FailureKind.ROUTES),
    (EngineError, FailureKind.ENGINE),
    (RewardTimeoutError, FailureKind.REWARD_TIMEOUT),
    (RewardError, FailureKind.REWARD),
    (AgentLostError, FailureKind.AGENT),
    (EpisodeError, FailureKind.ENVIRONMENT),
    (TeacherError, FailureKind.TEACHER),
)
"""Kinds of failures by exception; the first match counts."""
_TRIES_OF_BROKEN_AGENTS = 4
"""Tries by all agents for each counted one."""


def failure_of(error: EngineError | EpisodeError | RewardError | TeacherError) -> Failure:
    """Returns the kind and reason of a failure by its exception."""
    kind = next(kind for cause, kind in _KINDS if isinstance(error, cause))
    # The policy does not cause the loss of an environment's process.
    return Failure(kind=kind, reason=str(error), is_of_policy=not isinstance(error, EnvironmentLostError))


class AgentTries:
    """The attempts at one sample: a single one, unless external agents fail to make it.

    Such a failure says nothing about the server or the task, so the sample is offered to other agents before
    it is reported. Broken agents must not use up the tries at samples that others can make. So tries of an
    agent whose previous sample also failed do not count, up to a limit: with a single agent, all failures may
    be due to one sample.
    """

    def __init__(self, most: int) -> None:
        self._left = most
        self._left_of_all = _TRIES_OF_BROKEN_AGENTS * most
        self.attempt: Attempt | None = None
        """The newest attempt; None before the first one."""

    async def make(self, begin: Callable[[], Attempt], *, name: str) -> Trajectory:
        """Makes the sample. `begin` returns a new attempt. Raises as it and `Attempt.make` do."""
        while True:
            self.attempt = begin()
            try:
                return await self.attempt.make()
            except AgentLostError as error:
                if not self.goes_on(error):
                    raise
                log.warning("%s waits for another agent: %s", name, error)

    def goes_on(self, error: AgentLostError) -> bool:
        """Records a failed try; returns True if the sample should be offered again."""
        self._left -= error.is_of_sample
        self._left_of_all -= 1
        return min(self._left, self._left_of_all) > 0


class LeaseRunner:
    """Runs leases on the current engine. Belongs to one event loop; `close` cancels everything."""

    def __init__(
        self,
        config: Config,
        sources: SampleSources,
        *,
        gate: GenerationGate,
        book: SessionBook,
        buffers: ShardedBufferClient,
        teachers: TeacherPool | None = None,
    ) -> None:
        """`buffers` gets one result per sample, unless its lease was cancelled or the engine was lost.
        `book`: the sessions offered to agents. `teachers`: those at servers; None: there are none."""
        self._makers = {
            name: AttemptMaker(
                config=config,
                source=source,
                gate=gate,
                on_move=buffers.moved,
                book=book,
                journals=buffers,
                teachers=teachers,
            )
            for name, source in sources.items()
        }
        self._sources = sources
        self._buffers = buffers
        self._on_failure = config.buffer.on_failure
        self._max_routes_bytes = config.buffer.max_message_bytes
        self._num_tries = 1 + config.buffer.max_sample_retries
        """Tries at one sample by external agents, counted as described for `AgentLostError`."""
        self._prompts = PromptLoader(sources, timeout_s=config.rollout.reward_timeout_s)
        self._waiting: list[Lease] = []
        """Leases whose prompts are not being loaded yet."""
        self._loading: asyncio.Task[None] | None = None
        self._samples: dict[int, set[asyncio.Task[None]]] = {}
        """Tasks by lease; a lease is removed when its last task ends, or when it is cancelled."""
        self.engine: EngineClient | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set to the exception of a prompt or sample task that raises unexpectedly."""
        self._began_s: dict[tuple[int, int], float] = {}
        """Lease and index of each sample in progress -> its start time."""
        self.num_done = 0
        self.num_finished = Counter[FinishReason]()
        """Finished samples by finish reason."""
        self.num_failed = Counter[FailureKind]()
        """Failed samples by kind, including those reported with reward 0."""
        self.num_routes_bytes = self.num_routed_tokens = 0
        """Bytes of the routes of finished samples, and the tokens that have them."""

    @property
    def seconds_in_progress(self) -> float:
        """Returns the time that the samples in progress have taken so far, summed up."""
        now_s = time.monotonic()
        return sum(now_s - began_s for began_s in self._began_s.values())

    def start(self, leases: list[Lease]) -> None:
        """Starts every sample of these leases."""
        self._samples |= {lease.lease_id: set() for lease in leases}
        for lease in leases:
            source = self._sources.get(lease.eval_set)
            if source is None:
                reason = f"this server has no evaluation set {lease.eval_set}"
                self._start_samples(lease, Failure(reason=reason))
            elif source.task.has_environment:
                self._start_samples(lease, None)
            else:
                self._waiting.append(lease)
        if not self._waiting:
            return
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load_prompts())
            self._loading.add_done_callback(self._report_unexpected)

    def cancel(self, lease_ids: list[int], *, reason: str = NOT_WANTED) -> None:
        """Cancels the samples of these leases and aborts their requests at the engine.

        `reason`: message to clients of their sessions.
        """
        for lease_id in lease_ids:
            for task in self._samples.pop(lease_id, set()):
                task.cancel(reason)

    async def close(self, *, reason: str = SERVER_ENDS) -> None:
        """Cancels everything and waits until it has stopped.

        `reason`: message to clients of sessions.
        """
        loading = {self._loading} if self._loading is not None else set()
        tasks = loading.union(*self._samples.values())
        for task in tasks:
            task.cancel(reason)
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

    def _start_samples(self, lease: Lease, prompt: LoadedPrompt | Failure | None) -> None:
        """`prompt`: None if the environment provides it."""
        if not self._is_wanted(lease):  # it was cancelled in the meantime
            return
        is_led = isinstance(prompt, LoadedPrompt) and needs_leader(
            num_prompt_tokens=len(prompt.tokens_P),
            num_samples=len(lease.sample_indices),
            caches_prefixes=self.engine is not None and self.engine.caches_prefixes,
        )
        leader = PromptLeader(lease.sample_indices[0] if is_led else None)
        tasks = self._samples[lease.lease_id]
        for sample_index in lease.sample_indices:
            task = asyncio.create_task(self._make_sample(lease, sample_index, prompt, leader))
            tasks.add(task)
            task.add_done_callback(partial(self._ended, lease.lease_id))

    def _ended(self, lease_id: int, task: asyncio.Task[None]) -> None:
        if (tasks := self._samples.get(lease_id)) is not None:
            tasks.discard(task)
            if not tasks:
                del self._samples[lease_id]
        self._report_unexpected(task)

    async def _make_sample(
        self,
        lease: Lease,
        sample_index: int,
        prompt: LoadedPrompt | Failure | None,
        leader: PromptLeader,
    ) -> None:
        if isinstance(prompt, Failure):
            self._fail(lease, sample_index, prompt, attempt=None)
            return
        engine, started_s, end = self.engine, time.monotonic(), "cancelled"
        name, tries = f"ticket {lease.ticket_id}.{sample_index}", AgentTries(self._num_tries)
        self._began_s[lease.lease_id, sample_index] = started_s
        first_begin = partial(
            self._makers[lease.eval_set].begin, engine, lease, sample_index, prompt=prompt, leader=leader
        )
        begin: Callable[[], Attempt] = first_begin
        try:
            await leader.wait_turn(sample_index)
            if sample_index in lease.sessions:
                begin = await self._continuing(first_begin, lease, sample_index, name=name)
            record = self._record_of(lease, sample_index, await tries.make(begin, name=name))
        except (EngineError, EpisodeError, RewardError, TeacherError) as error:
            if isinstance(error, EngineError):
                await asyncio.sleep(_ENGINE_GRACE_S)
                if engine is None or self.engine is not engine:
                    return
            self._fail(lease, sample_index, failure_of(error), attempt=tries.attempt)
            end = f"failed: {type(error).__name__}"
        else:
            self.num_done += 1
            self.num_finished[record.finish_reason] += 1
            self._buffers.deliver(SampleDone(lease_id=lease.lease_id, record=record))
            end = record.finish_reason.name.lower()
        finally:
            self._began_s.pop((lease.lease_id, sample_index), None)
            recorder.record("samples", name, start_s=started_s, end=end)
            leader.prompt_computed()

    async def _continuing(
        self, begin: partial[Attempt], lease: Lease, sample_index: int, *, name: str
    ) -> Callable[[], Attempt]:
        """Returns a `begin` that first continues the session of another server. It begins a new one if the
        journal cannot be read, and after that session."""
        left = [await self._buffers.read_session(lease, sample_index)]

        def begin_next() -> Attempt:
            if left and (recorded := left.pop())[0]:
                try:
                    attempt = begin(recorded=recorded)
                    log.info("%s: the session %s continues here", name, recorded[0])
                    return attempt
                except UnusableJournalError as error:
                    log.warning("%s begins again: %s", name, error)
            return begin()

        return begin_next

    def _fail(self, lease: Lease, sample_index: int, failure: Failure, *, attempt: Attempt | None) -> None:
        """Delivers a failure, or the tokens sampled before it with reward 0 (`buffer.on_failure`).

        `attempt`: None if the failure came before the attempt.
        """
        kind = failure.kind
        self.num_failed[kind] += 1
        log.warning(
            "sample %d of ticket %d failed (%s): %s", sample_index, lease.ticket_id, kind, failure.reason
        )
        is_zero = self._on_failure.policy(kind) is FailurePolicy.ZERO and failure.is_of_policy
        if is_zero and attempt is not None:
            try:
                record = self._record_of(lease, sample_index, attempt.without_reward())
                self._buffers.deliver(SampleDone(lease_id=lease.lease_id, record=record, failure=kind.value))
                return
            except (ValueError, RewardError, RoutesError):  # nothing was sampled, or it cannot be used
                pass
        self._buffers.deliver(
            SampleFailed(
                lease_id=lease.lease_id,
                ticket_id=lease.ticket_id,
                sample_index=sample_index,
                kind=kind,
                num_tokens=attempt.num_sampled if attempt is not None else 0,
                error=failure.reason[:_MAX_ERROR_CHARS],
            )
        )

    def _record_of(self, lease: Lease, sample_index: int, trajectory: Trajectory) -> Record:
        """Raises RewardError for a reward that no record holds, RoutesError for routes that no message
        does."""
        routes = trajectory.routes
        if routes is not None and len(routes.to_bytes()) > self._max_routes_bytes:
            raise RoutesError(
                f"the routes of {routes.num_tokens} tokens take {len(routes.to_bytes())} bytes, and one "
                f"message at most buffer.max_message_bytes={self._max_routes_bytes}: raise it"
            )
        try:
            record = Record.of(lease.ticket_id, sample_index, trajectory)
        except ValueError as error:  # too many components
            raise RewardError(f"the reward cannot be stored: {error}") from None
        if routes is not None:
            self.num_routes_bytes += len(routes.to_bytes())
            self.num_routed_tokens += routes.num_tokens
        return record
