"""Scores: what reward() may return, and where a score's rewards go in a trajectory."""

import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import EpisodeError, RewardError
from areal_like.trajectory import STEP_ENDS, STEP_REWARDS, TOKEN_REWARDS, FinishReason, Trajectory
from rollout_server.conversation.turns import (
    SampleRewards,
    add_up,
    placed_steps,
    placed_token_rewards,
    placed_turns,
)
from rollout_server.rewards.scores import MAX_NAMES, as_score, score_fields, score_of
from rollout_server.tasks.base import Completion, Score
from rollout_server.workers.environment_worker import checked_agent_score

SAID = Completion("x", token_ids=range(5), turn_lengths=(2, 3))
LINES = Completion("One.\n\n Two. Three", token_ids=range(9), turn_lengths=(9,))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "reward() must be a number, got NoneType"),
        (math.nan, "reward() must be a finite number"),
        (10**400, "reward() must be a finite number"),
        (1.1e9, "finite number of at most 1e+09 in size, got 1100000000.0"),
        (np.zeros(2), "reward() must be one number, got ndarray"),
        ({"a": math.inf}, "reward()['a'] must be a finite number"),
        ({"a": "1"}, "reward()['a'] must be a number, got str"),
        ({"a": 8e8, "b": 8e8}, "the sum of the parts must be a finite number of at most 1e+09"),
        (Score(parts={"a": -2e9}), "Score.parts['a'] must be a finite number of at most 1e+09"),
        (Score(metrics={"a": 1e39}), "Score.metrics['a'] must be a finite number of at most 3.403e+38"),
        (Score(turns=[0.0, 1e20]), "Score.turns must be finite numbers of at most 1e+09 in size"),
        (Score(value=math.nan), "Score.value must be a finite number"),
        (Score(parts={"a": None}), "Score.parts['a'] must be a number"),  # type: ignore[dict-item]
        (Score(metrics=[1]), "Score.metrics must be a dict of numbers, got list"),  # type: ignore[arg-type]
        (Score(metrics={str(i): 1 for i in range(MAX_NAMES + 1)}), "at most 1000"),
        (Score(metrics={str(i): 1 for i in range(600)}, parts={str(i): 1 for i in range(600)}), "at most"),
        (Score(metrics={"n" * 201: 1}), "a name of 201 characters"),
        (Score(turns=[1.0]), "Score.turns has 1 numbers for 2 turns"),
        (Score(tokens=[1.0] * 6), "Score.tokens has 6 numbers for 5 sampled tokens: give one for each"),
        (Score(tokens=[0, 0, math.nan, 0, 0]), "number 2 is nan"),
        (Score(tokens=[0, 1e300, 0, 0, 0]), "number 1 is inf"),
        (Score(tokens=[0, 0, 0, 0, -1e18]), "number 4 is -9.99"),
        (Score(turns=["a", "b"]), "Score.turns must be a list of numbers"),  # type: ignore[list-item]
        (Score(tokens=np.zeros((5, 1))), "an array of shape [5, 1]"),  # type: ignore[arg-type]
    ],
)
def test_wrong_scores_say_what_is_wrong(returned: Any, message: str) -> None:
    with pytest.raises(RewardError) as raised:
        as_score(returned, SAID)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([(-1, 0.0)], "Score.steps[0] ends at -1: want an end above 0"),
        ([(0, 0.0)], "Score.steps[0] ends at 0: want an end above 0"),
        ([(18, 0.0)], "and at most 17, the length of the completion"),
        ([(10**30, 0.0)], "and at most 17"),
        (
            [(4, 0.0), (4, 1.0)],
            "Score.steps[1] ends at 4: want an end above 4, the end of the step before it",
        ),
        ([(9, 0.0), (4, 1.0)], "Score.steps[1] ends at 4: want an end above 9"),
        ([(4.0, 0.0)], "must begin with a whole number of characters or a text, got 4.0"),
        ([(math.nan, 0.0)], "must begin with a whole number of characters or a text, got nan"),
        ([(4, math.nan)], "the reward of Score.steps[0] must be a finite number"),
        ([(4, 2e9)], "the reward of Score.steps[0] must be a finite number of at most 1e+09"),
        ([(4, "a")], "the reward of Score.steps[0] must be a number, got str"),
        ([(4,)], "must be a pair (end, reward) or (text, reward), got 1 values"),
        ([4], "must be a list of pairs (end, reward)"),
        (7, "must be a list of pairs (end, reward)"),
        ([("Two.", 0.0)], "Score.steps[0] is 'Two.', but the completion goes on with 'One."),
        ([("One.", 0.0), ("Three", 0.0)], "nothing but whitespace between them"),
        ([("One.", 0.0), ("", 0.0)], "Score.steps[1] is ''"),
        ([("One.", 0.0), ("One.", 0.0)], "Score.steps[1] is 'One.'"),
        ([(1, 0.0)] * 4097, "Score.steps has 4097 steps: at most 4096 are accepted"),
    ],
)
def test_wrong_steps_say_what_is_wrong(steps: Any, message: str) -> None:
    with pytest.raises(RewardError) as raised:
        as_score(Score(steps=steps), LINES)
    assert message in str(raised.value)


