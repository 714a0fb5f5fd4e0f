"""One attempt to make a sample: the policy's turns, their reward, and the partial tokens after a failure.

    make(): play() -> the task's reward -> Trajectory
               `----> log-probs of its teacher --^    (a teacher at a server)
       `----> EngineError, EpisodeError, RewardError, TeacherError -> num_sampled, without_reward()

The kinds of samples differ only in how turns are played: one prompt and one completion (`SingleTurn`), a
conversation with an environment (`EnvironmentAttempt`), or a program that requests each turn
(`SessionAttempt`). An attempt outlives its failure, because `buffer.on_failure` may use the tokens sampled
before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import (
    RAISED_BY_TASKS,
    AgentLostError,
    EngineError,
    EnvironmentLostError,
    EpisodeBudgetError,
    EpisodeError,
    PromptRefusedError,
    RewardError,
)
from areal_like.trajectory import (
    LARGEST_METRIC,
    LARGEST_REWARD,
    TEACHER_LOGPROBS,
    FinishReason,
    Trajectory,
)
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampleRewards, Turns, add_up, both
from rollout_server.environments.base import Message, Reply, Step
from rollout_server.leases.held_leases import Place
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.rewards.step_tokens import tokens_of_ends
from rollout_server.sample.prompts import LoadedPrompt, PromptLeader
from rollout_server.sessions.book import JOB_OVER, SessionBook
from rollout_server.sessions.open_session import OpenSession, SessionOutcome
from rollout_server.tasks.base import Completion, Score, Split
from rollout_server.teachers.pool import TeacherPool
from rollout_server.workers.environment_pool import EnvironmentPool, EnvironmentSession
from rollout_server.workers.reward_pool import Reward, RewardPool

NOT_WANTED = (
    "its sample is no longer needed, because the job has ended or another server makes it: "
    "claim another session"
)
"""Message to clients of a session whose lease was cancelled."""
_MAX_METRICS = 64
"""Maximum number of metric names in one episode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """A request to make one sample."""

    split: Split
    index: int
    """Position of the example in its split."""
    seed: int
    """Differs between the samples of a group, and between attempts."""
    is_greedy: bool
    policy: PolicyClient
    on_move: Callable[[Place], None]
    """Called when the sample leaves the engine or comes back to it."""
    rewards: RewardPool | None
    """None if the task has no reward for this example."""
    teachers: TeacherPool | None = None
    """None if no teacher at a server scores this sample."""


RunAgent = Callable[[OpenSession, SampleRequest], Awaitable[Score | None]]
"""Runs the task's `agent()` in a process; returns its score. Raises EpisodeError. Cancelling it stops the
agent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """The outcome of a sample's turns."""

    finish_reason: FinishReason
    text: str
    """The last turn, for the reward."""
    raw_text: str
    messages: Sequence[Message] = ()
    """The whole conversation; empty for one prompt and one completion."""
    step_rewards: Sequence[float] = ()
    """Rewards of the turns, at most one per turn."""
    metrics: Mapping[str, float] | None = None
    score: Score | None = None
    """The score that an agent returned; the task's score is added to it."""


