"""`buffer.overdue=auto` is `close` for exactly the methods that the trainer can use with parts of groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import trainer.advantages.gae  # noqa: F401  (registers the advantage gae)
from areal_like.config import Config, from_mapping
from areal_like.errors import ConfigError
from trainer.advantages import ADVANTAGES
from trainer.advantages.reward_shaping import SHAPINGS
from trainer.objectives import OBJECTIVES
from trainer.step.recipe import StepRecipe

SHAPING: dict[str, Any] = {"laconic": {"budget_tokens": 8}}
TAUGHT: dict[str, Any] = {"distill": {"teachers": {"default": "teacher"}}}
METHODS: list[dict[str, Any]] = [
    *({"objective": {"name": name}} | (TAUGHT if name == "distill" else {}) for name in OBJECTIVES.names()),
    {"objective": {"name": "tis"}} | TAUGHT,
    *(
        {"advantage": {"name": name}, "sampling": {"greedy_baseline": name == "remax"}}
        for name in ADVANTAGES.names()
    ),
    *(
        {"advantage": {"name": "grpo", "shaping": [{"name": name} | SHAPING.get(name, {})]}}
        for name in SHAPINGS.names()
    ),
    {"objective": {"name": "vcpo", "leave_one_out": True}},
    {"objective": {"name": "vcpo", "baseline": "none"}},
    {"objective": {"name": "vcpo", "baseline": "batch"}},
    *(
        {"advantage": {"name": name}, "kl": {"coef": 0.1, "place": place}}
        for name in ("grpo", "gae")
        for place in ("loss", "reward")
    ),
    *({"advantage": {"name": name, "turn_discount": 0.9}} for name in ("rloo", "gae")),
]


class Closing(Config):
    """A configuration that says `close`, whatever contradicts it."""

    @property
    def overdue(self) -> Any:
        return "close"


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_auto_agrees_with_the_trainer(method: dict[str, Any]) -> None:
    config = from_mapping({"buffer": {"overdue": "auto"}, **method})
    StepRecipe.of(dataclasses.replace(config, buffer=dataclasses.replace(config.buffer, overdue="wait")))
    closing = Closing(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})
    if config.overdue == "close":
        StepRecipe.of(closing)
    elif config.sampling.greedy_baseline:
        assert "greedy" in config.contradicts_close[0], "the buffer has no greedy samples of parts"
    else:
        with pytest.raises(ConfigError, match=r"buffer\.overdue"):
            StepRecipe.of(closing)
