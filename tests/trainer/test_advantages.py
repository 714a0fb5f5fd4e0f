"""Advantages and reward shaping compared with their definitions on small groups."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from tests.support.trainer_helpers import random_groups
from trainer.advantages import ADVANTAGES, Advantage
from trainer.advantages.reward_shaping import SHAPINGS, Shaping, ShapingContext
from trainer.batching.scope import Scope


def group_of(rewards: Sequence[float], *, lengths: Sequence[int] | None = None) -> list[Trajectory]:
    """A group with these rewards; sample i has lengths[i] sampled tokens."""
    (group, *_) = random_groups(1, group_size=len(rewards))
    out = []
    for index, (template, reward) in enumerate(zip(group, rewards, strict=True)):
        num = lengths[index] if lengths else template.num_sampled
        mask = np.array([0] + [1] * num, dtype=np.uint8)
        out.append(
            replace(
                template,
                tokens=np.full(num + 1, 3, dtype=np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
                versions=np.where(mask, 5, -1).astype(np.int32),
                reward=reward,
            )
        )
    return out


def advantages(
    settings: dict[str, Any], rewards: Sequence[float], *, lengths: Sequence[int] | None = None
) -> list[float]:
    """Advantages of one group; with `uses_greedy` the last sample is the greedy one."""
    advantage = ADVANTAGES.build(settings)
    assert isinstance(advantage, Advantage)
    group = group_of(rewards, lengths=lengths)
    if advantage.uses_greedy:
        group[-1] = replace(group[-1], is_greedy=True)
    return [float(a) for a in advantage.of_group(group)]


def step(
    settings: dict[str, Any], groups: Sequence[Sequence[float]], *, tokens: int = 2
) -> list[list[float]]:
    """Advantages of the groups of a step, in which every sample has `tokens` sampled tokens."""
    advantage = ADVANTAGES.build(settings)
    raw = [advantages(settings, group) for group in groups]
    flat = np.repeat([a for group in raw for a in group], tokens)
    positions = np.repeat([i for i, group in enumerate(raw) for _ in group], tokens)
    shift, factor = advantage.rescale(advantages_S=flat, groups_S=positions)
    return [[(a + shift) * factor for a in group] for group in raw]


def test_group_advantages() -> None:
    assert advantages({"name": "grpo"}, [1, 0]) == [1, -1]
    assert advantages({"name": "grpo"}, [1, 0, 0, 0]) == pytest.approx(
        [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]
    )
    assert advantages({"name": "dr_grpo"}, [1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]
    assert advantages({"name": "rloo"}, [1, 0, 0, 0]) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert advantages({"name": "opo"}, [1, 0, 0], lengths=[6, 2, 2]) == pytest.approx([0.4, -0.6, -0.6])
    assert advantages({"name": "remax"}, [1, 0, 0.5, 0.25]) == [0.75, -0.25, 0.25, 0], (
        "the last sample is the greedy one"
    )


GROUP_ADVANTAGES = sorted(set(ADVANTAGES.names()) - {"gae", "prime", "running"})
"""All but `gae`, whose critic may be wrong about a group with equal rewards (see test_gae.py), and `running`,
which compares with earlier steps (see test_running_baseline.py)."""


@pytest.mark.parametrize(
    "settings",
    [*({"name": n} for n in GROUP_ADVANTAGES), {"name": "reinforce_pp", "baseline": "group"}],
    ids=str,
)
def test_equal_rewards_give_exactly_zero_advantages(settings: dict[str, Any]) -> None:
    assert step(settings, [[0.1] * 7, [0.1] * 7]) == [[0.0] * 7] * 2
    assert step(settings, [[0.3]]) == [[0.0]]


def test_rewards_that_differ_by_rounding_are_equal() -> None:
    """Sums over turns, in two orders."""
    sums = [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.1 + 0.2 - 0.3, -0.3 + 0.2 + 0.1]
    assert sums[0] != sums[1] and sums[2] != sums[3]
    for settings in ({"name": n} for n in set(GROUP_ADVANTAGES) - {"remax"}):
        assert step(settings, [sums[:2]]) == step(settings, [sums[2:]]) == [[0.0] * 2], settings
    assert advantages({"name": "grpo"}, [1e-6, 0.0]) == [1, -1]


def test_global_whitening() -> None:
    white = step({"name": "reinforce_pp"}, [[1, 1], [1, 0]])
    assert white[0] == pytest.approx([3**-0.5] * 2) and white[1] == pytest.approx([3**-0.5, -(3**0.5)])
    based = step({"name": "reinforce_pp", "baseline": "group"}, [[1, 1], [1, 0]])
    assert based[0] == [0, 0] and based[1] == pytest.approx([2**0.5, -(2**0.5)])
    assert ADVANTAGES.build({"name": "reinforce_pp"}).scope is Scope.BATCH


def test_gpg_scales_up_for_groups_with_equal_rewards() -> None:
    assert step({"name": "gpg"}, [[1, 0], [1, 1], [0, 0], [0, 0]]) == [[2, -2], [0, 0], [0, 0], [0, 0]]


def shaped(
    settings: dict[str, Any],
    rewards: Sequence[float],
    lengths: Sequence[int],
    context: ShapingContext | None = None,
) -> list[float]:
    shaping = SHAPINGS.build(settings, job={"max_tokens": 10})
    return [
        float(r) for r in shaping.rewards(group_of(rewards, lengths=lengths), context or ShapingContext())
    ]


def test_overlong_penalty_grows_linearly() -> None:
    assert shaped({"name": "overlong"}, [1, 1, 1, 0], [5, 8, 9, 10]) == pytest.approx([1, 1, 0.5, -1])
    assert shaped(
        {"name": "overlong", "max_tokens": 4, "soft_fraction": 0.5, "weight": 0.2}, [1, 1], [3, 9]
    ) == pytest.approx([0.9, 0.8])


def test_grpo_lambda_penalizes_length_only_in_top_groups() -> None:
    lengths = [2, 4, 9]
    chosen = shaped({"name": "grpo_lambda", "weight": 0.5}, [1, 1, 0], lengths)
    assert chosen == pytest.approx([1 - 0.5 / (1 + math.e), 1 - 0.5 / (1 + math.exp(-1)), 0])
    assert shaped({"name": "grpo_lambda"}, [1, 1, 0], lengths, ShapingContext(ahead=0.2)) == [1, 1, 0]
    assert shaped({"name": "grpo_lambda", "weight": 0.5}, [1, 1], [3, 3]) == [0.75, 0.75]
    assert shaped({"name": "grpo_lambda"}, [0, 0], [3, 4]) == [0, 0]
    assert SHAPINGS.build({"name": "grpo_lambda"}).score(group_of([1, 1, 0, 0])) == 0.5


def test_laconic_dual_settles_at_the_budget() -> None:
    """If answers get shorter as the coefficient rises, the dual settles where the mean equals the budget."""
    laconic: Shaping = SHAPINGS.build({"name": "laconic", "budget_tokens": 8, "rate": 0.05})
    dual = 0.0
    for _ in range(2000):
        dual = laconic.next_dual(dual, mean_tokens=16 - 20 * dual)
    assert dual == pytest.approx(0.4, abs=1e-6)
    assert [
        float(r) for r in laconic.rewards(group_of([1, 1], lengths=[12, 4]), ShapingContext(dual=dual))
    ] == pytest.approx([0.8, 1])
    assert laconic.next_dual(0.0, mean_tokens=1) == 0, "the dual stays at zero within the budget"
    assert laconic.next_dual(1.0, mean_tokens=1e6) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "laconic"}, "budget_tokens of at least 1"),
        ({"name": "grpo_lambda", "top": 2}, "grpo_lambda: .*top=2.0: use 0 to 1"),
        ({"name": "overlong", "soft_fraction": 0}, "soft_fraction"),
        ({"name": "overlonge"}, "choose one of grpo_lambda, laconic, overlong"),
    ],
)
def test_error_messages_for_invalid_shaping_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SHAPINGS.build_list([settings], job={"max_tokens": 10})


def test_shaping_must_be_a_list() -> None:
    with pytest.raises(ConfigError, match=r"advantage.shaping: want a list of mappings"):
        SHAPINGS.build_list({"name": "overlong"})
    with pytest.raises(ConfigError, match=r"reinforce|baseline"):
        ADVANTAGES.build({"name": "reinforce_pp", "baseline": "batch"})
