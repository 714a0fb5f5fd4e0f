"""One attempt to make a sample: the policy's turns, their reward, and the partial tokens after a failure.

    make(): play() -> the task's reward -> Trajectory
       `----> EngineError, EpisodeError, RewardError -> num_sampled, without_reward()

The kinds of samples differ in how turns are played: one prompt and one completion (here), a conversation with
an environment (environment_attempt.py), or a program that requests each turn (session_attempt.py). An attempt
outlives its failure, because `buffer.on_failure` may use the tokens sampled before it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from areal_like.errors import RAISED_BY_TASKS, EngineError, EpisodeError, RewardError
from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.scoring import SampleRewards, add_up, both
from rollout_server.conversation.turns import Turns
from rollout_server.environments.base import Message
from rollout_server.leases.held_leases import Place
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.sample.prompts import LoadedPrompt, PromptLeader
from rollout_server.tasks.base import Completion, Score, Split
from rollout_server.workers.reward_pool import Reward, RewardPool

NOT_WANTED = "its sample is no longer needed: the job has ended, or another server makes it"
"""Message to clients of a session whose lease was cancelled."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """The outcome of a sample's turns."""

    finish_reason: FinishReason
    generation_s: float
    """Time at the engine, in seconds."""
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


class Attempt(ABC):
    """One sample while it is being made."""

    def __init__(self, request: SampleRequest, turns: Turns, *, label: str = "") -> None:
        """`label`: the example's label, if already known."""
        self._request = request
        self._turns = turns
        self._label = label

    @abstractmethod
    async def play(self) -> Played:
        """Samples the turns. Raises EngineError, or any other exception that fails the sample."""

    async def make(self) -> Trajectory:
        """Samples the turns and computes their reward. Raises EngineError, EpisodeError or RewardError."""
        try:
            played = await self.play()
        except (EngineError, EpisodeError):
            raise
        except RAISED_BY_TASKS as error:  # also raised by renderers: only this sample fails
            raise EpisodeError(f"the episode raised {type(error).__name__}: {error}") from error
        turns, request = self._turns, self._request
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
                split=request.split, index=request.index, completion=completion, label=self._label
            )
        try:
            outcome = add_up(
                both(played.score, scored.score if scored is not None else None),
                num_turns=len(turn_lengths),
                step_rewards=played.step_rewards,
                step_metrics=played.metrics,
            )
        except ValueError as error:
            raise RewardError(str(error)) from None
        try:
            return turns.to_trajectory(
                outcome,
                finish_reason=played.finish_reason,
                generation_s=played.generation_s,
                reward_s=scored.seconds if scored is not None else 0.0,
                is_greedy=request.is_greedy,
                label=self._label,
            )
        except ValueError as error:
            raise EngineError(f"the engine's completion cannot be used: {error}") from None

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy has sampled so far."""
        return self._request.policy.num_sampled

    def without_reward(self) -> Trajectory:
        """Returns the turns so far with reward 0. Raises ValueError if they cannot be trained on."""
        return self._turns.to_trajectory(
            SampleRewards(), is_greedy=self._request.is_greedy, label=self._label
        )


class SingleTurn(Attempt):
    """A sample of one turn."""

    def __init__(
        self, request: SampleRequest, *, prompt: LoadedPrompt, leader: PromptLeader, renderer: PromptRenderer
    ) -> None:
        """`leader`: notified when the prompt is computed."""
        super().__init__(request, Turns(request.policy), label=prompt.example.label)
        self._prompt = prompt
        self._leader = leader
        self._renderer = renderer

    async def play(self) -> Played:
        """Samples the turn."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        generation, _ = await self._turns.sample(self._prompt.tokens_P)
        self._leader.prompt_computed()  # not reported yet if the completion has one token
        return Played(
            finish_reason=generation.finish_reason,
            generation_s=loop.time() - started_s,
            text=self._renderer.decode(generation.output_ids),
            raw_text=self._renderer.text_of(generation.output_ids.tolist()),
        )
