"""Settings of preference optimization (`areal-like preferences`), in addition to those of the trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from areal_like.config.common import Bounds, NonNegativeFloat, require
from areal_like.config.offline import PreferencesConfig

_BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "simpo": 2.0, "orpo": 0.1}
_ONLY = {
    "label_smoothing": ("dpo", "simpo"),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": ("dpo", "ipo", "kto"),
}
"""Settings that only some methods have."""


@dataclass(frozen=True, kw_only=True)
class PreferenceOptimizationConfig(PreferencesConfig, key="preferences"):
    """Training of the policy on comparisons of completions, or on completions with labels.

    Optimizer, micro-batches, ranks and checkpoints are those of the section `trainer`.
    """

    method: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"
    """Loss; `kto` learns from single completions with labels, the others from comparisons."""
    beta: NonNegativeFloat = 0.0
    """Factor of the implicit reward: the smaller, the farther the policy may move from the reference. For
    `ipo` it is the paper's tau; for `orpo` its lambda, the weight of the odds ratio. 0: 0.1, for `simpo`
    2."""
    label_smoothing: Annotated[float, Bounds(0, 0.5)] = 0.0
    """Share of the comparisons that are assumed to be labelled the wrong way round; only for `dpo` (cDPO) and
    `simpo`."""
    gamma: NonNegativeFloat = 1.0
    """Target difference of the rewards of two completions; only for `simpo`."""
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of completions with a good label; only for `kto`."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of completions with a bad label; only for `kto`."""
    reference: str = ""
    """The reference model, only for `dpo`, `ipo` and `kto`: a Hugging Face directory or name; empty: the
    model before training, with LoRA its base."""

    @property
    def method_beta(self) -> float:
        """`beta`, or the method's default."""
        return self.beta or _BETA[self.method]

    def check(self) -> None:
        super().check()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, methods in _ONLY.items():
            value = getattr(self, name)
            require(
                self.method in methods or value == defaults[name],
                f"preferences.{name}={value} has no effect with preferences.method={self.method}: it belongs "
                f"to {', '.join(methods)}",
            )
        require(
            self.method != "kto" or self.batch_rows > 1,
            "preferences.batch_rows=1 with preferences.method=kto: its KL is estimated from completions of "
            "other rows of a step, so a step needs at least 2",
        )
