"""One session: a sample that a program makes by sending requests in OpenAI's format.

    WAITING -> claim() -> OPEN -> end() -> ENDED       the program, or the server for it, has ended it
                           |----> fail(error) -> ENDED the engine failed; the sample fails with it
       `-------------------`----> close(reason) -> GONE  the lease was cancelled, a time limit, ...
       restore(recorded) --> OPEN or ENDED               another server had it

The turns form a `Conversation`: a prompt extends an earlier turn only if it starts with exactly its tokens.
So whatever a client sends, sampled tokens are never tokenized again, and log-probs stay correct.

A request may be a repetition: an SDK sends it again after a timeout or a broken connection. It then joins the
call of the first one (see `begin`): the policy samples one turn, and every client gets the same response. A
turn that no client has read is not part of the sample, unless the time limit of the sample cut it off.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

from areal_like.chat.openai import most_bytes
from areal_like.chat.responses import ResponsesRequest
from areal_like.errors import (
    RAISED_BY_TASKS,
    ArealError,
    EngineError,
    EpisodeBudgetError,
    EpisodeError,
    PromptRefusedError,
    SessionGoneError,
    SessionMovedError,
)
from areal_like.trajectory import LARGEST_REWARD, FinishReason
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.turns import SampledTurn, Turn
from rollout_server.leases.held_leases import Place
from rollout_server.sessions.claimants import Claimant
from rollout_server.sessions.journal import (
    JournalState,
    RecordedSession,
    SessionJournal,
    UnusableJournalError,
)
from rollout_server.sessions.kept_responses import KeptResponse, KeptResponses
from rollout_server.tasks.base import Example, Split

MAX_METRICS = 32
"""Maximum number of metric names that an agent may post for one sample."""
_NONE: Mapping[str, float] = MappingProxyType({})

_CUT_S = 5.0
"""Wait after the time limit of the sample. The engine returns the tokens of a request that timed out faster
than this."""
_ENGINE_GRACE_S = 0.5
"""An engine that dies fails its requests shortly before the server notices, and gives the leases back."""
_ID_CHARS = 32
"""Length of a call's id, with which the id of its completion ends."""


class Call:
    """One request to the model, and its repetitions."""

    def __init__(self, task: asyncio.Future[SampledTurn], *, id: str, gone: Callable[[], ArealError]) -> None:
        """`gone`: returns the error for clients when the session has ended."""
        self.id = id
        """The completion's id is derived from it."""
        self.task = task
        self.num_readers = 0
        """Number of clients that wait for the response."""
        self.body: bytes | None = None
        """The response body while clients are connected; equal requests get equal bodies."""
        self.is_delivered = False
        """True once the whole response was sent to a client."""
        self.is_restored = False
        """True if another server has sampled the turn, until a repetition of its request has joined it: the
        client may have read the response or not."""
        self._gone = gone

    async def turn(self) -> SampledTurn:
        """Returns the sampled turn; cancelling the caller does not affect other callers. Raises as the
        session's `sample_turn` does."""
        self.num_readers += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self.task.cancelled():  # before its first step: later it ends with a SessionGoneError
                raise self._gone() from None
            raise
        finally:
            self.num_readers -= 1

    @property
    def has_failed(self) -> bool:
        """True if it ended without a turn."""
        task = self.task
        return task.done() and (task.cancelled() or task.exception() is not None)

    @property
    def is_lost(self) -> bool:
        """True if its clients disconnected before they got the response, or may have."""
        return self.num_readers == 0 and not (self.is_delivered and not self.is_restored)

    @property
    def is_read(self) -> bool:
        """True if a client has the response, or may have it."""
        return self.is_delivered or self.is_restored


