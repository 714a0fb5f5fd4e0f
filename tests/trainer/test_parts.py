"""Baselines of parts of closed groups: unbiased by exact enumeration; resumed, over ranks, refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.consumer import ClosedGroup, EarlyMember
from areal_like.wire.records import Record
from tests.support.full_state import gather_full_state
from tests.support.part_groups import example_step, member, served, version_of
from tests.support.quick import only_in_chaos
from tests.support.trainer_helpers import flattened, run_ranks, without_measured, write_model
from tests.support.trainer_ranks import make_runner
from trainer.advantages import ADVANTAGES, Advantage, Grpo, Opo, Running
from trainer.advantages.parts import PartContext, RewardHistory, RewardStatistics, context_of
from trainer.advantages.reward_shaping import SHAPINGS
from trainer.batching.positions import Position
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.step.group_advantages import GroupAdvantages
from trainer.step.recipe import StepRecipe
from trainer.step.rewards import RewardTerms

MODULE = "tests.support.method_ranks"


# --- unbiasedness, by enumeration ---

PROBS = np.array([0.5, 0.3, 0.2])
"""The policy: a softmax over three completions."""
REWARDS = np.array([1.0, 0.2, -0.6])
LENGTHS = np.array([1, 4, 9])
IS_EARLY = np.array([True, True, False])
"""Whether a sample is complete when its group is closed depends on its completion, and so on its reward."""
GROUP_SIZE = 3
BEGIN_STEP, EARLY_STEP, LATE_STEP = 4, 5, 8
MEANS = {4: 0.9, 5: 0.1, 6: -0.5, 7: 0.7}
"""Mean reward of the steps before the late samples' one: the running mean moves."""


