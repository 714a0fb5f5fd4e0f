"""Credit of turns and tokens compared with vectors computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from areal_like.trajectory import TOKEN_REWARDS, FinishReason, Trajectory
from trainer.advantages import ADVANTAGES, Advantage, FloatArray
from trainer.advantages.gae import Gae
from trainer.advantages.turns import (
    discounts_of_tokens,
    group_advantages,
    rewards_of_tokens,
    turn_returns,
)
from trainer.objectives.oapl import SoftAdvantage
from trainer.step.recipe import StepRecipe


def sample(
    *turn_rewards: float,
    outcome: float = 0.0,
    lengths: Sequence[int] = (2, 2, 2),
    token_rewards: Sequence[float] = (),
    is_greedy: bool = False,
) -> Trajectory:
    """One prompt token before each turn; turn k has lengths[k] sampled tokens and its reward.

    `token_rewards`: of all tokens, prompt tokens included.
    """
    mask: list[int] = []
    ends = []
    for _, length in zip(turn_rewards, lengths, strict=False):
        mask += [0] + [1] * length
        ends.append(len(mask))
    mask_T = np.array(mask, np.uint8)
    inner = sum(turn_rewards) + float(np.dot(mask_T, token_rewards) if token_rewards else 0.0)
    return Trajectory(
        tokens=np.arange(len(mask), dtype=np.int32),
        loss_mask=mask_T,
        logprobs=-mask_T.astype(np.float32),
        versions=np.where(mask_T, 0, -1).astype(np.int32),
        reward=inner + outcome,
        turns=tuple(zip(ends, turn_rewards, strict=True)) if len(ends) > 1 else (),
        arrays={TOKEN_REWARDS: np.array(token_rewards, np.float32)} if token_rewards else {},
        finish_reason=FinishReason.STOP,
        is_greedy=is_greedy,
    )


def advantages(
    settings: dict[str, Any] | Advantage, group: Sequence[Trajectory], *, turn_discount: float
) -> list[list[float]]:
    """[G][K] the advantage of each turn, from its last token; all tokens of a turn have the same."""
    estimator = settings if isinstance(settings, Advantage) else ADVANTAGES.build(settings)
    assert isinstance(estimator, Advantage)
    found = []
    for trajectory, advantage in zip(
        group, group_advantages(estimator, group, turn_discount=turn_discount), strict=True
    ):
        all_T: FloatArray = np.broadcast_to(advantage, (trajectory.num_tokens,))
        ends = [end for end, _ in trajectory.turns] or [trajectory.num_tokens]
        assert all(all_T[end - 1] == all_T[end - 2] for end in ends)
        found.append([float(all_T[end - 1]) for end in ends])
    return found


THREE = [sample(0.5, 0.0, 0.0, outcome=1.0), sample(0.2, 0.0), sample(1.0)]
"""Rewards of turns [.5, 0, 1], [.2, 0] and [1]; with a discount of .5 the returns are those below."""
RETURNS = [[0.75, 0.5, 1.0], [0.2, 0.0], [1.0]]


def test_returns_of_turns() -> None:
    for trajectory, want in zip(THREE, RETURNS, strict=True):
        assert turn_returns(trajectory, turn_discount=0.5).tolist() == pytest.approx(want)
    assert turn_returns(THREE[0], turn_discount=1.0).tolist() == pytest.approx([1.5, 1.0, 1.0])


def test_each_turn_is_compared_with_the_same_turn() -> None:
    # Turn 1: .75 .2 1 (mean .65); turn 2: .5 0 1 (mean .5); turn 3: 1 0 1 (mean 2/3).
    centered = [[0.1, 0.0, 1 / 3], [-0.45, -0.5], [0.35]]
    flat = [a for each in centered for a in each]
    for settings, factor in (({"name": "dr_grpo"}, 1.0), ({"name": "rloo"}, 1.5)):
        got = advantages(settings, THREE, turn_discount=0.5)
        assert [len(each) for each in got] == [3, 2, 1]
        assert [a for each in got for a in each] == pytest.approx([factor * a for a in flat])
    first_std = math.sqrt((0.1**2 + 0.45**2 + 0.35**2) / 3)
    grpo = advantages({"name": "grpo"}, THREE, turn_discount=0.5)
    assert [grpo[0][0], grpo[1][0], grpo[2][0]] == pytest.approx(
        [0.1 / first_std, -0.45 / first_std, 0.35 / first_std]
    )
    assert grpo[0][2] == pytest.approx((1 / 3) / math.sqrt(2 / 9))


def test_remax_compares_with_the_turns_of_the_greedy_sample() -> None:
    group = [sample(0.5, 0.0, outcome=1.0), sample(0.25, is_greedy=True)]
    got = advantages({"name": "remax"}, group, turn_discount=1.0)
    assert got[0] == pytest.approx([1.5 - 0.25, 1.0 - 0.25])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "opo", "gpg", "reinforce_pp"])
def test_without_inner_rewards_nothing_changes(name: str) -> None:
    """To the last bit, and as numbers: turns alone make no difference."""
    estimator = ADVANTAGES.build({"name": name})
    assert isinstance(estimator, Advantage)
    group = [sample(0.0, 0.0, outcome=0.3), sample(0.0, outcome=0.7), sample(0.0, 0.0, 0.0, outcome=0.1)]
    whole = estimator.of_group(group)
    assert list(group_advantages(estimator, group, turn_discount=1.0)) == list(whole)
    per_turn = advantages(estimator, [*group[:2], sample(0.0, 1e-300, 0.0, outcome=0.1)], turn_discount=1.0)
    assert per_turn == [[whole[0]] * 2, [whole[1]], [whole[2]] * 3]


def test_discount_alone_prefers_fewer_turns() -> None:
    group = [sample(0.0, 0.0, 0.0, outcome=1.0), sample(0.0, outcome=1.0)]
    got = advantages({"name": "dr_grpo"}, group, turn_discount=0.5)
    assert got[0] == pytest.approx([-0.375, -0.25, 0.0]) and got[1] == pytest.approx([0.375])


def test_rewards_of_tokens_count_in_their_turn() -> None:
    # Tokens: prompt, 2 sampled, tool, 2 sampled. The prompt's reward belongs to no turn.
    trajectory = sample(0.0, 0.0, outcome=1.0, token_rewards=[9.0, 0.25, 0.0, 9.0, 0.0, 0.5])
    assert turn_returns(trajectory, turn_discount=0.5).tolist() == pytest.approx([0.25 + 0.75, 1.5])
    got = advantages({"name": "dr_grpo"}, [trajectory, sample(0.0)], turn_discount=0.5)
    assert got == [pytest.approx([0.5, 0.75]), pytest.approx([-0.5])]


def test_oapl_takes_the_whole_reward() -> None:
    whole = SoftAdvantage().of_group(THREE)
    assert list(group_advantages(SoftAdvantage(), THREE, turn_discount=1.0)) == list(whole)


# --- GAE ---


def test_rewards_lie_where_they_were_given() -> None:
    trajectory = sample(0.5, 0.0, outcome=1.0, token_rewards=[0.0, 0.25, 0.0, 0.0, 0.125, 0.0])
    none_S = np.zeros(4)
    assert rewards_of_tokens(trajectory, penalty_S=none_S).tolist() == [0.25, 0.5, 0.125, 1.0]
    penalty_S = np.array([0.0625, 0.0, 0.0, 0.125])
    penalized = rewards_of_tokens(
        Trajectory(**{**vars(trajectory), "reward": trajectory.reward - 0.1875}), penalty_S=penalty_S
    )
    assert penalized.tolist() == [0.1875, 0.5, 0.125, 0.875]
    plain = sample(0.75)
    assert rewards_of_tokens(plain, penalty_S=np.zeros(2)).tolist() == [0.0, 0.75]


def test_gae_with_a_discount_between_turns() -> None:
    trajectory = sample(0.5, 0.0, outcome=1.0)
    discounts_S = discounts_of_tokens(trajectory, turn_discount=0.5)
    assert discounts_S.tolist() == [1.0, 0.5, 1.0, 1.0]
    values_S = np.array([0.2, 0.4, 0.6, 0.8])
    rewards_S = rewards_of_tokens(trajectory, penalty_S=np.zeros(4))
    estimator = Gae(gamma=0.5, lam=0.5, lam_critic=1.0)
    ((got_S, targets_S),) = estimator.of_samples([rewards_S], [values_S], discounts=[discounts_S])
    # delta: .5 * .4 - .2 = 0;  .5 + .25 * .6 - .4 = .25;  .5 * .8 - .6 = -.2;  1 - .8 = .2
    # A: .2;  -.2 + .25 * .2 = -.15;  .25 + .125 * -.15 = .23125;  0 + .25 * .23125
    assert got_S.tolist() == pytest.approx([0.0578125, 0.23125, -0.15, 0.2])
    # Returns: 1;  .5;  .5 + .25 * .5 = .625;  .3125
    assert targets_S.tolist() == pytest.approx([0.3125, 0.625, 0.5, 1.0])


def test_gae_of_one_turn_ignores_the_discount() -> None:
    rng = np.random.default_rng(0)
    rewards_S, values_S = rng.standard_normal((2, 5))
    discounts_S = discounts_of_tokens(sample(0.0, lengths=[5]), turn_discount=0.5)
    with_turns, without = Gae(gamma=0.97).of_samples(
        [rewards_S] * 2, [values_S] * 2, discounts=[discounts_S, 1.0]
    )
    assert all(np.array_equal(left, right) for left, right in zip(with_turns, without, strict=True))


# --- settings ---


def test_recipe_takes_the_turn_discount() -> None:
    config = from_mapping({"advantage": {"name": "rloo", "turn_discount": 0.9}})
    assert StepRecipe.of(config).turn_discount == 0.9
    assert StepRecipe.of(from_mapping({})).turn_discount == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"advantage": {"name": "grpo", "turn_discount": 0}}, "above 0 and at most 1"),
        ({"advantage": {"name": "gae", "turn_discount": 1.5}}, "above 0 and at most 1"),
        ({"advantage": {"name": "grpo", "turn_discount": "half"}}, "above 0 and at most 1"),
        ({"advantage": {"name": "grpo", "turn_discount": True}}, "above 0 and at most 1"),
        (
            {"advantage": {"name": "grpo", "turn_discount": 0.5}, "objective": {"name": "oapl"}},
            r"set advantage\.turn_discount=1",
        ),
    ],
)
def test_error_messages_for_invalid_discounts(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepRecipe.of(from_mapping(sections))
