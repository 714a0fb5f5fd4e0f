"""Objectives by name. Importing this package registers all of them."""

from trainer.objectives.base import OBJECTIVES, Facts, Need, Objective, SampledTokens, TokenLosses
from trainer.objectives.tis import Reinforce, TruncatedIS

__all__ = [
    "OBJECTIVES",
    "Facts",
    "Need",
    "Objective",
    "Reinforce",
    "SampledTokens",
    "TokenLosses",
    "TruncatedIS",
]
