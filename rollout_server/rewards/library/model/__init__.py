"""The reward `model`: the score of a reward model, from a score server or from SGLang.

`reward.py` has the settings, `scorers.py` finds the servers, `formats.py` writes requests and reads their
responses.
"""

from rollout_server.rewards.library.model.reward import ModelReward

__all__ = ["ModelReward"]
