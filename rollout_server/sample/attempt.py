"""One attempt to make a sample: an episode, its reward, and the tokens so far if something fails.

    make() -> Trajectory
       `----> EngineError, EpisodeError, RewardError -> num_sampled, without_reward()

An attempt outlives its failure, because `buffer.on_failure` may want what was sampled before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from areal_like.trajectory import Trajectory
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.leases.held_leases import Place
from rollout_server.tasks.base import Split

NOT_WANTED = "its sample is not wanted any more: the job has ended, or another server makes it"
"""What clients of the session of a cancelled lease are told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """The sample to make."""

    split: Split
    index: int
    """Of the example in its split."""
    seed: int
    """Differs between the samples of a group, and from attempt to attempt."""
    is_greedy: bool
    policy: PolicyClient
    on_move: Callable[[Place], None]
    """Called when the sample leaves the engine or comes back."""


class Attempt(ABC):
    """One sample while it is made."""

    @abstractmethod
    async def make(self) -> Trajectory:
        """Runs the episode and computes its reward. Raises EngineError, EpisodeError or RewardError."""

    @property
    @abstractmethod
    def num_sampled(self) -> int:
        """Tokens that the policy has sampled so far."""

    @abstractmethod
    def without_reward(self) -> Trajectory:
        """The tokens so far, with reward 0. Raises ValueError if they cannot be trained on."""
