"""Creates the reward described by `task.reward`.

A description is a name (`exact`), the path of a function (`my_rewards.score`), a mapping with one of these as
`name` and settings, or a list of descriptions whose weighted values are added up. Rewards are imported on
use: an optional package is needed only by its own reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from areal_like.errors import ConfigError
from areal_like.registry import Registry
from rollout_server.rewards.library.base import RewardFunction
from rollout_server.rewards.library.sum import Rewards

_LIBRARY = "rollout_server.rewards.library"
_FUNCTION = f"{_LIBRARY}.function.UserFunction"
REWARDS = Registry[RewardFunction](
    "task.reward",
    RewardFunction,  # type: ignore[type-abstract]
    elsewhere={
        "exact": f"{_LIBRARY}.matching.Exact",
        "regex": f"{_LIBRARY}.matching.Regex",
        "math": f"{_LIBRARY}.mathematics.Mathematics",
        "code": f"{_LIBRARY}.code.Code",
        "judge": f"{_LIBRARY}.judge.Judge",
    },
)
_OWN_SETTINGS = frozenset(field.name for field in dataclasses.fields(RewardFunction))


def make_rewards(spec: Any, *, sandbox: str = "bwrap") -> Rewards:
    """Creates the rewards described by `spec`, the value of `task.reward`; `sandbox`: `rewards.sandbox`.

    Raises ConfigError for an unknown name or setting, and for a function that cannot be imported.
    """
    is_list = isinstance(spec, Sequence) and not isinstance(spec, str)
    entries = list(spec) if is_list else [spec]
    if not entries:
        raise ConfigError("task.reward is an empty list: name at least one reward")
    functions = [_make(entry, sandbox=sandbox) for entry in entries]
    if all(function.weight == 0 for function in functions):
        raise ConfigError("task.reward: every weight is 0, so all rewards would be 0: give one a weight")
    return Rewards(functions)


def _make(entry: Any, *, sandbox: str) -> RewardFunction:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
        raise ConfigError(
            f"task.reward: want a name ({', '.join(REWARDS.names())}), the path of a function "
            f"(my_rewards.score), a mapping with `name` and settings, or a list of these; got {entry!r}"
        )
    name = entry.get("name")
    if isinstance(name, str) and "." in name:
        own = {key: value for key, value in entry.items() if key in _OWN_SETTINGS}
        settings = {key: value for key, value in entry.items() if key not in own and key != "name"}
        return REWARDS.build({**own, "_target_": _FUNCTION, "path": name, "settings": settings})
    if isinstance(name, str) and name not in REWARDS.names():
        raise ConfigError(
            f"task.reward={name}: choose one of {', '.join(REWARDS.names())}; for your own function write "
            "task.reward=my_module.my_function"
        )
    return REWARDS.build(entry, job={"sandbox": sandbox})