def completion(action: int) -> Trajectory:
    length = int(LENGTHS[action])
    mask = np.array([0, *[1] * length], dtype=np.uint8)
    return Trajectory(
        tokens=np.array([3, *[4 + action] * length], dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        versions=np.where(mask, version_of(BEGIN_STEP), -1).astype(np.int32),
        reward=float(REWARDS[action]),
        finish_reason=FinishReason.STOP,
    )


def estimator_of(settings: dict[str, Any], ranks: Ranks) -> GroupAdvantages:
    """The estimator after step 3, at which the group begins."""
    bare = dict(settings)
    shapings = SHAPINGS.build_list(bare.pop("shaping", None), job={"max_tokens": 8})
    rewards = RewardTerms(shapings, ranks, kl=None, reference=None, budget_tokens=100)
    advantage = ADVANTAGES.build(bare)
    assert isinstance(advantage, Advantage)
    advantages = GroupAdvantages(advantage, rewards, closes=True)
    advantages.history.begin(3, duals=[0.1] * len(shapings))
    advantages.history.append(3, mean=0.3, square=0.34, duals=[0.2] * len(shapings))
    return advantages


def advantages_of(estimator: GroupAdvantages, position: Position, *, step: int) -> list[float]:
    scored = estimator.of_position(position, step=step)
    return [float(sample.advantage) for sample in scored.samples]  # type: ignore[arg-type]


def by_trainer(settings: dict[str, Any], ranks: Ranks) -> Callable[[tuple[int, ...]], list[float]]:
    """Returns the advantages of a group's samples, given their completions.

    Early ones are trained on in one step, late ones three steps later. A group without late ones is whole.
    """
    early_estimator, late_estimator = (estimator_of(settings, ranks) for _ in range(2))
    duals = late_estimator.rewards.duals
    for step, mean in MEANS.items():
        late_estimator.history.append(step, mean=mean, square=mean * mean + 0.1, duals=[mean] * len(duals))

    def advantages(actions: tuple[int, ...]) -> list[float]:
        trajectories = [completion(action) for action in actions]
        records = [Record.of(1, index, t) for index, t in enumerate(trajectories)]
        early = [index for index, action in enumerate(actions) if IS_EARLY[action]]
        if len(early) == len(actions):
            whole = served(records, step=EARLY_STEP, begin_step=BEGIN_STEP)
            return advantages_of(early_estimator, Position.of(whole), step=EARLY_STEP)
        members = [member(index, trajectories[index]) for index in early]
        closed = ClosedGroup(ticket_id=1, prompt_index=0, begin_step=BEGIN_STEP, early=members)
        found: dict[int, float] = {}
        late = [index for index in range(len(actions)) if index not in early]
        for estimator, step, indices in (
            (early_estimator, EARLY_STEP, early),
            (late_estimator, LATE_STEP, late),
        ):
            if indices:
                group = served([records[i] for i in indices], step=step, closed=[closed], max_staleness=8)
                found |= zip(indices, advantages_of(estimator, Position.of(group), step=step), strict=True)
        return [found[index] for index in range(len(actions))]

    return advantages


def expected_estimate(advantages: Callable[[tuple[int, ...]], Sequence[float]]) -> NDArray[np.float64]:
    """E[ mean_i A_i grad log p(a_i) ] over all groups, exactly; the gradient is by the logits."""
    total = np.zeros(len(PROBS))
    for actions in itertools.product(range(len(PROBS)), repeat=GROUP_SIZE):
        scores = np.eye(len(PROBS))[list(actions)] - PROBS
        total += PROBS[list(actions)].prod() * np.array(advantages(actions)) @ scores / GROUP_SIZE
    return total


def true_gradient(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(PROBS * (rewards - PROBS @ rewards))


DEVIATION = float(np.sqrt(0.34 - 0.3**2))
ESTIMATORS: list[tuple[dict[str, Any], float]] = [
    ({"name": "dr_grpo"}, 1.0),
    ({"name": "rloo"}, 1.0),
    ({"name": "gpg"}, 1.0),
    ({"name": "opo"}, 1.0),
    ({"name": "running"}, 1.0),
    ({"name": "grpo"}, 1 / DEVIATION),
    ({"name": "reinforce_pp"}, 1 / DEVIATION),
    ({"name": "reinforce_pp", "baseline": "group"}, 1 / DEVIATION),
]


@pytest.mark.parametrize(("settings", "factor"), ESTIMATORS, ids=lambda value: str(value))
def test_the_expected_estimate_is_the_gradient(settings: dict[str, Any], factor: float, ranks: Ranks) -> None:
    got = expected_estimate(by_trainer(settings, ranks))
    assert got == pytest.approx(factor * true_gradient(REWARDS), abs=1e-12)


def test_the_expected_estimate_with_shapings(ranks: Ranks) -> None:
    """The gradient is that of the shaped reward, with the dual variable as of the group's begin."""
    shaping = [{"name": "overlong", "soft_fraction": 0.5}, {"name": "laconic", "budget_tokens": 2}]
    got = expected_estimate(by_trainer({"name": "dr_grpo", "shaping": shaping}, ranks))
    shaped = REWARDS - np.clip((LENGTHS - 4) / 4, 0, 1) - 0.2 * np.maximum(0, LENGTHS / 2 - 1)
    assert got == pytest.approx(true_gradient(shaped), abs=1e-12)


@given(data=st.data())
def test_every_policy_s_estimate_is_unbiased(data: st.DataObject) -> None:
    """The same for random policies, rewards, lengths and sets of early completions, and groups of two to four
    samples: `of_part` alone."""
    num_actions, group_size = data.draw(st.integers(2, 3)), data.draw(st.integers(2, 4))
    number = st.floats(-2, 2)
    weights = np.array(data.draw(st.lists(st.floats(0.1, 1), min_size=num_actions, max_size=num_actions)))
    probs = weights / weights.sum()
    rewards = np.array(data.draw(st.lists(number, min_size=num_actions, max_size=num_actions)))
    is_early = data.draw(st.lists(st.booleans(), min_size=num_actions, max_size=num_actions))
    running = RewardStatistics(mean=data.draw(number), deviation=0.5, is_known=data.draw(st.booleans()))
    for name, factor in (("rloo", 1.0), ("opo", 1.0), ("grpo", 2.0)):
        estimator, total = ADVANTAGES.build({"name": name}), np.zeros(num_actions)
        assert isinstance(estimator, Advantage)
        for actions in itertools.product(range(num_actions), repeat=group_size):
            early = [
                EarlyMember(
                    sample_index=i, reward=float(rewards[a]), num_sampled=1 + 3 * a, is_truncated=False
                )
                for i, a in enumerate(actions)
                if is_early[a]
            ]
            for index, action in enumerate(actions):
                context = context_of(early, without=index, running=running)
                advantage = estimator.of_part(float(rewards[action]), context)
                total += probs[list(actions)].prod() * advantage * (np.eye(num_actions)[action] - probs)
        want = probs * (rewards - probs @ rewards) * group_size * factor
        assert total == pytest.approx(want, abs=1e-10)


def naive(actions: tuple[int, ...]) -> list[float]:
    """R minus the mean of the early samples, the own one included if it is early."""
    early = [REWARDS[action] for action in actions if IS_EARLY[action]]
    return [float(REWARDS[action] - (np.mean(early) if early else 0.3)) for action in actions]


def late_among_late(actions: tuple[int, ...]) -> list[float]:
    """Leave-one-out among those that are early or late like the sample itself."""
    found = []
    for index, action in enumerate(actions):
        others = [REWARDS[a] for i, a in enumerate(actions) if i != index and IS_EARLY[a] == IS_EARLY[action]]
        found.append(float(REWARDS[action] - (np.mean(others) if others else 0.3)))
    return found


@pytest.mark.parametrize("biased", [naive, late_among_late])
def test_the_enumeration_finds_the_bias_of_other_baselines(biased: Callable[..., list[float]]) -> None:
    got, want = expected_estimate(biased), true_gradient(REWARDS)
    off = got - want * (got @ want) / (want @ want)
    assert np.linalg.norm(off) > 0.01 * np.linalg.norm(want), "not even the direction is right"


# --- by hand ---


def test_baselines_by_hand() -> None:
    early = [
        EarlyMember(sample_index=index, reward=reward, num_sampled=length, is_truncated=False)
        for index, reward, length in ((0, 1.0, 10), (2, 0.0, 30), (5, 0.5, 20))
    ]
    running = RewardStatistics(mean=0.2, deviation=0.4, is_known=True)
    early_one, late_one = (context_of(early, without=index, running=running) for index in (0, 1))
    assert early_one.baseline() == pytest.approx((0.0 + 0.5) / 2)
    assert late_one.baseline() == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert Grpo().of_part(1.0, early_one) == pytest.approx((1 - 0.25) / 0.4)
    with_one = context_of(early[:2], without=0, running=running)
    assert with_one.baseline() == pytest.approx((0.0 + 0.2) / 2), "filled up to two members"
    equal = PartContext(rewards_E=np.full(3, 0.1), lengths_E=np.arange(1.0, 4), running=running)
    assert Grpo().of_part(0.1, equal) == Opo().of_part(0.1, equal) == 0, "exactly, without rounding"
    # Lengths 30 and 20: the mean of the two is (0 * 30 + .5 * 20) / 50 = .2.
    assert early_one.baseline(early_one.lengths_E) == pytest.approx(0.2)
    alone = context_of([], without=1, running=running)
    assert alone.baseline() == pytest.approx(0.2) == alone.baseline(alone.lengths_E)
    unknown = context_of(early, without=0, running=RewardStatistics())
    assert unknown.baseline() == pytest.approx(0.25), "nothing is added to the members before the first step"
    assert context_of([], without=0, running=RewardStatistics()).baseline() == 0
    first = Running(first=0.5)
    assert first.of_part(1.0, unknown) == 0.5 and first.of_part(1.0, early_one) == pytest.approx(0.8)


@given(
    rewards=st.lists(st.floats(-5, 5), min_size=1, max_size=6),
    own=st.floats(-5, 5),
    shift=st.floats(-3, 3),
    mean=st.floats(-3, 3),
)
def test_an_advantage_does_not_depend_on_the_origin_of_rewards(
    rewards: list[float], own: float, shift: float, mean: float
) -> None:
    """Every estimator: a constant added to all rewards and to the running mean changes nothing."""

    def advantage(name: str, by: float) -> float:
        context = PartContext(
            rewards_E=np.array(rewards) + by,
            lengths_E=np.arange(1.0, len(rewards) + 1),
            running=RewardStatistics(mean=mean + by, deviation=0.5, is_known=True),
        )
        return float(ADVANTAGES.build({"name": name}).of_part(own + by, context))  # type: ignore[attr-defined]

    for name in ("dr_grpo", "grpo", "rloo", "opo", "gpg", "reinforce_pp", "running"):
        assert advantage(name, shift) == pytest.approx(advantage(name, 0.0), abs=1e-9)


def test_the_history_keeps_the_statistics_of_each_step() -> None:
    history = RewardHistory(decay=0.5)
    history.begin(3, duals=[0.5])
    history.begin(9, duals=[7.0])  # only the first begin counts
    assert history.as_of(3, step=3) == RewardStatistics(duals=(0.5,))
    history.append(3, mean=1.0, square=2.0, duals=[0.6])
    history.append(4, mean=0.0, square=1.0, duals=[0.7])
    assert history.as_of(2, step=5) == history.as_of(3, step=5), "older than the history: its oldest entry"
    at_four = RewardStatistics(mean=1.0, deviation=1.0, is_known=True, duals=(0.6,))
    assert history.as_of(4, step=5) == history.as_of(9, step=4) == at_four
    newest = history.as_of(9, step=5)
    assert newest.mean == pytest.approx(0.5 / 1.5) and newest.duals == (0.7,)
    assert newest.deviation == pytest.approx(np.sqrt(2 / 1.5 - (0.5 / 1.5) ** 2))
    again = RewardHistory(decay=0.5)
    again.restore(json.loads(json.dumps(history.dump())), num_duals=1)
    assert [again.as_of(k, step=9) for k in range(6)] == [history.as_of(k, step=9) for k in range(6)]
    for step in range(5, 400):
        history.append(step, mean=0.25, square=0.0625, duals=[0.0])
    assert len(history.dump()) == 256 and history.as_of(0, step=400) == history.as_of(144, step=400)
    assert history.as_of(400, step=400).deviation == 1.0, "equal rewards have no deviation"


# --- the step ---


def test_a_resumed_run_has_the_same_bits(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    settings = {
        "objective": {"name": "tis"},
        "advantage": {"name": "grpo", "shaping": [{"name": "laconic", "budget_tokens": 2}]},
    }

    def made() -> Any:
        return make_runner(path, ranks, dtype=torch.float32, settings=settings, beyond="mask")

    unbroken, rows = made(), []
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, tokenizer_path=path)
    for step in range(4, 9):
        rows.append(unbroken.run_served(example_step(step), step=step, num_groups=4, max_staleness=2))
        if step == 6:
            checkpoints.save(7, unbroken.policy, unbroken.optimizer, ranks, extra=unbroken.state())
    checkpoints.wait()
    resumed = made()
    resumed.run_served(
        example_step(4), step=4, num_groups=4, max_staleness=2
    )  # a rollback: state is replaced
    resumed.restore(checkpoints.load(7, resumed.policy, resumed.optimizer, ranks))
    for step in (7, 8):
        row = resumed.run_served(example_step(step), step=step, num_groups=4, max_staleness=2)
        assert flattened(without_measured(row)) == flattened(without_measured(rows[step - 4]))
    assert resumed.state() == unbroken.state() and len(unbroken.state()["reward_history"]) == 6
    for (name, a), (_, b) in zip(
        gather_full_state(unbroken.policy), gather_full_state(resumed.policy), strict=True
    ):
        assert torch.equal(a, b), name
    # A checkpoint of a run without the history: statistics are unknown until the first step.
    resumed.restore({"shaping_duals": [0.25], "advantage_state": []})
    resumed.run_served(example_step(9), step=9, num_groups=4, max_staleness=2)
    assert [row[:2] for row in resumed.state()["reward_history"]] == [[9, 0.0], [10, 1.0]]


def test_a_resume_may_change_the_shapings(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path)
    laconic, overlong = {"name": "laconic", "budget_tokens": 2}, {"name": "overlong"}
    made = make_runner(path, ranks, settings=shaped_by(laconic), beyond="mask")
    for step in (4, 5):
        made.run_served(example_step(step), step=step, num_groups=4, max_staleness=2)
    state = json.loads(json.dumps(made.state()))
    assert state["reward_history"][-1][4] > 0
    for shapings in ([], [laconic, overlong]):
        resumed = make_runner(path, ranks, settings=shaped_by(*shapings), beyond="mask")
        resumed.restore(state)
        rows = resumed.state()["reward_history"]
        assert [row[:4] for row in rows] == [row[:4] for row in state["reward_history"]]
        assert all(row[4:] == [0.0] * len(shapings) for row in rows)
        resumed.run_served(example_step(6), step=6, num_groups=4, max_staleness=2)
        assert len(resumed.state()["reward_history"]) == 4


def shaped_by(*shapings: dict[str, Any]) -> dict[str, Any]:
    return {"advantage": {"name": "grpo", "shaping": list(shapings)}}


@pytest.mark.parametrize("beyond", [*only_in_chaos("mask"), "ratio"])
def test_two_ranks_equal_one(tmp_path: Path, ranks: Ranks, beyond: str) -> None:
    path = write_model(tmp_path / "model")
    settings = {"advantage": {"name": "grpo", "shaping": [{"name": "laconic", "budget_tokens": 2}]}}
    args = (str(tmp_path), path, json.dumps(settings), beyond)
    run_ranks("parts", *args, world_size=2, module=MODULE)
    states = [json.loads((tmp_path / f"parts-{rank}.json").read_text()) for rank in range(2)]
    assert states[0] == states[1], "equal bits on every rank"
    runner = make_runner(path, ranks, settings=settings, beyond=beyond)
    for step in (4, 5):
        metrics = runner.run_served(example_step(step), step=step, num_groups=4, max_staleness=2)
    one = flattened(without_measured(json.loads(json.dumps(metrics))))
    by_cut = {"num_microbatches", "shared_share", "balance"}
    for state, two in states[0]:
        assert np.array(state["reward_history"]) == pytest.approx(np.array(runner.state()["reward_history"]))
        assert one.keys() - by_cut == two.keys() - by_cut
        for name in one.keys() - by_cut:
            assert two[name] == pytest.approx(one[name], rel=1e-9, abs=1e-12), name


def test_groups_recorded_before_the_setting_was_changed(tmp_path: Path, ranks: Ranks) -> None:
    """Without `close`, whole groups are compared as ever, and parts that are left over as parts."""
    path = write_model(tmp_path)
    groups = example_step(5, max_staleness=4)
    metrics = []
    for used in (groups[:2], [replace(group, begin_step=-1, max_staleness=-1) for group in groups[:2]]):
        runner = make_runner(path, ranks)
        metrics.append(runner.run_served(used, step=5, num_groups=2, max_staleness=4))
    assert metrics[0]["loss"] == metrics[1]["loss"] != 0
    both = make_runner(path, ranks).run_served(groups, step=5, num_groups=4, max_staleness=4)
    assert both["num_groups"] == 4 and "late_share" not in both
    incapable = make_runner(path, ranks, advantage=OfWholeGroups())
    with pytest.raises(ConfigError, match="cannot train on parts"):
        incapable.run_served(groups, step=5, num_groups=4, max_staleness=4)


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"advantage": {"name": "gpg"}}, "advantage Gpg"),
        ({"advantage": {"name": "reinforce_pp", "baseline": "group"}}, "advantage ReinforcePlusPlus"),
        ({"advantage": {"name": "reinforce_pp"}}, ""),
        ({"kl": {"coef": 0.1, "place": "reward"}}, "kl.place=reward"),
        ({"advantage": {"name": "grpo", "shaping": [{"name": "grpo_lambda"}]}}, "advantage.shaping "),
        ({"objective": {"name": "vcpo", "leave_one_out": True, "norms": "proxy"}}, "objective Vcpo"),
        ({"objective": {"name": "vcpo", "baseline": "none"}}, ""),
        ({"objective": {"name": "rebel"}}, "objective "),
        ({"objective": {"name": "online_dpo"}}, "objective "),
        ({"objective": {"name": "oapl"}}, "objective "),
    ],
)
def test_leftover_parts_are_not_compared_as_one_group(
    settings: dict[str, Any], needs: str, tmp_path: Path, ranks: Ranks
) -> None:
    """A run that was changed from `close` to `wait`."""
    runner = make_runner(write_model(tmp_path), ranks, settings=settings, budget_tokens=400)
    groups = example_step(5, max_staleness=4)
    if not needs:
        assert runner.run_served(groups, step=5, num_groups=4, max_staleness=4)["num_groups"] == 4
        return
    with pytest.raises(ConfigError, match=f"{needs}.* cannot train on parts .* continue with buffer.overdue"):
        runner.run_served(groups, step=5, num_groups=4, max_staleness=4)
    assert runner.run_served(groups[:2], step=5, num_groups=2, max_staleness=4)["num_groups"] == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "oapl"}}, "buffer.overdue=close: objective.name=oapl needs"),
        ({"objective": {"name": "rebel"}}, "buffer.overdue=close: objective.name=rebel needs"),
        ({"objective": {"name": "online_dpo"}}, "buffer.overdue=close: objective.name=online_dpo needs"),
        ({"objective": {"name": "vcpo"}}, "buffer.overdue=close: .*objective.leave_one_out=true"),
        ({"objective": {"name": "vcpo", "baseline": "batch"}}, "objective.leave_one_out=true"),
        ({"advantage": {"name": "remax"}, "sampling": {"greedy_baseline": True}}, "greedy_baseline=true"),
        ({"advantage": {"name": "grpo", "shaping": [{"name": "grpo_lambda"}]}}, "grpo_lambda needs whole"),
        ({"advantage": {"name": "grpo", "turn_discount": 0.9}}, "advantage.turn_discount=0.9"),
        ({"kl": {"coef": 0.1, "place": "reward"}}, "buffer.overdue=close: kl.place=reward"),
    ],
)
def test_what_needs_whole_groups_is_refused(sections: dict[str, Any], message: str) -> None:
    StepRecipe.of(from_mapping(sections))
    with pytest.raises(ConfigError, match=message):
        StepRecipe.of(from_mapping(sections | {"buffer": {"overdue": "close"}}))


