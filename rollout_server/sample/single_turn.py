"""An attempt of one prompt and one answer, or of any `Episode`, scored by the task's reward."""

from __future__ import annotations

import asyncio

from areal_like.errors import RAISED_BY_TASKS, EngineError, EpisodeError, RewardError
from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.conversation.policy_client import Episode, Tokenizer
from rollout_server.conversation.scoring import Outcome, add_up
from rollout_server.conversation.transcript import Transcript
from rollout_server.leases.held_leases import Place
from rollout_server.sample.attempt import Attempt, SampleRequest
from rollout_server.sample.prompt_leader import PromptLeader
from rollout_server.sample.prompt_loader import Prompt
from rollout_server.tasks.base import Completion
from rollout_server.workers.reward_pool import RewardPool


class SingleTurnAttempt(Attempt):
    """A prompt that an `Episode` extends, scored by the task's reward."""

    def __init__(
        self,
        request: SampleRequest,
        *,
        prompt: Prompt,
        leader: PromptLeader,
        episode: Episode,
        tokenizer: Tokenizer,
        rewards: RewardPool,
    ) -> None:
        """`leader`: is told when the prompt is computed."""
        self._request = request
        self._prompt = prompt
        self._leader = leader
        self._episode = episode
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._transcript = Transcript()

    async def make(self) -> Trajectory:
        """As Attempt.make."""
        loop, request = asyncio.get_running_loop(), self._request
        self._transcript.append_context(self._prompt.tokens_P)
        started_s = loop.time()
        text = await self._run_episode()
        self._leader.prompt_computed()  # an answer of one token was not reported before
        generation_s = loop.time() - started_s
        request.on_move(Place.REWARD)
        transcript = self._transcript
        completion = Completion(
            text,
            raw_text=self._tokenizer.text_of(transcript.last_turn.tolist()),
            token_ids=transcript.sampled,  # type: ignore[arg-type]  # an array is as good as a sequence
            turn_lengths=[end - first for first, end in transcript.spans],
            finish_reason=transcript.finish_reason,
        )
        reward = await self._rewards.score(split=request.split, index=request.index, completion=completion)
        try:
            outcome = add_up(reward.score, num_turns=len(completion.turn_lengths))
        except ValueError as error:
            raise RewardError(str(error)) from None
        try:
            return transcript.to_trajectory(
                outcome,
                generation_s=generation_s,
                reward_s=reward.seconds,
                is_greedy=request.is_greedy,
                label=self._prompt.example.label,
            )
        except ValueError as error:
            raise EngineError(f"the engine's answer cannot be used: {error}") from None

    @property
    def num_sampled(self) -> int:
        """As Attempt.num_sampled."""
        return self._transcript.num_sampled

    def without_reward(self) -> Trajectory:
        """As Attempt.without_reward."""
        if not self.num_sampled or self._transcript.finish_reason is FinishReason.ABORT:
            raise ValueError("nothing was sampled, or the last turn was interrupted")
        return self._transcript.to_trajectory(
            Outcome(), is_greedy=self._request.is_greedy, label=self._prompt.example.label
        )

    async def _run_episode(self) -> str:
        """The completion. Raises EngineError, RewardError, or EpisodeError for any other exception."""
        try:
            return await self._episode.run(
                self._prompt.example, self._request.policy, self._tokenizer, self._transcript
            )
        except (EngineError, EpisodeError, RewardError):
            raise
        except RAISED_BY_TASKS as error:  # only its own sample fails
            raise EpisodeError(f"the episode raised {type(error).__name__}: {error}") from error
