"""Base class and registry of objectives: per-token losses computed from the sampled tokens of a micro-batch.

The step handles masks, packing, micro-batches, ranks, normalization, clipping and the optimizer. An objective
gets sampled tokens only, so prompt tokens cannot contribute. What a paper calls a sequence or a trajectory is
a whole sample here, with all of its segments. It returns losses that are neither averaged nor
normalized, so the result does not depend on how a step is cut into micro-batches. An objective that depends
on the whole step declares `scope = Scope.BATCH` and computes statistics with three methods, of which the
first two are optional:

    observe(batch) -> vectors     once per micro-batch; concatenated over micro-batches and ranks
    summarize(vectors) -> stats   once, with the same result on every rank
    losses(batch, stats)          stats are empty under scope GROUP

Under scope GROUP, `observe` runs along with the gradient, and its stats are used only by `lr_scale`.

An objective that remembers earlier steps overrides `initial_state` and `next_state`. Its state is a few
numbers, the same on every rank, which checkpoints store, and `lr_scale` finds it in its stats as `state`.

A complete custom objective (`objective._target_=my_module.SoftReinforce objective.power=0.5`):

    @dataclass(frozen=True, kw_only=True)
    class SoftReinforce(Objective):
        power: float = 1.0

        def losses(self, batch, stats):
            weight_S = torch.exp(self.power * (batch.logp_S - batch.behavior_logp_S).clamp(max=1.0)).detach()
            return TokenLosses(loss_S=-weight_S * batch.advantage_S * batch.logp_S)

Shape suffixes: S sampled tokens of a micro-batch, N its samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from areal_like.config.common import Section
from areal_like.errors import ConfigError, UserError
from areal_like.registry import Registry
from trainer.advantages.base import Advantage
from trainer.batching.sampled_tokens import SampledTokens
from trainer.batching.scope import Scope
from trainer.gradients.base import Gradients
from trainer.objectives.kl_control import KlControl

if TYPE_CHECKING:
    from trainer.distributed.ranks import Ranks
    from trainer.models.policy import Policy

_RENAMED = {"lone_sequences": "one_sequence_per_microbatch"}
"""Earlier name of an attribute that a custom objective may set -> its current name."""


class Need(StrEnum):
    """An input that is computed only for objectives that ask for it."""

    PROX = "prox"
    """Log-probs under the weights at the start of the step.

    Free: with one optimizer step per batch they are `logp_S`, detached. With an objective's `proximal` they
    are those of a copy of the policy instead: one more forward.
    """
    REF = "ref"
    """Log-probs under a frozen reference model: one more forward."""
    TEACHER = "teacher"
    """Log-probs under the teachers of `distill.teachers`: one more forward, unless the records have them."""
    REVERSE_KL = "reverse_kl"
    """KL(pi || tea) over the whole vocabulary, which carries gradient; together with TEACHER."""
    COLLISION = "collision"
    """Sum over the vocabulary of squared probabilities at each token: one more pass over the logits."""
    ENTROPY = "entropy"
    """An entropy that carries gradient: its softmax is kept for the backward."""


@dataclass(frozen=True, kw_only=True)
class ProximalRule:
    """The rule by which a copy follows the policy (`trainer/step/proximal.py`): set one of the two fields."""

    interval: int = 0
    """Steps after which it is replaced by the policy; 0: it is an average."""
    decay: float = 0.0
    """For an exponential average: weight of a step's policy relative to that of the next step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLosses:
    """The result of `Objective.losses`."""

    loss_S: Tensor
    """Loss of each sampled token.

    Its gradient reaches only its own token's log-prob, so that masks compose.
    """
    counted_S: Tensor | None = None
    """bool: tokens that count in the normalizer. None: all, also those whose loss was masked to zero."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Vectors, over tokens or samples, whose mean over the step becomes a metric of that name."""
    chosen: dict[str, Tensor] = field(default_factory=dict)
    """Name in `means` -> bool tensor of the same shape: the entries that the mean is over. Without one, all.
    Indexing by a mask instead would make the host wait for a GPU."""


StepStats = Mapping[str, Tensor]
"""Statistics of the whole step by name; float64 on the CPU."""