def test_what_takes_parts_is_accepted() -> None:
    close = {"buffer": {"overdue": "close"}}
    of_vcpo = StepRecipe.of(
        from_mapping(close | {"objective": {"name": "vcpo", "leave_one_out": True}})
    ).objective
    assert not of_vcpo.late_coefficients and not of_vcpo.whole_groups
    capped = from_mapping(close | {"staleness": {"beyond": "cap"}})
    assert StepRecipe.of(capped).objective.caps_beyond  # type: ignore[attr-defined]
    gae = {"advantage": {"name": "gae", "turn_discount": 0.9}, "kl": {"coef": 0.1, "place": "reward"}}
    StepRecipe.of(from_mapping(close | gae))


@dataclass(frozen=True, kw_only=True)
class OfWholeGroups(Advantage):
    """An estimator of a user's that knows nothing of parts."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [t.reward for t in group]


def test_a_custom_estimator_has_to_say_that_it_takes_parts() -> None:
    section = {"advantage": {"_target_": f"{__name__}.OfWholeGroups"}, "buffer": {"overdue": "close"}}
    with pytest.raises(ConfigError, match="advantage OfWholeGroups needs whole groups"):
        StepRecipe.of(from_mapping(section))
    context = context_of([], without=0, running=replace(RewardStatistics(), mean=1.0))
    with pytest.raises(ConfigError, match=r"OfWholeGroups cannot train on parts .* buffer.overdue=close"):
        OfWholeGroups().of_part(1.0, context)