class Calls:
    """The calls of one session. Belongs to one event loop."""

    def __init__(self, *, gone: Callable[[], ArealError]) -> None:
        """`gone`: returns the error for clients when the session has ended."""
        self._gone = gone
        self._by_digest: dict[bytes, list[Call]] = {}
        """Calls by the digest of their bodies."""
        self._by_id: dict[str, Call] = {}

    def begin(
        self, digest: bytes, ask: Callable[[str], Coroutine[Any, Any, SampledTurn]], *, is_repetition: bool
    ) -> Call:
        """Returns the call for a request: a new one, or the one that it repeats (see OpenSession.begin).
        `ask`: gets the id of the call."""
        usable = [call for call in self._by_digest.get(digest, ()) if not call.has_failed]
        lost = [call for call in usable if call.is_lost]
        # Equal requests that were sent and lost at the same time get one turn each.
        if joined := lost or (usable if is_repetition else []):
            joined[-1].is_restored = False
            return joined[-1]
        id = uuid.uuid4().hex
        call = Call(asyncio.get_running_loop().create_task(ask(id)), id=id, gone=self._gone)
        self._by_digest.setdefault(digest, []).append(call)
        self._by_id[call.id] = call
        call.task.add_done_callback(lambda _: self._forget_failed(call, digest))
        return call

    def restore(self, id: str, digest: bytes, sampled: SampledTurn) -> None:
        """Adds a call whose turn another server has sampled."""
        done: asyncio.Future[SampledTurn] = asyncio.get_running_loop().create_future()
        done.set_result(sampled)
        self._by_id[id] = call = Call(done, id=id, gone=self._gone)
        call.is_delivered = call.is_restored = True
        self._by_digest.setdefault(digest, []).append(call)

    def find(self, completion_id: str) -> Call | None:
        """Returns the call that produced a completion (`chatcmpl-...`, `resp_...`); None if there is none."""
        call = self._by_id.get(completion_id[-_ID_CHARS:])
        return call if call is not None and call.task.done() and not call.has_failed else None

    def completed(self) -> Iterator[tuple[Call, SampledTurn]]:
        """Yields the calls that have a turn, newest first."""
        for call in reversed(self._by_id.values()):
            if call.task.done() and not call.has_failed:
                yield call, call.task.result()

    def cancel(self) -> None:
        for call in self._by_id.values():
            call.task.cancel()

    def _forget_failed(self, call: Call, digest: bytes) -> None:
        """Forgets a failed call: none can join it, and a client may send any number of requests that fail."""
        if call.has_failed:  # also retrieves its exception, as there may be no client to do so
            del self._by_id[call.id]
            same = self._by_digest[digest]
            same.remove(call)
            if not same:
                del self._by_digest[digest]


class SessionState(StrEnum):
    """The state of a session."""

    WAITING = "waiting"
    """Not claimed by an agent yet."""
    OPEN = "open"
    ENDED = "ended"
    """Accepts no more requests; its sample is made from the turns so far."""
    GONE = "gone"
    """Its sample is no longer needed, or was given up."""


class SessionOutcome(StrEnum):
    """How a session ended."""

    ENDED = "ended"
    TRUNCATED = "truncated"
    """Ended by a budget or the time limit of the sample."""
    IDLE = "idle"
    """It had no request for too long."""
    FAILED = "failed"
    """Its agent failed, or made no request."""
    ENGINE = "engine"
    """The engine failed."""
    CANCELLED = "cancelled"
    """Its lease was cancelled."""

    @property
    def is_good(self) -> bool:
        """True if its agent made the sample."""
        return self in (SessionOutcome.ENDED, SessionOutcome.TRUNCATED)


class AskedLimits(NamedTuple):
    """Time limits that an external agent asked for with its claim; they count if they are below the job's."""

    deadline_s: float = math.inf
    """Seconds from the first request to the model."""
    idle_timeout_s: float = math.inf
    """Seconds without a request."""


