"""The algorithm that a configuration selects: objective, advantage estimator, reward shapings and KL penalty.

It is built before any model is loaded, so that a misspelled setting ends the job at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Self

from areal_like.config import Config, KlConfig
from areal_like.config.default_objective import MAX_SHORT_ANSWER
from areal_like.errors import ConfigError
from trainer.advantages import ADVANTAGES, Advantage, Estimator, Prime
from trainer.advantages.reward_shaping import SHAPINGS, Shaping
from trainer.objectives import Need, Objective, build_objective
from trainer.objectives.normalizers import Normalizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepRecipe:
    """The parts of an optimizer step that need no model."""

    objective: Objective
    advantage: Estimator
    """The configured estimator; `estimator` is the one in use, since some objectives prescribe their own."""
    shapings: tuple[Shaping, ...]
    """Reward shapings, in order."""
    turn_discount: float
    """Discount from one turn of a sample to the next."""
    kl: KlConfig | None
    """KL penalty on rewards; None: no such penalty (one in the loss is part of the objective)."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Raises ConfigError for an unknown name, a wrong type, or parts that do not go together."""
        max_tokens, kl = config.sampling.max_new_tokens, config.kl
        if config.model.lora.dropout:
            raise ConfigError(
                f"model.lora.dropout={config.model.lora.dropout:g}: with dropout the probabilities of tokens "
                "would be random, in the importance ratios and in a replay: set model.lora.dropout=0 (only "
                "`areal-like sft` can use it)"
            )
        settings = dict(config.advantage)
        shapings, turn_discount = settings.pop("shaping", None), settings.pop("turn_discount", 1.0)
        if type(turn_discount) not in (int, float) or not 0 < turn_discount <= 1:
            raise ConfigError(f"advantage.turn_discount={turn_discount}: use a number above 0 and at most 1")
        closes = config.overdue == "close"
        recipe = cls(
            objective=build_objective(
                config.resolved_objective,
                max_tokens=max_tokens,
                kl=kl,
                distill=config.distill,
                entropy_coef=config.trainer.entropy_coef,
                takes_parts=closes,
                caps_beyond=closes and config.staleness.beyond == "cap",
            ),
            advantage=ADVANTAGES.build(settings),
            shapings=SHAPINGS.build_list(shapings, job={"max_tokens": max_tokens}),
            kl=kl if kl.coef and kl.place == "reward" else None,
            turn_discount=float(turn_discount),
        )
        if config.trainer.compile and recipe.objective.late_coefficients:
            raise ConfigError(
                f"trainer.compile=true: the gradients of objective {recipe.objective.display_name} read the "
                "inputs of single layers, which compiled code does not expose: set trainer.compile=false"
            )
        context = config.trainer.context_parallel
        takes_parts = not recipe.objective.late_coefficients or recipe.objective.one_sequence_per_microbatch
        if context > 1 and not takes_parts:
            raise ConfigError(
                f"trainer.context_parallel={context}: objective {recipe.objective.display_name} computes the "
                "norms of single sequences' gradients from whole sequences (objective.norms=ghost or auto), "
                "and a rank has a part of each: set objective.norms=proxy or exact, or "
                "trainer.context_parallel=1"
            )
        used = recipe.estimator
        if turn_discount != 1 and isinstance(used, Advantage) and not used.credits_turns:
            raise ConfigError(
                f"{type(used).__name__} has one advantage for all turns of a sample: "
                f"set advantage.turn_discount=1"
            )
        if used.uses_greedy != config.sampling.greedy_baseline:
            needed = "a greedy sample of every prompt" if used.uses_greedy else "no greedy samples"
            raise ConfigError(
                f"{type(used).__name__} needs {needed}: "
                f"set sampling.greedy_baseline={str(used.uses_greedy).lower()}"
            )
        if isinstance(used, Prime):
            recipe._check_prime(config)
        if closes:
            recipe._check_parts()
        return recipe

    def _check_prime(self, config: Config) -> None:
        """Raises ConfigError for a setting that does not go together with `advantage=prime`."""
        for setting, is_set, change in (
            (f"model.lora.rank={config.model.lora.rank}", config.model.lora.is_on, "train all weights"),
            (
                f"kl.reference={config.kl.reference}",
                bool(config.kl.reference),
                "leave it empty: token rewards are log-ratios to the initial model",
            ),
            (
                f"advantage.turn_discount={self.turn_discount:g}",
                self.turn_discount != 1,
                "set it to 1: the discount of token rewards is advantage.gamma",
            ),
            (
                f"sampling.group_size={config.sampling.group_size}",
                config.sampling.group_size < 2,
                "set it to at least 2: the baselines are those of the other samples",
            ),
        ):
            if is_set:
                raise ConfigError(f"{setting} does not go together with advantage.name=prime: {change}")

    def _check_parts(self) -> None:
        """Raises ConfigError for a part that needs whole groups."""
        used, is_group = self.estimator, isinstance(self.estimator, Advantage)
        advice = "and buffer.overdue=close trains on parts of groups: set buffer.overdue=wait, or"
        if not used.takes_parts:
            raise ConfigError(f"advantage {type(used).__name__} needs whole groups, {advice} choose another")
        for shaping in self.shapings:
            if not shaping.takes_parts:
                raise ConfigError(
                    f"advantage.shaping: {type(shaping).__name__} needs whole groups, {advice} leave it out"
                )
        if is_group and self.turn_discount != 1:
            raise ConfigError(
                f"advantage.turn_discount={self.turn_discount:g} needs the rewards of all turns of a group's "
                f"samples, {advice} advantage.turn_discount=1 or advantage=gae"
            )
        if is_group and self.kl is not None:
            raise ConfigError(
                f"kl.place=reward needs the log-probs of all samples of a group, {advice} kl.place=loss"
            )

    @property
    def estimator(self) -> Estimator:
        """The estimator in use: the objective's own if it prescribes one, else the configured one."""
        return self.objective.advantage or self.advantage

    @property
    def needs_reference(self) -> bool:
        """True if a frozen reference model has to be loaded."""
        return Need.REF in self.objective.needs or self.kl is not None or isinstance(self.estimator, Prime)

    def check_stream(self, config: Config) -> None:
        """Raises ConfigError if the buffer would serve groups that the objective cannot train on."""
        if self.objective.single_version and config.buffer.group_filter != "single_version":
            raise ConfigError(
                "this objective needs groups of one weight version: set buffer.group_filter=single_version, "
                "weights.update_mode=drain and weights.sync_interval (the preset objective=oapl does)"
            )


