"""Ready-made rewards for `task.reward`: matchers, math, programs, a judge, user functions.

Read `base.py` first. `choice.py` creates a reward from its description, `sum.py` adds up several.
"""

from rollout_server.rewards.library.base import RewardFunction
from rollout_server.rewards.library.choice import make_rewards
from rollout_server.rewards.library.sum import Rewards

__all__ = ["RewardFunction", "Rewards", "make_rewards"]
