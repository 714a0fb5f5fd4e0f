"""SPPO: by hand, and against the pairwise definition of the win rate."""

import math

import numpy as np
import pytest

from tests.support.objective_helpers import evaluate, published
from trainer.objectives import Oapl, Sppo
from trainer.objectives.sppo import WinRate


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_win_rate_is_the_mean_over_pairs(temperature: float) -> None:
    rewards = [1.0, -0.5, 0.25, 0.25]
    got = WinRate(temperature=temperature).of_rewards(np.array(rewards))
    wins = [sum(sigmoid((a - b) / temperature) for b in rewards) / 4 for a in rewards]
    assert got.tolist() == pytest.approx([p - 0.5 for p in wins], rel=1e-12)
    assert got.sum() == pytest.approx(0, abs=1e-15)


def test_at_temperature_zero_only_the_order_matters() -> None:
    """Of four samples the best beats two, equals one (itself) and so on: (3 + 1/2) / 4 - 1/2 = 3/8."""
    for rewards in ([1000.0, 2.0, 2.0, -1e300], [4.0, 3.0, 3.0, 1.0]):
        got = WinRate(temperature=0.0).of_rewards(np.array(rewards))
        assert got.tolist() == [0.375, 0.0, 0.0, -0.375]
    assert WinRate(temperature=1e-3).of_rewards(np.array([1e300, 0.0])).tolist() == [0.25, -0.25]
    assert WinRate().of_rewards(np.array([0.3, 0.3])).tolist() == [0.0, 0.0]
    rounded = np.array([0.1 + 0.2, 0.3, 0.1 + 0.2, 1.0])
    assert rounded[0] > rounded[1]
    assert WinRate(temperature=0.0).of_rewards(rounded).tolist() == [-0.125, -0.125, -0.125, 0.375]


def test_loss_by_hand() -> None:
    """Two samples, log w 1 and -1, rewards 1 and 0: P - 1/2 is +-(sigmoid(1) - 1/2) / 2 = +-.115529.

    At beta .25 the residuals are +-(.25 - .115529) = +-.134471: loss .134471^2 = .018082, the slope of each
    of a sample's tokens 2 * .25 * +-.134471 / 2 = +-.033618.
    """
    batch = published()
    win = float(WinRate().of_rewards(np.array([1.0, 0.0]))[0])
    assert win == pytest.approx(0.115529, abs=1e-6)
    assert batch.log_w_N.tolist() == pytest.approx([1.0, -1.0])
    batch.advantage_S[:] = batch.spread_S(batch.reward_N * 2 * win - win)
    loss, grad = evaluate(Sppo(beta=0.25), [batch])
    assert loss == pytest.approx(0.018082, abs=1e-6)
    assert grad == pytest.approx([0.033618] * 3 + [-0.033618] * 2, abs=1e-6)
    assert (loss, grad) == evaluate(Oapl(beta2=0.25), [batch])
