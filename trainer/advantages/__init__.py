"""Advantage estimators by name. Importing this package registers all of them."""

from trainer.advantages.base import ADVANTAGES, Advantage, Estimator, FloatArray
from trainer.advantages.gae import Gae
from trainer.advantages.group import DrGrpo, Gpg, Grpo, Opo, ReinforcePlusPlus, Remax, Rloo
from trainer.advantages.prime import Prime
from trainer.advantages.process import GrpoProcess
from trainer.advantages.running import Running
