"""Ready-made rewards for `task.reward`: matchers, math, programs, a judge, user functions.

Read `base.py` first. `sum.py` creates the rewards from their description, and adds them up.
"""

from rollout_server.rewards.library.base import RewardFunction
from rollout_server.rewards.library.sum import Rewards, make_rewards
from rollout_server.rewards.step_model import score_steps

__all__ = ["RewardFunction", "Rewards", "make_rewards", "score_steps"]
