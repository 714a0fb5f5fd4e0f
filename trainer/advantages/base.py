"""Base classes and registry of advantage estimators.

`Estimator` is the base of all. `Advantage` compares a sample with the other samples of its prompt
(`group.py`); GAE compares each token with the values of a critic (`gae.py`).

Shape suffixes: G samples of a group, S sampled tokens of the step over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from areal_like.config.common import Section
from areal_like.errors import ConfigError
from areal_like.registry import Registry
from areal_like.trajectory import Trajectory, are_equal_rewards
from trainer.advantages.parts import PartContext
from trainer.batching.scope import Scope

FloatArray = NDArray[np.float64]


class Estimator(Section, key="advantage"):
    """Base of all advantage estimators.

    An estimator of scope BATCH overrides `rescale`. One that remembers earlier steps overrides
    `initial_state`, `next_state` and `shift`; its state is a few numbers, the same on every rank, which
    checkpoints store.
    """

    scope: Scope = Scope.GROUP
    """BATCH: `rescale` is called, and no gradient is computed before the step's last group has arrived."""
    uses_greedy: bool = False
    """True: every group must have a greedy sample (`sampling.greedy_baseline`)."""
    takes_parts: bool = False
    """True: it can be used with `buffer.overdue=close`, where a step also has parts of groups."""
    credits_steps: bool = False
    """True: it compares rewards of steps (`process.py`), so a step's metrics and the history have them."""
    history_decay: float = 0.9
    """For parts: weight of a step's mean reward relative to that of the next step, in the running mean."""

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        """Returns (shift, factor), the same on every rank.

        Every advantage `a` of the step becomes `(a + shift) * factor`.

        `advantages_S`: the advantages of all sampled tokens of the step over all ranks. `groups_S`: the
        position of each token's group.
        """
        return 0.0, 1.0

    def initial_state(self) -> tuple[float, ...]:
        """The state before the first step; empty: none."""
        return ()

    def next_state(self, state: Sequence[float], *, mean_reward: float) -> tuple[float, ...]:
        """The state after a step whose samples, over all ranks, had this mean reward (after shaping)."""
        return tuple(state)

    def shift(self, state: Sequence[float]) -> float:
        """A number that is added to every advantage of the next step."""
        return 0.0


def whitening(advantages_S: FloatArray) -> tuple[float, float]:
    """(-mean, 1 / population standard deviation) of the step; (0, 0), which zeroes all, if all are equal."""
    if not len(advantages_S) or are_equal_rewards((advantages_S.min(), advantages_S.max())):
        return 0.0, 0.0
    return -float(advantages_S.mean()), 1 / float(advantages_S.std())


class Advantage(Estimator, ABC):
    """Base of estimators that compare the samples of one group. A subclass implements `of_group`.

    A custom estimator is a dataclass in the user's module: `advantage._target_=my_module.MyAdvantage`.
    """

    credits_turns: bool = True
    """True: in groups with rewards of turns, or with a discount between turns, `of_group` is called once for
    each turn (`turns.py`). False: it is called once, and sees the samples' whole rewards."""

    @property
    def compares_samples(self) -> bool:
        """True if `of_group` depends on the other samples of the group."""
        return True

    @abstractmethod
    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float | FloatArray]:
        """Advantage of each sample: one number for all its tokens, or an array [num_tokens].

        With `uses_greedy` the last sample of the group is the greedy one; the advantage returned for it is
        ignored.
        """

    def of_partial(self, trajectory: Trajectory, context: PartContext) -> float | FloatArray:
        """With `buffer.overdue=close`: the advantage of one sample: a number, or an array [num_tokens].

        `trajectory`: with its reward after shaping. By default `of_part` of that reward.
        """
        return self.of_part(trajectory.reward, context)

    def of_part(self, reward: float, context: PartContext) -> float:
        """With `buffer.overdue=close`: the advantage of one sample with this reward (after shaping).

        It must be the same function for each sample of a group, early or late, and `context` has only what is
        independent of the sample's own completion. No `rescale` and no `shift` follow.
        """
        raise ConfigError(
            f"advantage {type(self).__name__} cannot train on parts of groups, and this step has some, which "
            "were recorded with buffer.overdue=close"
        )


ADVANTAGES = Registry[Estimator]("advantage", Estimator)


def rewards_of(group: Sequence[Trajectory]) -> FloatArray:
    """[G] reward of each sample."""
    return np.array([trajectory.reward for trajectory in group], dtype=np.float64)
