"""Rewards of steps in the trainer: GRPO with process supervision on cases computed by hand, GAE, masks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from areal_like.config import KlConfig, from_mapping
from areal_like.errors import ConfigError
from areal_like.trajectory import STEP_ENDS, STEP_REWARDS, TOKEN_REWARDS, FinishReason, Trajectory
from areal_like.wire.messages.consumer import EarlyMember, Group
from areal_like.wire.records import Record
from tests.support.part_groups import example_step
from tests.support.trainer_ranks import make_runner
from trainer.advantages import ADVANTAGES, Advantage
from trainer.advantages.parts import RewardStatistics, context_of
from trainer.advantages.process import GrpoProcess
from trainer.advantages.turns import group_advantages, rewards_of_tokens, turn_returns
from trainer.batching.positions import Position, as_context
from trainer.batching.segments import segments_of
from trainer.distributed.ranks import Ranks
from trainer.step.group_advantages import GroupAdvantages
from trainer.step.recipe import StepRecipe
from trainer.step.rewards import RewardTerms


def sample(
    steps: Sequence[tuple[int, float]] = (),
    *,
    outcome: float = 0.0,
    num_sampled: int = 4,
    turns: Sequence[tuple[int, float]] = (),
    token_rewards: Sequence[float] = (),
    segments: tuple[int, ...] = (),
) -> Trajectory:
    """Two prompt tokens, then sampled ones. The ends of steps and turns count sampled tokens."""
    mask_T = np.array([0, 0] + [1] * num_sampled, np.uint8)
    arrays: dict[str, Any] = {}
    if steps:
        arrays[STEP_ENDS] = np.array([2 + end for end, _ in steps], np.int32)
        arrays[STEP_REWARDS] = np.array([reward for _, reward in steps], np.float32)
    if token_rewards:
        arrays[TOKEN_REWARDS] = np.array([0, 0, *token_rewards], np.float32)
    of_steps = [float(np.float32(reward)) for _, reward in steps]  # as `add_up` adds them
    inner = sum((*of_steps, *(reward for _, reward in turns), *token_rewards))
    return Trajectory(
        tokens=np.arange(len(mask_T), dtype=np.int32),
        loss_mask=mask_T,
        logprobs=-mask_T.astype(np.float32),
        versions=np.where(mask_T, 0, -1).astype(np.int32),
        reward=inner + outcome,
        turns=tuple((2 + end, reward) for end, reward in turns),
        segments=segments,
        arrays=arrays,
        finish_reason=FinishReason.STOP,
    )


def advantages(group: Sequence[Trajectory], **settings: Any) -> list[list[float]]:
    """[G][S] of the sampled tokens."""
    estimator = ADVANTAGES.build({"name": "grpo_process", **settings})
    assert isinstance(estimator, Advantage)
    found = group_advantages(estimator, group, turn_discount=1.0)
    return [np.broadcast_to(each, (t.num_tokens,))[2:].tolist() for t, each in zip(group, found, strict=True)]


TWO = [sample([(2, 0.5), (4, 1.0)]), sample([(1, 0.0), (3, 0.5), (4, 0.25)])]
"""Step rewards .5 1 and 0 .5 .25: mean .45, population variance .11."""
STD = math.sqrt(0.11)


def test_the_papers_formula_by_hand() -> None:
    first = [0.05 / STD + 0.55 / STD] * 2 + [0.55 / STD] * 2
    second = [(-0.45 + 0.05 - 0.2) / STD, *[(0.05 - 0.2) / STD] * 2, -0.2 / STD]
    got = advantages(TWO)
    assert got[0] == pytest.approx(first) and got[1] == pytest.approx(second)
    centered = advantages(TWO, std=False)
    assert centered[0] == pytest.approx([a * STD for a in first])


def test_tokens_after_the_last_step_have_no_process_reward() -> None:
    got = advantages([sample([(2, 1.0)]), sample([(3, 0.0)])])
    assert got == [[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, 0.0]]


def test_the_outcome_is_compared_by_itself() -> None:
    group = [sample([(2, 0.25)], outcome=100.0), sample([(2, 0.75)])]
    assert advantages(group) == [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, -1.0, -1.0]]
    assert advantages(group, outcome=0.5) == [[-0.5, -0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5]]
    # Without steps it is GRPO.
    assert advantages([sample(outcome=1.0), sample()]) == [[1.0] * 4, [-1.0] * 4]


def test_equal_rewards_give_no_signal() -> None:
    tenths = [sample([(1, 0.1), (2, 0.1), (3, 0.1)], outcome=0.3), sample([(4, 0.1)], outcome=0.3)]
    assert advantages(tenths) == [[0.0] * 4] * 2
    assert advantages([sample(), sample()]) == [[0.0] * 4] * 2
    # Outcomes that are only the rounding of large sums of steps.
    steps = [(1, 1e6), (2, 0.1), (3, -1e6), (4, 0.2)]
    large = sample(steps)
    rounded = Trajectory(**{**vars(large), "reward": large.reward + 1e-10})
    assert advantages([large, rounded], outcome=1.0) == advantages([large, large], outcome=0.0)


def test_two_steps_that_end_in_one_token_both_count() -> None:
    got = advantages([sample([(2, 1.0), (2, 0.0)]), sample([(2, 0.5)])], std=False)
    assert got == [[0.0] * 4] * 2  # 1 - .5 and 0 - .5
    got = advantages([sample([(2, 1.0), (2, 1.0)]), sample([(2, 0.25)])], std=False)
    assert got == [[0.5, 0.5, 0.0, 0.0], [-0.5, -0.5, 0.0, 0.0]]


def test_turns_and_tokens_are_steps_too() -> None:
    by_turn = [sample(turns=[(2, 1.0), (4, 0.0)]), sample(turns=[(4, 0.5)])]
    assert advantages(by_turn, std=False) == [[0.0, 0.0, -0.5, -0.5], [0.0] * 4]
    by_token = [sample(token_rewards=[1, 0, 0, 1]), sample(num_sampled=4)]
    assert advantages(by_token, std=False) == [[1.0, 0.25, 0.5, 0.75], [-1.0, -0.75, -0.5, -0.25]]


def test_old_tokens_are_context(ranks: Ranks) -> None:
    """A masked token has no gradient; the advantages of the others are those of the whole sample."""
    recipe = StepRecipe.of(from_mapping({"advantage": {"name": "grpo_process"}}))
    rewards = RewardTerms((), ranks, kl=None, reference=None, budget_tokens=64)
    groups = GroupAdvantages(recipe.advantage, rewards)
    lags = [np.array([0, 0, 9, 9, 1, 1]), np.zeros(6, np.int64)]
    position = Position(trajectories=TWO, lags=lags, max_staleness=4)
    scored = groups.of_position(position, step=9)
    first = scored.samples[0]
    assert first.trajectory.loss_mask.tolist() == [0, 0, 0, 0, 1, 1] and first.num_masked == 2
    assert not first.trajectory.steps and first.trajectory.reward == 1.5
    assert np.asarray(first.advantage)[2:].tolist() == advantages(TWO)[0]
    assert as_context(TWO[1], np.zeros(6, bool)).steps == []


def test_parts_are_compared_with_running_statistics() -> None:
    estimator = GrpoProcess()
    running = RewardStatistics(mean=0.5, deviation=2.0, is_known=True)
    steps = RewardStatistics(mean=0.25, deviation=0.5, is_known=True)
    sums = RewardStatistics(mean=0.75, deviation=1.0, is_known=True)
    early = [
        EarlyMember(sample_index=index, reward=reward, num_sampled=4, is_truncated=False)
        for index, reward in enumerate((9.0, 1.0, 2.0))
    ]
    context = replace(context_of(early, without=0, running=running), steps=steps, step_sums=sums)
    # Steps: (.5 - .25) / .5 = .5 and (1 - .25) / .5 = 1.5; outcome: (3 - (1.5 - .75)) / 2 = 1.125.
    got = estimator.of_partial(sample([(2, 0.5), (4, 1.0)], outcome=3.0), context)
    assert got[2:].tolist() == [3.125, 3.125, 2.625, 2.625]
    # Its own reward, 9 as an early member, does not enter.
    other = replace(context_of(early[1:], without=0, running=running), steps=steps, step_sums=sums)
    assert (estimator.of_partial(sample([(2, 0.5), (4, 1.0)], outcome=3.0), other) == got).all()
    # Without steps, and before any statistics of them, it is GRPO.
    plain = context_of(early, without=0, running=running)
    grpo = ADVANTAGES.build({"name": "grpo"})
    assert isinstance(grpo, Advantage)
    assert estimator.of_partial(sample(outcome=3.0), plain)[2] == grpo.of_part(3.0, plain)


def test_a_resumed_run_has_the_same_statistics(path: str, ranks: Ranks) -> None:
    def made() -> Any:
        return make_runner(path, ranks, settings={"advantage": {"name": "grpo_process"}}, beyond="mask")

    def groups(step: int) -> list[Group]:
        found = []
        for group in example_step(step):
            records = []
            for record in group.records:
                trajectory = record.trajectory()
                ends = np.flatnonzero(trajectory.loss_mask)[:2] + 1
                arrays = {
                    STEP_ENDS: ends.astype(np.int32),
                    STEP_REWARDS: np.linspace(0, trajectory.reward, len(ends), dtype=np.float32),
                }
                records.append(
                    Record.of(record.ticket_id, record.sample_index, replace(trajectory, arrays=arrays))
                )
            found.append(replace(group, records=records))
        return found

    def run(runner: Any, step: int) -> dict[str, Any]:
        metrics: dict[str, Any] = runner.run_served(groups(step), step=step, num_groups=4, max_staleness=2)
        return metrics

    unbroken, resumed = made(), made()
    run(unbroken, 4)
    state = json.loads(json.dumps(unbroken.state()))
    weights = copy.deepcopy(unbroken.policy.state_dict())
    expected = run(unbroken, 5)
    assert expected["steps_per_sample"] > 1 and math.isfinite(expected["step_reward_mean"])
    resumed.restore(state)
    resumed.policy.load_state_dict(weights)
    got = run(resumed, 5)
    assert got["loss"] == expected["loss"] and got["grad_norm"] == expected["grad_norm"]
    assert resumed.state() == unbroken.state() and len(resumed.state()["step_histories"]) == 2
    # From a checkpoint without them the statistics are unknown again.
    resumed.restore({"shaping_duals": [], "advantage_state": []})
    assert run(resumed, 5)["loss"] != expected["loss"]


def test_segments_are_cut_after_the_advantages() -> None:
    branched = sample([(1, 1.0), (4, 0.5)], segments=(4, 2))
    assert [segment.steps for _, segment in segments_of(branched)] == [[], []]
    assert advantages([branched, sample([(1, 0.0)])], std=False)[0] == [0.5, 0.0, 0.0, 0.0]


def test_gae_gets_the_rewards_at_their_tokens() -> None:
    trajectory = sample([(1, 0.5), (3, -0.25), (3, 1.0)], outcome=2.0)
    assert rewards_of_tokens(trajectory, penalty_S=np.zeros(4)).tolist() == [0.5, 0.0, 0.75, 2.0]
    two_turns = sample([(3, 0.5)], outcome=1.0, turns=[(2, 0.25), (4, 0.0)])
    assert rewards_of_tokens(two_turns, penalty_S=np.zeros(4)).tolist() == [0.0, 0.25, 0.5, 1.0]
    # Turn 1 has .25, turn 2 the step's .5 and the outcome.
    assert turn_returns(two_turns, turn_discount=0.5).tolist() == [1.0, 1.5]


def test_the_other_estimators_see_the_whole_reward() -> None:
    grpo = ADVANTAGES.build({"name": "dr_grpo"})
    assert isinstance(grpo, Advantage)
    assert list(group_advantages(grpo, TWO, turn_discount=1.0)) == [0.375, -0.375]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"advantage": {"turn_discount": 0.5}}, r"set advantage\.turn_discount=1"),
        ({"advantage": {"outcome": -1}}, "outcome"),
    ],
)
def test_refused_combinations(sections: dict[str, Any], message: str) -> None:
    advantage = {"name": "grpo_process", **sections.pop("advantage", {})}
    with pytest.raises(ConfigError, match=message):
        StepRecipe.of(from_mapping({"advantage": advantage, **sections}))
    assert GrpoProcess().std and KlConfig().coef == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({STEP_ENDS: np.array([3], np.int32)}, "want int32"),
        ({STEP_REWARDS: np.array([3], np.float32)}, "want int32"),
        ({STEP_ENDS: np.array([3], np.int64), STEP_REWARDS: np.ones(1, np.float32)}, "want int32"),
        ({STEP_ENDS: np.array([3, 4], np.int32), STEP_REWARDS: np.ones(1, np.float32)}, "want int32"),
        ({STEP_ENDS: np.full(4097, 3, np.int32), STEP_REWARDS: np.ones(4097, np.float32)}, "at most 4096"),
        ({STEP_ENDS: np.array([4, 3], np.int32), STEP_REWARDS: np.ones(2, np.float32)}, "ascending"),
        ({STEP_ENDS: np.array([7], np.int32), STEP_REWARDS: np.ones(1, np.float32)}, "within the tokens"),
        ({STEP_ENDS: np.array([0], np.int32), STEP_REWARDS: np.ones(1, np.float32)}, "within the tokens"),
        ({STEP_ENDS: np.array([2], np.int32), STEP_REWARDS: np.ones(1, np.float32)}, "was not sampled"),
        ({STEP_ENDS: np.array([3], np.int32), STEP_REWARDS: np.full(1, np.nan, np.float32)}, "finite"),
    ],
)
def test_trajectories_refuse_wrong_steps(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory(**{**vars(sample()), "arrays": arrays})
