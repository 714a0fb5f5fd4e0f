"""What a job's settings make of an optimizer step, before a model is there: objective, advantage estimator, reward shapings.

Made first by whoever trains, so that a misspelt setting ends the job before anything is loaded or joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from areal_like.config import Config, KlConfig
from areal_like.errors import ConfigError
from trainer.advantages.base import ADVANTAGES, Estimator
from trainer.advantages.reward_shaping import SHAPINGS, Shaping
from trainer.objectives import Need, Objective, build_objective


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts that a configuration describes."""

    objective: Objective
    advantage: Estimator
    """The one configured; an objective that prescribes another is served by `estimator`."""
    shapings: tuple[Shaping, ...]
    """Of the rewards, in order."""
    kl: KlConfig | None
    """The penalty to be taken off rewards; None: none (one in the loss is the objective's)."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Raises ConfigError for what is unknown, of the wrong type, or does not go together."""
        max_tokens, kl = config.sampling.max_new_tokens, config.kl
        settings = dict(config.advantage)
        shapings = settings.pop("shaping", None)
        recipe = cls(
            objective=build_objective(
                config.objective, max_tokens=max_tokens, kl=kl, entropy_coef=config.trainer.entropy_coef
            ),
            advantage=ADVANTAGES.build(settings),
            shapings=SHAPINGS.build_list(shapings, job={"max_tokens": max_tokens}),
            kl=kl if kl.coef and kl.place == "reward" else None,
        )
        used = recipe.estimator
        if used.uses_greedy != config.sampling.greedy_baseline:
            wanted = "a greedy sample of every prompt" if used.uses_greedy else "no greedy samples"
            raise ConfigError(
                f"{type(used).__name__} wants {wanted}: set sampling.greedy_baseline={str(used.uses_greedy).lower()}"
            )
        return recipe

    @property
    def estimator(self) -> Estimator:
        """The one used."""
        return self.objective.advantage or self.advantage

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference model has to be loaded."""
        return Need.REF in self.objective.needs or self.kl is not None

    def check_stream(self, config: Config) -> None:
        """Raises ConfigError when the buffer would serve groups that the objective cannot learn from."""
        if self.objective.single_version and config.buffer.group_filter != "single_version":
            raise ConfigError(
                "this objective wants every group from one version of the weights: set buffer.group_filter=single_version, "
                "weights.update_mode=drain and weights.sync_interval (the preset objective=oapl does)"
            )