class Objective(Section, ABC, key="objective"):
    """Base of all objectives.

    Choices and bounds of a setting are stated by its annotation (`Literal`, `PositiveFloat`); `check` is
    for rules that involve several settings. A subclass may shadow class attributes with properties where they
    depend on settings.
    """

    scope: Scope = Scope.GROUP
    """BATCH: the losses depend on the whole step."""
    needs: frozenset[Need] = frozenset()
    """Optional inputs that `losses` or `observe` reads."""
    whole_groups: bool = False
    """True: a group is never split over micro-batches (for baselines and gradients of a whole group)."""
    one_sequence_per_microbatch: bool = False
    """True: every micro-batch is a single sample (for autograd's gradient of each sample)."""
    takes_token_advantages: bool = True
    """False: the tokens of a sample have one advantage, or none, so no term of single tokens may be added to
    it (`distill.teachers`)."""
    late_coefficients: bool = False
    """True: `gradients` scales the losses after the backward, so no other term may be added to them."""
    shares_prefixes: bool = True
    """True: a prefix that sequences of a micro-batch have in common is computed once. False: `gradients`
    needs separate rows for each sample. With `late_coefficients` it counts as False."""
    skips_zero_advantage: bool = True
    """True: a group whose advantages are all zero has no gradient, so it is counted but not run."""
    single_version: bool = False
    """True: a group's samples must come from one weight version (`buffer.group_filter=single_version`)."""
    ess_level: str = "sequence"
    """Level of the importance weights, `sequence` | `geometric` | `token`: `max_staleness=auto` follows their
    effective sample size."""
    proximal: ProximalRule | None = None
    """Set if the log-probs of Need.PROX come from a copy of the policy that lags behind it."""
    advantage: Advantage | None = None
    """Set if the method prescribes its own advantage, which replaces the configured one."""
    normalizer: str | None = None
    """Set if the method prescribes its own normalizer, which replaces the configured one."""
    kl_control: KlControl | None = None
    """Set if the loss has a KL penalty."""

    @property
    def weighs_products(self) -> bool:
        """True if the importance weight of a sample is the product of its tokens' ratios."""
        return getattr(self, "level", "") == "sequence"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises ConfigError for a class that sets an attribute by its earlier name, which has no effect."""
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls) or old in vars(cls).get("__annotations__", {}):
                raise ConfigError(f"objective {cls.__name__} sets {old}, which is now called {new}")

    @property
    def display_name(self) -> str:
        """Name in log and error messages: the class that the user configured."""
        return type(self).__name__

    @property
    def takes_parts(self) -> bool:
        """True if it can be used with `buffer.overdue=close`, where a step also has parts of groups."""
        return not self.whole_groups and not self.single_version

    def for_parts(self) -> Objective:
        """Returns this objective for `buffer.overdue=close`. Raises ConfigError if it needs whole groups."""
        if not self.takes_parts:
            raise ConfigError(
                f"buffer.overdue=close trains on parts of groups, and objective {self.display_name} needs "
                "whole groups: set buffer.overdue=wait, or choose another objective"
            )
        return self

    def for_model(self, num_params: int) -> Objective:
        """Returns this objective for a model of that size; the trainer calls it before the first step."""
        return self

    @abstractmethod
    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """Per-token losses of one micro-batch.

        Must be finite for any finite log-ratio. Both arguments are positional.
        """

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """Vectors of any length that `summarize` needs of this micro-batch; called without gradient."""
        return {}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """Statistics of the whole step from each vector's concatenation (float64, on the CPU)."""
        return {}

    def initial_state(self) -> tuple[float, ...]:
        """The state before the first step; empty: none."""
        return ()

    def next_state(self, state: Sequence[float], stats: StepStats) -> tuple[float, ...]:
        """The state with the statistics of this step, for its `lr_scale` and for the next step."""
        return tuple(state)

    def lr_scale(self, stats: StepStats) -> float:
        """Factor on this step's learning rate. `stats["state"]`: the result of `next_state`."""
        return 1.0

    def step_metrics(self, stats: StepStats) -> dict[str, float]:
        """Metrics of the step from the argument of `lr_scale`."""
        return {}

    def gradients(self, policy: Policy, ranks: Ranks) -> Gradients:
        """The accumulator of the step's gradient. Called once, with the sharded policy.

        Objectives that need more than a sum override it, for instance for a baseline from the norms of each
        sample's gradient.
        """
        return Gradients()


def checked_losses(objective: Objective, batch: SampledTokens, stats: StepStats) -> TokenLosses:
    """The objective's losses. Raises UserError if they are not one for each token: a mean would be broadcast,
    and trained on."""
    name, losses = type(objective).__name__, objective.losses(batch, stats)
    if not isinstance(losses, TokenLosses):
        raise UserError(
            f"{name}.losses returned {type(losses).__name__}: return TokenLosses(loss_S=...), with one loss "
            "for each sampled token"
        )
    if losses.loss_S.shape != batch.logp_S.shape:
        raise UserError(
            f"{name}.losses returned loss_S of shape {list(losses.loss_S.shape)} for {len(batch.logp_S)} "
            "sampled tokens: return one loss for each of them, neither averaged nor summed"
        )
    return losses


OBJECTIVES = Registry[Objective]("objective", Objective)  # type: ignore[type-abstract]
