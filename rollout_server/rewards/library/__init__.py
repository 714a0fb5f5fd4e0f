"""Ready-made rewards for `task.reward`: matchers, math, programs, a judge, functions of the user.

Read `base.py` first. `choice.py` makes a reward from its description, `sum.py` adds several up.
"""

from rollout_server.rewards.library.base import RewardFunction
from rollout_server.rewards.library.choice import make_rewards
from rollout_server.rewards.library.sum import Rewards

__all__ = ["RewardFunction", "Rewards", "make_rewards"]