def test_steps_are_positions_or_texts() -> None:
    for steps in (
        [(4, 0.5), (11, 0.25), (17, 0.0)],
        [("One.", 0.5), ("Two.", 0.25), ("Three", 0.0)],
        [("One.\n\n", 0.5), ("Two. ", 0.25), (np.int64(17), np.float32(0))],
    ):
        score = as_score(Score(steps=steps), LINES)
        if steps[0][0] == "One.\n\n":
            assert score.steps == ((6, 0.5), (12, 0.25), (17, 0.0))
        else:
            assert score.steps == ((4, 0.5), (11, 0.25), (17, 0.0))
        sent = score_of(msgpack.unpackb(msgpack.packb(score_fields(score))))
        assert (sent.value, sent.steps) == (score.value, score.steps)
    with pytest.raises(RewardError, match="rewards of steps and of tokens"):
        as_score(Score(steps=[(4, 1.0)], tokens=[1.0] * 9), LINES)


def test_an_agent_has_no_text_to_reward_steps_of() -> None:
    fields = score_fields(Score(value=1.0, steps=[(1, 0.5)]))
    with pytest.raises(EpisodeError, match=r"only a task's reward\(\) can reward steps"):
        checked_agent_score(fields)


def test_steps_are_placed_in_the_last_turn() -> None:
    score = Score(value=0.5, steps=[(4, 0.1), (9, 1.0)])
    outcome = add_up(score, num_turns=2, step_ends=[2, 3])
    assert outcome.reward == 0.5 + float(np.float32(0.1)) + 1.0
    placed = placed_steps(outcome, [(10, 14), (1, 5)])  # the last turn lies first in the arrays
    assert placed[STEP_ENDS].tolist() == [3, 4] and placed[STEP_ENDS].dtype == np.int32
    assert placed[STEP_REWARDS].tolist() == [float(np.float32(0.1)), 1.0]
    assert placed_steps(add_up(Score(value=1.0)), [(1, 3)]) == {}
    with pytest.raises(ValueError, match="add up to"):
        add_up(Score(steps=[(1, 8e8), (2, 8e8)]), step_ends=[1, 2])


def test_numbers_of_other_libraries_are_accepted() -> None:
    assert as_score(True, SAID).value == 1.0
    assert as_score(np.float64(0.5), SAID).value == 0.5
    assert as_score({"a": np.int32(1), 2: 0.5}, SAID) == Score(value=1.5, parts={"a": 1.0, "2": 0.5})


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    has_turns=st.booleans(),
    has_tokens=st.booleans(),
    num_steps=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_rewards_are_placed_and_add_up(
    lengths: list[int], has_turns: bool, has_tokens: bool, num_steps: int, order: Any
) -> None:
    """Turns may lie in any order in the arrays; no reward is lost."""
    num_sampled = sum(lengths)
    score = Score(
        value=0.5,
        turns=[float(i + 1) for i in range(len(lengths))] if has_turns else (),
        tokens=[0.25 * (i + 1) for i in range(num_sampled)] if has_tokens else (),
    )
    steps = [10.0 * (i + 1) for i in range(min(num_steps, len(lengths)))]
    outcome = add_up(score, num_turns=len(lengths), step_rewards=steps)
    assert outcome.reward == pytest.approx(0.5 + sum(score.turns) + sum(score.tokens) + sum(steps))
    places = list(range(len(lengths)))
    order.shuffle(places)
    spans: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    end = 0
    for turn in places:
        spans[turn] = (end + 1, end + 1 + lengths[turn])  # one token of context before each
        end = spans[turn][1]
    mask = np.zeros(end, np.uint8)
    for first, last in spans:
        mask[first:last] = 1
    trajectory = Trajectory(
        tokens=np.zeros(end, np.int32),
        loss_mask=mask,
        logprobs=np.zeros(end, np.float32),
        versions=mask.astype(np.int32) - 1,
        reward=outcome.reward,
        turns=placed_turns(outcome, spans),
        arrays=placed_token_rewards(outcome, spans, num_tokens=end),
        finish_reason=FinishReason.STOP,
    )
    by_end = dict(trajectory.turns)
    for turn, (_, last) in enumerate(spans):
        expected = (score.turns[turn] if has_turns else 0.0) + (steps[turn] if turn < len(steps) else 0.0)
        assert by_end.get(last, 0.0) == expected
    assert trajectory.num_turns == len(lengths)
    if has_tokens:
        rewards = trajectory.arrays[TOKEN_REWARDS]
        placed = np.concatenate([rewards[first:last] for first, last in spans])
        assert placed.tolist() == list(score.tokens) and not rewards[mask == 0].any()
    else:
        assert not trajectory.arrays


def test_plain_samples_have_no_structure() -> None:
    outcome = add_up(
        Score(value=1.0, parts={"a": 1.0}, metrics={"calls": 2}), step_metrics={"calls": 1, "n": 3}
    )
    assert outcome.reward_components == {"a": 1.0} and outcome.metrics == {"calls": 2, "n": 3}
    assert (
        placed_turns(outcome, [(1, 3)]) == () and placed_token_rewards(outcome, [(1, 3)], num_tokens=3) == {}
    )


def test_rewards_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="for 2 turns"):
        add_up(Score(turns=[1.0]), num_turns=2)
    with pytest.raises(ValueError, match="for 1 turns"):
        add_up(step_rewards=[1.0, 2.0])
    with pytest.raises(ValueError, match="add up to"):
        add_up(Score(turns=[1.7e308, 1.7e308]), num_turns=2)
    with pytest.raises(ValueError, match="2 token rewards for 3 sampled tokens"):
        placed_token_rewards(SampleRewards(token_rewards=np.ones(2, np.float32)), [(1, 4)], num_tokens=4)
