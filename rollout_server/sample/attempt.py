"""One attempt to make a sample: the policy's turns, their reward, and the tokens so far if something fails.

    make(): play() -> the task's reward -> Trajectory
       `----> EngineError, EpisodeError, RewardError -> num_sampled, without_reward()

Who plays is the difference between the kinds of samples: one prompt and one completion (here), a
conversation with an environment (environment_attempt.py), or a program that asks for each turn
(session_attempt.py). An attempt outlives its failure, because `buffer.on_failure` may want what was sampled
before it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from areal_like.errors import EngineError, RewardError
from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.scoring import Outcome, add_up, both
from rollout_server.conversation.turns import Turns
from rollout_server.environments.base import Message
from rollout_server.leases.held_leases import Place
from rollout_server.sample.prompt_leader import PromptLeader
from rollout_server.sample.prompt_loader import Prompt
from rollout_server.sources import Renderer
from rollout_server.tasks.base import Completion, Score, Split
from rollout_server.workers.reward_pool import Reward, RewardPool

NOT_WANTED = "its sample is not wanted any more: the job has ended, or another server makes it"
"""What clients of the session of a cancelled lease are told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """The sample to make."""

    split: Split
    index: int
    """Position of the example in its split."""
    seed: int
    """Differs between the samples of a group, and from attempt to attempt."""
    is_greedy: bool
    policy: PolicyClient
    on_move: Callable[[Place], None]
    """Called when the sample leaves the engine or comes back."""
    rewards: RewardPool | None
    """None if the task has no reward of this example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """How the turns of a sample have ended."""

    finish_reason: FinishReason
    generation_s: float
    """Time at the engine."""
    text: str
    """The last turn, for the reward."""
    raw_text: str
    messages: Sequence[Message] = ()
    """The whole conversation; empty for one prompt and one completion."""
    step_rewards: Sequence[float] = ()
    """Rewards of the turns, at most one for each."""
    metrics: Mapping[str, float] | None = None
    score: Score | None = None
    """What an agent returned; the task's score is added to it."""


class Attempt(ABC):
    """One sample while it is made."""

    def __init__(self, request: SampleRequest, turns: Turns, *, label: str = "") -> None:
        """`label`: of the example, if it is known already."""
        self._request = request
        self._turns = turns
        self._label = label

    @abstractmethod
    async def play(self) -> Played:
        """Samples the turns. Raises EngineError, EpisodeError or RewardError."""

    async def make(self) -> Trajectory:
        """Samples the turns and computes their reward. Raises EngineError, EpisodeError or RewardError."""
        played = await self.play()
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
                split=request.split, index=request.index, completion=completion
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
            raise EngineError(f"the engine's answer cannot be used: {error}") from None

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy has sampled so far."""
        return self._request.policy.num_sampled

    def without_reward(self) -> Trajectory:
        """The turns so far, with reward 0. Raises ValueError if they cannot be trained on."""
        return self._turns.to_trajectory(Outcome(), is_greedy=self._request.is_greedy, label=self._label)


class SingleTurn(Attempt):
    """A sample of one turn."""

    def __init__(
        self, request: SampleRequest, *, prompt: Prompt, leader: PromptLeader, renderer: Renderer
    ) -> None:
        """`leader`: is told when the prompt is computed."""
        super().__init__(request, Turns(request.policy), label=prompt.example.label)
        self._prompt = prompt
        self._leader = leader
        self._renderer = renderer

    async def play(self) -> Played:
        """Samples the turn. Raises EngineError."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        generation, _ = await self._turns.sample(self._prompt.tokens_P)
        self._leader.prompt_computed()  # a completion of one token was not reported before
        return Played(
            finish_reason=generation.finish_reason,
            generation_s=loop.time() - started_s,
            text=self._renderer.decode(generation.output_ids),
            raw_text=self._renderer.text_of(generation.output_ids.tolist()),
        )
