"""Builds the configured StepRunner: an optimizer and further models around a sharded policy."""

from __future__ import annotations

from areal_like.config import Config
from areal_like.errors import ConfigError
from trainer.advantages.critic import Critic
from trainer.advantages.gae import Gae
from trainer.advantages.implicit_rewards import ImplicitRewards
from trainer.advantages.prime import Prime
from trainer.distributed.ranks import Ranks
from trainer.models.policy import BaseReference, Policy, build_policy
from trainer.objectives import Need
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.step.proximal import ProximalPolicy
from trainer.step.recipe import (
    StepRecipe,
    warn_of_ignored_settings,
    warn_of_products,
    warn_of_unused_weights,
)
from trainer.step.runner import StepRunner
from trainer.step.teachers import Teachers


def build_step_runner(
    config: Config, policy: Policy, ranks: Ranks, *, initial: str = "", with_weights: bool = True
) -> StepRunner:
    """Returns a runner with a fresh optimizer. `policy` is sharded. Raises ConfigError.

    `initial`: the model that the run started from. Critic and reward model start from it, and it is the
    reference model if one is needed and `kl.reference` names none. With an adapter that reference is the
    policy without it.
    `with_weights`: False leaves the weights of critic, reward model and proximal policy undefined, for a
    caller that reads a checkpoint into them.
    """
    trainer, recipe = config.trainer, StepRecipe.of(config)
    reference: Policy | BaseReference | None = None
    if recipe.needs_reference and policy.has_adapter and not config.kl.reference:
        reference = BaseReference(policy)
    elif recipe.needs_reference and (config.kl.reference or initial):
        reference = _build_reference(config, ranks, initial=initial)
    critic = None
    if isinstance(recipe.estimator, Gae) and initial:
        critic = Critic.of(config, recipe.estimator, ranks, initial=initial, with_weights=with_weights)
    prm = None
    if isinstance(recipe.estimator, Prime) and initial:
        assert reference is not None
        prm = ImplicitRewards.of(
            config, recipe.estimator, ranks, reference=reference, initial=initial, with_weights=with_weights
        )
    proximal = None
    if (rule := recipe.objective.proximal) is not None and initial:
        proximal = ProximalPolicy.of(
            config, policy, ranks, rule=rule, path=initial, with_weights=with_weights
        )
    teachers = None
    if Need.TEACHER in recipe.objective.needs and initial:
        teachers = Teachers.of(config, ranks, student=initial)
    num_params = sum(param.numel() for param in policy.model.parameters())
    objective = recipe.objective.for_model(num_params)
    normalizer = Normalizer(name=trainer.normalizer, max_tokens=config.sampling.max_new_tokens)
    warn_of_ignored_settings(objective, recipe.advantage, normalizer)
    warn_of_products(config, objective)
    warn_of_unused_weights(config)
    return StepRunner(
        policy,
        ShardedAdamW.of(trainer, policy, ranks, lr=trainer.lr),
        ranks,
        objective=objective,
        advantage=recipe.advantage,
        normalizer=normalizer,
        budget_tokens=trainer.tokens_per_microbatch,
        reference=reference,
        shapings=recipe.shapings,
        kl=recipe.kl,
        critic=critic,
        prm=prm,
        proximal=proximal,
        teachers=teachers,
        turn_discount=recipe.turn_discount,
        peak_tflops=trainer.peak_tflops,
        balances=_balances(config, ranks),
        beyond=config.staleness.beyond if config.overdue == "close" else "",
    )


def _balances(config: Config, ranks: Ranks) -> bool:
    """`trainer.balance`, with `auto` resolved."""
    if config.trainer.balance == "auto":
        # With max_staleness=0 a step runs while its groups are generated; balancing would first wait for all.
        return ranks.num_data > 1 and config.max_staleness != 0
    return config.trainer.balance == "balanced"


def _build_reference(config: Config, ranks: Ranks, *, initial: str) -> Policy:
    try:
        return build_policy(config, config.kl.reference or initial, ranks, frozen=True)
    except ConfigError as error:
        if not config.kl.reference:
            raise
        raise ConfigError(f"kl.reference={config.kl.reference}: {error}") from error