@dataclass(kw_only=True)
class Attempt(ABC):
    """One sample while it is being made."""

    request: SampleRequest
    turns: Turns
    label: str = ""
    """The example's label; an environment reports it."""

    @abstractmethod
    async def play(self) -> Played:
        """Samples the turns. Raises EngineError, or any other exception that fails the sample."""

    async def make(self) -> Trajectory:
        """Samples the turns and computes their reward, and beside it the log-probs of their teacher.

        Raises EngineError, EpisodeError, RewardError or TeacherError.
        """
        try:
            played = await self.play()
        except (EngineError, EpisodeError):
            raise
        except RAISED_BY_TASKS as error:  # also raised by renderers: only this sample fails
            raise EpisodeError(f"the episode raised {type(error).__name__}: {error}") from error
        if self.request.teachers is None:
            return await self._scored(played)
        self.request.on_move(Place.REWARD)
        async with _scoring(self.request.teachers, self._unscored(played)) as scoring:
            trajectory = await self._scored(played)
            return _with_teacher(trajectory, await scoring)

    async def _scored(self, played: Played) -> Trajectory:
        """The sample with its reward."""
        turns, request = self.turns, self.request
        turn_lengths = turns.turn_lengths
        scored: Reward | None = None
        if request.rewards is not None:
            request.on_move(Place.REWARD)
            completion = Completion(
                played.text,
                raw_text=played.raw_text,
                messages=played.messages,
                token_ids=turns.token_ids,  # type: ignore[arg-type]  # an array is as good as a sequence
                turn_lengths=turn_lengths,
                finish_reason=played.finish_reason,
            )
            scored = await request.rewards.score(
                split=request.split, index=request.index, completion=completion
            )
        try:
            score = both(played.score, scored.score if scored is not None else None)
            outcome = add_up(
                score,
                num_turns=len(turn_lengths),
                step_ends=self._step_ends(score, played.text),
                step_rewards=played.step_rewards,
                step_metrics=played.metrics,
            )
        except ValueError as error:
            raise self._too_much(str(error)) from None
        try:
            return turns.to_trajectory(
                outcome,
                finish_reason=played.finish_reason,
                reward_s=scored.seconds if scored is not None else 0.0,
                is_greedy=request.is_greedy,
                label=self.label,
            )
        except ValueError as error:
            raise EngineError(f"the engine's completion cannot be used: {error}") from None

    def _unscored(self, played: Played) -> Trajectory:
        """The sample without its reward. Raises EngineError."""
        try:
            return self.turns.to_trajectory(
                SampleRewards(), finish_reason=played.finish_reason, label=self.label
            )
        except ValueError as error:
            raise EngineError(f"the engine's completion cannot be used: {error}") from None

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of sampled tokens without special tokens."""

    def _step_ends(self, score: Score | None, text: str) -> list[int]:
        """Returns the number of sampled tokens of the last turn up to the end of each step of the score.
        `text`: of that turn, as the reward saw it. Raises RewardError."""
        if score is None or not score.steps:
            return []
        return tokens_of_ends(
            self.turns.turns[-1].sampled.tolist(),
            [int(end) for end, _ in score.steps],
            text=text,
            decode=self.decode,
        )

    def _too_much(self, problem: str) -> RewardError | EpisodeError:
        """Returns the error of a sample whose rewards do not add up."""
        return RewardError(problem)

    @property
    def num_sampled(self) -> int:
        return self.request.policy.num_sampled

    def without_reward(self) -> Trajectory:
        """Returns the turns so far with reward 0. Raises ValueError if they cannot be trained on."""
        return self.turns.to_trajectory(SampleRewards(), is_greedy=self.request.is_greedy, label=self.label)


@dataclass(kw_only=True)
class SingleTurn(Attempt):
    """A sample of one turn."""

    prompt: LoadedPrompt
    leader: PromptLeader
    """Told when the prompt is computed."""
    renderer: PromptRenderer

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.renderer.decode(np.array(token_ids, np.int32))

    async def play(self) -> Played:
        generation, _ = await self.turns.sample(self.prompt.tokens_P)
        self.leader.prompt_computed()  # not reported yet if the completion has one token
        return Played(
            finish_reason=generation.finish_reason,
            text=self.renderer.decode(generation.output_ids),
            raw_text=self.renderer.text_of(generation.output_ids.tolist()),
        )


@dataclass(kw_only=True)
class EnvironmentAttempt(Attempt):
    """A conversation with an environment, until the environment or a budget ends it.

        reset -> [say -> step]* -> done
                     |       |---> episode.max_turns: TURNS;  rollout.sample_timeout_s: TIMEOUT
                     `-----------> no room for the turn: TOKENS, CONTEXT;  turn cut: LENGTH, TIMEOUT

    If a budget runs out, the sample is truncated: it keeps the rewards so far and is trained on like any
    other. If the environment raises, hangs or crashes, the sample fails. A turn that was cut off is not
    passed to the environment, because its response to half a turn would be meaningless.
    """

    turns: Conversation
    environments: EnvironmentPool
    max_turns: int
    _messages: list[Message] = field(default_factory=list, init=False)
    _last: Reply | None = field(default=None, init=False)
    _step_rewards: list[float] = field(default_factory=list, init=False)
    _metrics: dict[str, float] = field(default_factory=dict, init=False)
    """Sums of the environment's metrics over the steps."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.turns.renderer.decode(token_ids, skip_special_tokens=True)

    async def play(self) -> Played:
        request = self.request
        request.on_move(Place.TOOL)
        environment = await self.environments.open(
            split=request.split, index=request.index, seed=request.seed
        )
        try:
            finish_reason = await self._converse(environment)
        finally:
            environment.close()
        return Played(
            finish_reason=finish_reason,
            text=self._last.text if self._last is not None else "",
            raw_text=self._last.raw_text if self._last is not None else "",
            messages=self._messages,
            step_rewards=self._step_rewards,
            metrics={"tool_calls": float(self.turns.num_tool_calls), **self._metrics},
        )

    async def _converse(self, environment: EnvironmentSession) -> FinishReason:
        """Returns why the conversation ended."""
        messages, tools = await environment.reset()
        self.label = environment.label
        self._messages += messages
        for _ in range(self.max_turns):
            self.request.on_move(Place.ENGINE)
            try:
                self._last = reply = await self.turns.say(self._messages, tools=tools)
            except EpisodeBudgetError as error:
                return error.reason
            self._messages.append(reply.message)
            if reply.finish_reason is not FinishReason.STOP:
                return reply.finish_reason
            self.request.on_move(Place.TOOL)
            try:
                async with asyncio.timeout_at(self.request.policy.deadline_s):
                    step = await environment.step(reply)
            except TimeoutError:
                return FinishReason.TIMEOUT
            self._add(step)
            if step.done:
                return FinishReason.STOP
        return FinishReason.TURNS

    def _add(self, step: Step) -> None:
        self._messages += step.messages
        self._step_rewards.append(step.reward)
        for name, value in step.metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value
        if len(self._metrics) > _MAX_METRICS:
            raise EpisodeError(f"the environment has more than {_MAX_METRICS} metrics in one episode")
        if abs(math.fsum(self._step_rewards)) > LARGEST_REWARD:
            raise EpisodeError(f"the rewards of the environment add up to more than {LARGEST_REWARD:g}")
        if max(map(abs, self._metrics.values()), default=0.0) > LARGEST_METRIC:
            raise EpisodeError(f"a metric of the environment adds up to more than {LARGEST_METRIC:.4g}")


@dataclass(kw_only=True)
class SessionAttempt(Attempt):
    """A sample that a program makes in a session: the task's `agent()`, or an external agent.

        agent():  its process runs -> it returns a score                       -> ended
        outside:  waiting -> claimed -> POST end                               -> ended
        both:     no request for sessions.idle_timeout_s                       -> a failed sample
                  rollout.sample_timeout_s                                     -> a truncated sample
                  no turn at all                                               -> a failed sample

    A request that exceeds the budget is refused in the API's own format. If an agent raises because of that,
    or because a response of the Responses API was incomplete, the sample is truncated and keeps the rewards
    so far.
    """

    turns: Conversation
    session: OpenSession
    book: SessionBook
    idle_timeout_s: float
    run_agent: RunAgent | None
    """None for external agents."""
    _outcome: SessionOutcome = field(default=SessionOutcome.FAILED, init=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.turns.renderer.decode(token_ids, skip_special_tokens=True)

    async def make(self) -> Trajectory:
        try:
            return await super().make()
        finally:
            self.book.credit(self.session)

    async def play(self) -> Played:
        session, conversation = self.session, self.turns
        self.book.add(session)
        problem: EpisodeError | PromptRefusedError | None = None
        try:
            score, limit = await self._run()
            session.end()
            turn_rewards = session.finish()
            self.label = self.label or session.label
            finish_reason = limit or conversation.finish_reason
            num_turns = len(conversation.turn_lengths)
            if not num_turns:
                raise session.refused_prompt or EnvironmentLostError(self._no_request())
            if self.run_agent is None:
                _check_posted(score, turn_rewards, num_turns=num_turns)
            self._outcome = SessionOutcome.TRUNCATED if finish_reason.is_truncated else SessionOutcome.ENDED
        except (EpisodeError, PromptRefusedError) as error:
            problem = error
        except EngineError:
            self._outcome = SessionOutcome.ENGINE
            raise
        except asyncio.CancelledError as cancelled:
            reason = str(cancelled.args[0]) if cancelled.args else NOT_WANTED
            session.close(reason, may_continue=reason != JOB_OVER)
            self._outcome = SessionOutcome.CANCELLED
            raise
        finally:
            is_of_sample = self.book.remove(session, self._outcome, str(problem or ""))
        if problem is not None:
            if session.journal is not None:
                await session.journal.forget()  # the sample is offered again in another session
            raise self._failure(problem, is_of_sample=is_of_sample)
        last, sampled = conversation.turns[-1], session.last_sampled
        return Played(
            finish_reason=finish_reason,
            text=sampled.reply.text if sampled is not None else "",
            raw_text=sampled.reply.raw_text if sampled is not None else "",
            messages=last.messages,
            step_rewards=turn_rewards,
            metrics={**session.metrics, "tool_calls": float(conversation.num_tool_calls)},
            score=score,
        )

    def without_reward(self) -> Trajectory:
        """Returns the turns that a client has read, with reward 0. Raises ValueError if they cannot be
        trained on."""
        self.session.finish()
        return super().without_reward()

    def _too_much(self, problem: str) -> RewardError | EpisodeError:
        """The task's own rewards were checked before: what an external agent posted is the cause. Its failure
        must not be a RewardError, because those may end a job at its start."""
        if self.run_agent is not None:
            return super()._too_much(problem)
        problem = f"the rewards that were posted cannot be added to the task's: {problem}"
        return AgentLostError(problem, is_of_sample=self.book.spoil(self.session, problem))

    def _failure(
        self, problem: EpisodeError | PromptRefusedError, *, is_of_sample: bool
    ) -> EpisodeError | PromptRefusedError:
        """Returns the error to fail the sample with; failures of external agents are not attributed to the
        policy."""
        if self.run_agent is not None or (is_of_sample and isinstance(problem, PromptRefusedError)):
            return problem
        return AgentLostError(str(problem), is_of_sample=is_of_sample)

    def _no_request(self) -> str:
        refused = self.session.refused_route
        if self.session.num_served:
            return "the agent was gone before it had read a completion"
        made = "the agent has made no request to the model"
        if not refused:
            return made
        return f"{made} ({refused} is not served: chat/completions, responses and messages are)"

    async def _run(self) -> tuple[Score | None, FinishReason | None]:
        """Returns the agent's score, and the limit that ended the session. Raises EpisodeError,
        EngineError."""
        session = self.session
        self.request.on_move(Place.TOOL)
        running: asyncio.Future[Score | None] | None = None
        if self.run_agent is not None:
            running = asyncio.ensure_future(self.run_agent(session, self.request))
            running.add_done_callback(self._agent_ended)
        try:
            limit = await session.wait_ended(
                idle_timeout_s=self.idle_timeout_s, deadline_s=lambda: self.request.policy.deadline_s
            )
            if session.failure is not None:
                raise session.failure
            if limit == "idle" and session.budget is None:
                raise self._idle()
            if limit == "idle":  # the agent did not end although it was told that there is no room
                session.close(
                    "the session had no request that could be served for too long: claim another session"
                )
                return self._posted(), session.budget or FinishReason.STOP
            if limit == "deadline":
                session.close(f"the session timed out ({self._deadline()}): claim another session")
                return self._posted(), FinishReason.TIMEOUT
            score = await self._result(running)
            is_scored = score is not None or self.request.rewards is not None or session.has_rewards
            if not is_scored and session.budget is None and self.turns.turn_lengths:
                raise self._no_reward()
            return score, session.budget
        finally:
            if running is not None:
                running.cancel()

    def _agent_ended(self, running: asyncio.Future[Score | None]) -> None:
        self.session.end()
        if not running.cancelled():
            running.exception()  # the sample may have ended for another reason

    async def _result(self, running: asyncio.Future[Score | None] | None) -> Score | None:
        """Returns the agent's score, or the posted one."""
        if running is None:
            return self._posted()
        # An agent may end its session itself and compute its score afterwards.
        await asyncio.wait({running}, timeout=self.idle_timeout_s)
        if not running.done():
            raise self._idle()
        try:
            score = running.result()
        except EpisodeError as error:
            if not self.turns.turn_lengths:
                raise self.session.refused_prompt or error from None
            # The agent may end because its last request was refused, or its last response incomplete: then
            # the sample is truncated.
            self.session.budget = self.session.budget or self.session.incomplete
            if self.session.budget is None:
                raise
            return self._posted()
        return self._posted() if score is None else score

    def _posted(self) -> Score | None:
        reward = self.session.reward
        return None if reward is None else Score(value=reward)

    def _no_reward(self) -> EpisodeError:
        if self.run_agent is None:
            problem = (
                "its agent has ended it without a reward (POST .../reward), and the task has no reward()"
            )
            return EnvironmentLostError(f"the session {self.session.id}: {problem}")
        return EpisodeError("agent() returned None and posted no reward, and the task has no reward()")

    def _deadline(self) -> str:
        asked_s = self.session.asked.deadline_s
        is_asked = asked_s <= self.request.policy.timeout_s
        return f"deadline_s={asked_s:g} of its claim" if is_asked else "rollout.sample_timeout_s"

    def _idle(self) -> EpisodeError:
        limit_s = self.session.idle_limit_s(self.idle_timeout_s)
        setting = (
            "sessions.idle_timeout_s" if limit_s == self.idle_timeout_s else "its claim's idle_timeout_s"
        )
        problem = f"the session {self.session.id} had no request for {setting}={limit_s:g}"
        self.session.close(f"{problem}: claim another session")
        self._outcome = SessionOutcome.IDLE
        return EpisodeError(problem)


@contextlib.asynccontextmanager
async def _scoring(
    teachers: TeacherPool, trajectory: Trajectory
) -> AsyncIterator[asyncio.Task[NDArray[np.float32] | None]]:
    """The request to a sample's teacher, in progress; it is cancelled at the end of the block."""
    scoring = asyncio.create_task(teachers.logprobs(trajectory))
    try:
        yield scoring
    finally:
        scoring.cancel()
        await asyncio.wait([scoring])
        if not scoring.cancelled():
            scoring.exception()  # the sample may have failed for another reason


def _with_teacher(trajectory: Trajectory, logprobs_T: NDArray[np.float32] | None) -> Trajectory:
    """The trajectory with the log-probs of its teacher; None: it has no teacher at a server."""
    if logprobs_T is None:
        return trajectory
    return replace(trajectory, arrays={**trajectory.arrays, TEACHER_LOGPROBS: logprobs_T})


def _check_posted(score: Score | None, turn_rewards: list[float], *, num_turns: int) -> None:
    """Raises EpisodeError if an external agent's rewards do not add up. That is not a RewardError, because
    failures of the task's own reward may end a job at its start."""
    try:
        add_up(score, num_turns=num_turns, step_rewards=turn_rewards)
    except ValueError as error:
        raise EpisodeError(f"the rewards that were posted cannot be used: {error}") from None
