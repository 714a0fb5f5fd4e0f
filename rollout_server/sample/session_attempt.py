"""An attempt to make one sample in a session, by the task's `agent()` or by an external agent.

    agent():  its process runs -> it returns a score                       -> ended
    outside:  waiting -> claimed -> POST end                               -> ended
    both:     no request for sessions.idle_timeout_s                       -> a failed sample
              rollout.sample_timeout_s                                     -> a truncated sample
              no turn at all                                               -> a failed sample

A request that exceeds the budget is refused in the API's own format. If an agent raises because of that, the
sample is truncated and keeps the rewards so far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from areal_like.errors import (
    AgentLostError,
    EngineError,
    EnvironmentLostError,
    EpisodeError,
    PromptRefusedError,
)
from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.scoring import add_up
from rollout_server.leases.held_leases import Place
from rollout_server.sample.attempt import NOT_WANTED, Attempt, Played, SampleRequest
from rollout_server.sessions.book import SessionBook, SessionOutcome
from rollout_server.sessions.open_session import OpenSession
from rollout_server.tasks.base import Score

RunAgent = Callable[[OpenSession, SampleRequest], Awaitable[Score | None]]
"""Runs the task's `agent()` in a process; returns its score. Raises EpisodeError. Cancelling it stops the
agent."""


@dataclass(kw_only=True)
class SessionAttempt(Attempt):
    """A sample that an agent makes."""

    turns: Conversation
    session: OpenSession
    book: SessionBook
    idle_timeout_s: float
    run_agent: RunAgent | None
    """None for external agents."""
    _outcome: SessionOutcome = field(default=SessionOutcome.FAILED, init=False)

    async def play(self) -> Played:
        session, conversation = self.session, self.turns
        self.book.add(session)
        problem: EpisodeError | PromptRefusedError | None = None
        try:
            score, limit = await self._run()
            session.end()
            turn_rewards = session.finish()
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
            session.close(str(cancelled.args[0]) if cancelled.args else NOT_WANTED)
            self._outcome = SessionOutcome.CANCELLED
            raise
        finally:
            is_of_sample = self.book.remove(session, self._outcome, str(problem or ""))
        if problem is not None:
            raise self._failure(problem, is_of_sample=is_of_sample)
        last, sampled = conversation.turns[-1], session.last_sampled
        return Played(
            finish_reason=finish_reason,
            text=sampled.reply.text if sampled is not None else "",
            raw_text=sampled.reply.raw_text if sampled is not None else "",
            messages=last.messages,
            step_rewards=turn_rewards,
            metrics={"tool_calls": float(conversation.num_tool_calls)},
            score=score,
        )

    def without_reward(self) -> Trajectory:
        """Returns the turns that a client has read, with reward 0. Raises ValueError if they cannot be
        trained on."""
        self.session.finish()
        return super().without_reward()

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
        return f"{made} ({refused} is not served: chat/completions is)" if refused else made

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
                session.close("the session had no request that could be served for too long")
                return self._posted(), session.budget or FinishReason.STOP
            if limit == "deadline":
                session.close("the session timed out (rollout.sample_timeout_s)")
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
            # The agent may end because its last request was refused: then the sample is truncated.
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

    def _idle(self) -> EpisodeError:
        problem = (
            f"the session {self.session.id} had no request for "
            f"sessions.idle_timeout_s={self.idle_timeout_s:g}"
        )
        self.session.close(problem)
        self._outcome = SessionOutcome.IDLE
        return EpisodeError(problem)


def _check_posted(score: Score | None, turn_rewards: list[float], *, num_turns: int) -> None:
    """Raises EpisodeError if an external agent's rewards do not add up. That is not a RewardError, because
    failures of the task's own reward may end a job at its start."""
    try:
        add_up(score, num_turns=num_turns, step_rewards=turn_rewards)
    except ValueError as error:
        raise EpisodeError(f"the rewards that were posted cannot be used: {error}") from None