def warn_of_ignored_settings(objective: Objective, advantage: Estimator, normalizer: Normalizer) -> None:
    """Logs which configured settings have no effect because the objective prescribes its own."""
    own_advantage = objective.advantage and type(objective.advantage).__name__
    for setting, configured, prescribed in (
        ("trainer.normalizer", normalizer.name, objective.normalizer),
        ("advantage", type(advantage).__name__, own_advantage),
    ):
        if prescribed not in (None, configured):
            log.warning(
                "%s=%s is ignored: objective %s prescribes %s",
                setting,
                configured,
                objective.display_name,
                prescribed,
            )


def warn_of_unused_weights(config: Config) -> None:
    """Logs which settings of importance weights have no effect, because the teachers' loss has no weights."""
    own = config.resolved_objective
    counts_all = own.get("denominator", "original") == "original"
    if own.get("name") == "distill" and config.distill.loss == "full" and counts_all:
        for name in ("level", "mode", "cap", "low", "high", "normalize"):
            if name in own:
                log.warning(
                    "objective.%s=%s is ignored: with distill.loss=full the loss has no importance weight",
                    name,
                    own[name],
                )


def warn_of_products(config: Config, objective: Objective) -> None:
    """Logs that an objective with products of ratios is of little use for answers as long as the job's."""
    longest, limit = config.longest_answer
    if objective.weighs_products and longest > MAX_SHORT_ANSWER:
        log.warning(
            "objective %s weighs a sample by the product of its tokens' ratios, and a sample may have %d "
            "tokens (%s): beyond %d, rounding in engine and trainer alone makes such weights of little use. "
            "Use objective=auto, or see ess_ratio in the metrics",
            objective.display_name,
            longest,
            limit,
            MAX_SHORT_ANSWER,
        )