@dataclass(eq=False, kw_only=True)
class OpenSession:
    """The session of one sample. Belongs to one event loop."""

    id: str
    """Unique to the attempt, so that no client of an earlier attempt can reach this one."""
    api_key: str = field(repr=False)
    conversation: Conversation
    max_turns: int
    group: int
    """The sample's ticket."""
    sample: int
    """Its index in the ticket."""
    split: Split
    index: int
    on_move: Callable[[Place], None] = lambda place: None
    example: Example | None = None
    """Sent to external agents; None: the agent already has it."""
    is_waiting: bool = False
    """True if an external agent has to claim it."""
    needs_reward: bool = False
    """True if the task has no reward of its own."""
    heartbeat_limit_s: float = math.inf
    """Longest time without a served request in which heartbeats count."""
    journal: SessionJournal | None = None
    """With which another server can continue it; None: the session ends with its server."""

    def __post_init__(self) -> None:
        self.state = SessionState.WAITING if self.is_waiting else SessionState.OPEN
        self.is_offered = False
        """True while the response that offers it to an agent is being sent."""
        self.claim_id = ""
        """The same for all sessions that were claimed together."""
        self.moves = False
        """True once another server continues it, or may do so."""
        self.claimant: Claimant | None = None
        """The external agent that it is offered to, or that claimed it."""
        self.claimed_s = 0.0
        """Loop time at which it was claimed."""
        self.asked = AskedLimits()
        """The claimant's own limits."""
        self.members: list[OpenSession] = [self]
        """The sessions of its prompt that were claimed together, itself included; they share the list. A sign
        of life in one of them counts for all."""
        self.outcome: SessionOutcome | None = None
        """How it ended, once it is removed."""
        self.lost = ""
        """Why it has made no sample, once it is removed; empty: it has made one."""
        self.end_answer: Mapping[str, Any] | None = None
        """What its agent was told when it ended the session, and is told again if it repeats that: the first
        response may have been lost. None: the agent has not ended it."""
        self.is_credited = False
        """True once its agent has done its part: it ended well, and the posted rewards could be added up."""
        self.refused_route = ""
        """The newest request for a route that does not exist, such as `POST /v1/embeddings`."""
        self.reason = ""
        """Why the session is gone."""
        self.was_cut = False
        """True if an external agent was working on it when it went."""
        self.failure: EngineError | None = None
        """Cause of the end, if it was not a client."""
        self.budget: FinishReason | None = None
        """The budget that refused the newest request."""
        self.incomplete: FinishReason | None = None
        """The limit that ended the newest turn, if its client was told that the response is incomplete."""
        self.refused_prompt: PromptRefusedError | None = None
        """Set if the first prompt did not fit."""
        self.reward: float | None = None
        """The posted reward of the whole sample."""
        self.metrics: dict[str, float] = {}
        """The posted metrics of the sample."""
        self.label = ""
        """The posted label of the sample."""
        self.num_requests = 0
        """Number of client requests being read or served."""
        self.num_pending = 0
        """Number of requests at the engine or waiting for it."""
        self.num_calls = 0
        self.num_served = 0
        """Number of requests to the model that were served."""
        self.last_sampled: SampledTurn | None = None
        """The newest sampled turn."""
        self._was_refused = False
        """True if a request was refused since the last served one."""
        self.num_heard = 0
        """Number of heartbeats, and other requests that are not to the model."""
        self._waits_for_agent = False
        self._num_recording = 0
        """Number of rewards, deletions and ends whose entries in the journal are not durable yet."""
        self._on_call: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._last_activity_s = self._served_s = self._loop.time()
        self._calls = Calls(gone=self._gone_error)
        self._turn_rewards: dict[Turn, float] = {}
        self.kept = KeptResponses(max_bytes=most_bytes(context_length=self.conversation.max_tokens))
        """The responses that later requests may refer to."""

    # --- Life ---

    def claim(self) -> None:
        """Records that an agent has claimed it."""
        assert self.state is SessionState.WAITING
        self.is_offered = False
        self.claimed_s = self._served_s = self._loop.time()
        if self.asked.deadline_s < math.inf:
            self.conversation.limit_time(self.asked.deadline_s)
        self._set(SessionState.OPEN)

    def wait_for_agent(self) -> None:
        """Stops the idle time until `agent_starts`: the server has no process for its agent yet."""
        self._waits_for_agent = True

    def agent_starts(self, *, on_call: Callable[[], None]) -> None:
        """Begins the idle time. `on_call`: called at each request to the model."""
        self._waits_for_agent, self._on_call = False, on_call
        self.touch()
        self._changed.set()

    def end(self) -> None:
        """Ends the session: accepts no more requests, and cancels those in progress. May be called again."""
        if self.state is SessionState.OPEN:
            self._set(SessionState.ENDED)
            self._calls.cancel()

    def fail(self, error: EngineError) -> None:
        if self.state is SessionState.OPEN:
            self.failure = error
            self.end()

    def close(self, reason: str, *, may_continue: bool = False) -> None:
        """Closes the session: requests in progress and later ones raise SessionGoneError with `reason`.

        `may_continue`: another server may get the lease of the sample. If there is a journal, requests raise
        SessionMovedError instead.
        """
        if self.state is not SessionState.GONE:
            is_held = self.state is SessionState.OPEN and self.claimed_s > 0
            self.moves = may_continue and is_held and self.journal is not None and self.journal.can_continue
            self.was_cut = self.state is SessionState.OPEN and self.claimed_s > 0
            self.reason = reason
            self._set(SessionState.GONE)
            self._calls.cancel()

    async def wait_ended(self, *, idle_timeout_s: float, deadline_s: Callable[[], float | None]) -> str:
        """Waits until it has ended and returns an empty string; or returns "idle" or "deadline", the limit
        reached first.

        `deadline_s`: returns the loop time of the deadline, or None; it may become known with the first
        request. A session that waits for an agent has no limit.
        """
        while self.state in (SessionState.WAITING, SessionState.OPEN):
            if self.state is SessionState.WAITING:
                await self._wait_changed(math.inf)
                continue
            now_s, end_s = self._loop.time(), deadline_s()
            idle_s = math.inf if self._is_busy else self._last_activity_s + self.idle_limit_s(idle_timeout_s)
            end_s = math.inf if end_s is None else end_s
            if self.num_pending:
                end_s += _CUT_S
            if end_s <= now_s:
                return "deadline"
            if idle_s <= now_s:
                if any(one._is_busy for one in self.members):
                    self.touch()
                    continue
                return "idle"
            await self._wait_changed(min(idle_s, end_s) - now_s)
        return ""

    @property
    def now_s(self) -> float:
        return self._loop.time()

    def idle_limit_s(self, idle_timeout_s: float) -> float:
        """Returns the limit in force, in seconds. `idle_timeout_s`: the job's."""
        return min(idle_timeout_s, self.asked.idle_timeout_s)

    @property
    def _is_busy(self) -> bool:
        """True while a request is pending, or while its agent waits for a process or for the buffer, which
        may be starting again.

        After a refusal, of the requests to the model only those at the engine count: a client that repeats a
        large, refused request may have one in preparation at any time."""
        is_calling = self.num_pending > 0 and not self._was_refused
        is_waiting = self._waits_for_agent or self._num_recording > 0
        return is_waiting or self.conversation.is_sampling or is_calling

    @property
    def idle_s(self) -> float:
        """Seconds since the last activity; 0 while a request is pending."""
        return 0.0 if self.num_pending else self._loop.time() - self._last_activity_s

    # --- Requests ---

    def begin(
        self,
        digest: bytes,
        ask: Callable[[], Coroutine[Any, Any, SampledTurn]],
        *,
        is_repetition: bool,
        response: ResponsesRequest | None = None,
    ) -> Call:
        """Returns the call for a request whose body has this digest. `ask`: `sample_turn` or
        `continue_tokens`.

        The request is a repetition if the clients of an earlier call with the same digest disconnected before
        they got its response, or if the client marks it as one (`is_repetition`). It then joins that call, or
        the newest one. Any other request with the same body gets a new sample. `response`: the request, if
        its response is to be kept. Raises SessionGoneError.
        """
        self.check_open()

        async def recorded(id: str) -> SampledTurn:
            sampled = await ask()
            if self.journal is not None and sampled.turn is not None:
                policy = self.conversation.policy
                await self.journal.turn(
                    sampled,
                    self.conversation,
                    call_id=id,
                    digest=digest,
                    response=response,
                    created_s=int(time.time()),
                    num_requests=policy.num_requests,
                    used_s=policy.used_s,
                )
            return sampled

        return self._calls.begin(digest, recorded, is_repetition=is_repetition)

    async def offered(self, *, nonce: str) -> None:
        """Records the claim that it is offered for; `nonce`: of its key. Raises SessionMovedError."""
        if self.journal is not None and (claimant := self.claimant) is not None:
            await self.journal.claimed(
                nonce=nonce,
                claim=self.claim_id,
                claimant=[claimant.address, claimant.token, claimant.name],
                deadline_s=self.asked.deadline_s,
                idle_timeout_s=self.asked.idle_timeout_s,
            )

    async def post_reward(self, **posted: Any) -> None:
        """Calls `set_reward`, and returns when that is recorded. Also raises SessionMovedError."""
        self.set_reward(**posted)
        if self.journal is not None:
            turns = dict(posted.get("turns", _NONE))
            await self._recorded(self.journal.posted(**{**posted, "turns": turns}))

    async def delete_response(self, id: str) -> None:
        """Deletes a kept response, and returns when that is recorded. Raises SessionMovedError."""
        self.kept.delete(id)
        if self.journal is not None:
            await self._recorded(self.journal.deleted(id))

    async def end_recorded(self, answer: Mapping[str, Any] | None = None) -> None:
        """Calls `end` for the agent once that is recorded. `answer`: what it is told, with a group. Raises
        SessionMovedError, and SessionGoneError if the session was closed meanwhile and is no sample."""
        answer = answer or self._answer_to_end()
        if self.journal is not None and self.state is SessionState.OPEN:
            await self._recorded(self.journal.ended(budget=self.budget))
        is_good = self.end_answer is not None or (self.outcome is not None and self.outcome.is_good)
        if self.state is SessionState.GONE and not is_good:
            raise self._gone_error()
        self.end()
        self.end_answer = answer

    async def _recorded(self, entry: Coroutine[Any, Any, None]) -> None:
        """Awaits an entry of the journal. The idle time stands still meanwhile."""
        began_s = self._loop.time()
        self._num_recording += 1
        try:
            await entry
        finally:
            self._num_recording -= 1
            now_s = self._loop.time()
            self._last_activity_s = min(now_s, self._last_activity_s + now_s - began_s)
            self._changed.set()

    def _answer_to_end(self) -> dict[str, Any]:
        return {"id": self.id, "ended": True, "problem": self.problem or None}

    def restore(self, recorded: RecordedSession) -> None:
        """Continues a session of another server, whose turns the conversation has already."""
        claim = recorded.claim
        address, token, name = claim["claimant"]
        self.claimant = Claimant(address=address, token=token, name=name)
        self.claim_id = claim["claim"]
        self.asked = AskedLimits(deadline_s=claim["deadline_s"], idle_timeout_s=claim["idle_timeout_s"])
        self.claim()
        conversation, turns = self.conversation, [one.sampled for one in recorded.turns]
        for one in recorded.turns:
            self._calls.restore(one.call_id, one.digest, one.sampled)
            if one.response is not None:
                kept = KeptResponse.of(one.sampled, one.response, created_s=one.created_s)
                self.kept.keep(one.call_id, kept)
        for id in recorded.deleted:
            self.kept.delete(id)
        for posted in recorded.posted:
            self.set_reward(**posted)
        if turns:
            self.num_served, self.last_sampled = len(turns), turns[-1]
            conversation.generation_s = recorded.generation_s
            conversation.policy.resume(
                num_requests=recorded.num_requests,
                num_sampled=sum(len(one.token_ids) for one in turns),
                used_s=recorded.used_s,
            )
        if self.journal is not None:
            self.journal.continues(
                [one.turn for one in turns if one.turn is not None],
                num_entries=recorded.num_entries,
                num_bytes=recorded.num_bytes,
                shared=recorded.shared,
            )
        if recorded.ended is not None:
            self.budget = FinishReason[recorded.ended["budget"]] if recorded.ended["budget"] else None
            self.end_answer = self._answer_to_end()
            self.end()

    async def sample_turn(self, messages: list[dict[str, Any]], **options: Any) -> SampledTurn:
        """Calls Conversation.sample_turn within the session's budget. Also raises SessionGoneError."""
        return await self._sampled(lambda: self.conversation.sample_turn(messages, **options))

    async def continue_tokens(self, prompt_ids: list[int], **options: Any) -> SampledTurn:
        """Calls Conversation.continue_tokens within the session's budget. Also raises SessionGoneError."""
        return await self._sampled(lambda: self.conversation.continue_tokens(prompt_ids, **options))

    async def count_tokens(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]]) -> int:
        """Returns the length of the prompt for these messages, in tokens; a sign of life, like `hear`.

        Raises EpisodeError if the messages cannot be rendered, and SessionGoneError.
        """
        self.check_open()
        try:
            num_tokens = await self.conversation.num_prompt_tokens(messages, tools=tools)
        except EpisodeError:
            raise
        except RAISED_BY_TASKS as error:
            raise _unusable(error) from error
        self.hear()
        return num_tokens

    def set_reward(
        self,
        value: float | None = None,
        *,
        completion_id: str = "",
        turns: Mapping[str, float] = _NONE,
        metrics: Mapping[str, float] = _NONE,
        label: str = "",
    ) -> None:
        """Sets the reward of the whole sample, or of one turn; the last values count, so the request may be
        repeated. Sets everything or nothing.

        `turns`: rewards of turns, by the ids of their completions. `metrics`: numbers that are not part of
        the reward. Raises ValueError for a number that is too large, too many metrics, or a completion that
        is not of this session, and SessionGoneError.
        """
        self.check_open()
        by_id = dict(turns)
        if completion_id and value is not None:
            by_id[completion_id], value = value, None
        for number in (*by_id.values(), *([] if value is None else [value])):
            if not abs(number) <= LARGEST_REWARD:  # also if it is NaN
                raise ValueError(
                    f"reward must be a finite number of at most {LARGEST_REWARD:g} in size, got {number}"
                )
        rewards = {self._turn_of(id): number for id, number in by_id.items()}
        merged = {**self.metrics, **metrics}
        if len(merged) > MAX_METRICS:
            raise ValueError(f"metrics: a sample may have {MAX_METRICS} names, and would have {len(merged)}")
        self._turn_rewards |= {turn: number for turn, number in rewards.items() if turn is not None}
        self.metrics, self.label = merged, label or self.label
        if value is not None:
            self.reward = value

    def _turn_of(self, completion_id: str) -> Turn | None:
        """Returns the turn of a completion; None if it has no tokens. Raises ValueError."""
        call = self._calls.find(completion_id)
        if call is None:
            raise ValueError(f"completion_id {completion_id!r:.100} names no completion of this session")
        return call.task.result().turn

    @property
    def has_rewards(self) -> bool:
        """True if a reward was posted, for the sample or for a turn."""
        return self.reward is not None or bool(self._turn_rewards)

    def touch(self) -> None:
        """Restarts the idle time. A refused request does not: its client may repeat it forever."""
        self._last_activity_s = self._loop.time()

    def hear(self) -> None:
        """Records a sign of life: a request from its agent that is not to the model. Raises
        SessionGoneError."""
        self.check_open()
        if self.now_s - max(one._served_s for one in self.members) < self.heartbeat_limit_s:
            self.num_heard += 1
            self._keep_open()
            self._changed.set()

    def _keep_open(self) -> None:
        """Restarts the idle time of all sessions that were claimed together."""
        for one in self.members:
            one.touch()

    @property
    def problem_of_engine(self) -> str:
        """What has failed at the engine; empty: nothing."""
        return "" if self.failure is None else f"the engine failed: {self.failure}"

    @property
    def problem(self) -> str:
        """Why there is no sample, or would be none if it ended now; empty if there is one, or would be."""
        if self.outcome is not None:
            return self.lost
        if self.failure is not None:
            return self.problem_of_engine
        if not self.num_served:
            return "no request to the model was answered: send requests to the session's base_url"
        if self.needs_reward and not self.has_rewards:
            return "no reward was posted, and the task computes none: post one before the end"
        return ""

    def check_open(self) -> None:
        if self.state is not SessionState.OPEN:
            raise self._gone_error()
        if self.journal is not None:
            self.journal.check()

    @property
    def is_elsewhere(self) -> bool:
        """True if this server has lost its lease to another one."""
        return self.journal is not None and self.journal.state is JournalState.MOVED

    def _gone_error(self) -> ArealError:
        return SessionMovedError(self.gone) if self.moves else SessionGoneError(self.gone)

    @property
    def gone(self) -> str:
        """Message for later requests."""
        return self.reason or f"the session {self.id} has ended: claim another session"

    def finish(self) -> list[float]:
        """Drops the turns that no client has read; returns the rewards of the others, in order."""
        sampled_turns: dict[Turn, SampledTurn] = {}
        newest = self.conversation.turns[-1] if self.conversation.turns else None
        for call, sampled in self._calls.completed():
            if (turn := sampled.turn) is None:
                continue
            sampled_turns[turn] = sampled
            was_cut = sampled.reply.finish_reason is FinishReason.TIMEOUT
            if not (call.is_read or was_cut or turn in self._turn_rewards):
                self.conversation.forget(turn)
        turns = self.conversation.turns
        if turns:
            self.last_sampled = sampled_turns.get(turns[-1], self.last_sampled)
        if turns and turns[-1] is not newest and self.conversation.finish_reason is not FinishReason.TIMEOUT:
            assert self.last_sampled is not None
            self.conversation.finish_reason = self.last_sampled.reply.finish_reason
        return [self._turn_rewards.get(turn, 0.0) for turn in turns]

    async def _sampled(self, sample: Callable[[], Awaitable[SampledTurn]]) -> SampledTurn:
        self.check_open()
        self.num_calls += 1
        if self.num_pending == 0:
            self.on_move(Place.ENGINE)
        self.num_pending += 1
        if self._on_call is not None:
            self._on_call()
        try:
            if len(self.conversation.turn_lengths) + self.num_pending > self.max_turns:
                raise EpisodeBudgetError(
                    f"the session has had its {self.max_turns} turns (episode.max_turns)",
                    reason=FinishReason.TURNS,
                )
            sampled = await sample()
        except asyncio.CancelledError:
            raise self._gone_error() from None
        except EpisodeBudgetError as error:
            self.budget = error.reason
            raise
        except PromptRefusedError as error:
            self.refused_prompt = error
            raise
        except EngineError as error:
            await self._engine_is_lost()
            self.fail(error)
            raise
        except EpisodeError:
            raise
        except RAISED_BY_TASKS as error:  # only this request fails
            raise _unusable(error) from error
        finally:
            self._was_refused = True
            self.num_pending -= 1
            if self.num_pending == 0 and self.state is SessionState.OPEN:
                self.on_move(Place.TOOL)
            self._changed.set()
        self._keep_open()
        self._served_s = self._last_activity_s
        self.num_served += 1
        self.budget = self.incomplete = None
        self._was_refused = False
        self.last_sampled = sampled
        return sampled

    async def _engine_is_lost(self) -> None:
        """Waits after a failed request. Raises SessionMovedError if the server has lost its engine meanwhile,
        and the session continues at another server."""
        if self.journal is None:
            return
        try:
            await asyncio.sleep(_ENGINE_GRACE_S)
        except asyncio.CancelledError:
            raise self._gone_error() from None

    def _set(self, state: SessionState) -> None:
        self.state = state
        self.touch()
        self._changed.set()

    async def _wait_changed(self, timeout_s: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(None if timeout_s == math.inf else timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass


def restore_session(session: OpenSession, recorded: RecordedSession) -> None:
    """Calls `session.restore`. Raises UnusableJournalError."""
    try:
        session.restore(recorded)
    except (ValueError, TypeError, KeyError, SessionGoneError) as error:
        raise UnusableJournalError(
            f"the session {session.id} cannot be restored: {type(error).__name__}: {error}"
        ) from error


def _unusable(error: BaseException) -> EpisodeError:
    return EpisodeError(f"the messages cannot be used: {type(error).__name__}: {error}")
