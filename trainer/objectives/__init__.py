"""Objectives by name. Importing this package registers all of them.

Notation of the formulas in these modules, for token t of a sample, with all of its segments:

    pi_t     its probability under the current weights
    mu_t     under the behavior policy, which sampled it
    prox_t   under the weights at the start of the step
    ref_t    under the frozen reference model
    tea_t    under the teacher of the sample
    r        pi_t / mu_t, unless a module defines it otherwise
    W        prod_t pi_t / mu_t over the sampled tokens of the sample
    A, R, L  advantage; reward and number of sampled tokens of the sample
    sg(x)    x without gradient
"""

from trainer.objectives.base import (
    OBJECTIVES,
    Need,
    Objective,
    ProximalRule,
    SampledTokens,
    StepStats,
    TokenLosses,
)
from trainer.objectives.cispo import Cispo
from trainer.objectives.composed import Composed, build_objective
from trainer.objectives.dcpo import Dcpo
from trainer.objectives.distill import Distill
from trainer.objectives.dppo import DppoTv
from trainer.objectives.gspo import Gspo
from trainer.objectives.lad import Lad
from trainer.objectives.m2po import M2po
from trainer.objectives.masks import MASKS, Mask
from trainer.objectives.oapl import Oapl
from trainer.objectives.pairs import OnlineDpo, Rebel
from trainer.objectives.ppo import DecoupledPpo, Ppo
from trainer.objectives.soft import Maspo, Sapo
from trainer.objectives.sppo import Sppo
from trainer.objectives.tis import Reinforce, TruncatedIS
from trainer.objectives.topr import Topr
from trainer.objectives.trust_region import Kpop, TrustRegion
from trainer.objectives.vcpo import Vcpo
from trainer.objectives.vespo import Vespo
