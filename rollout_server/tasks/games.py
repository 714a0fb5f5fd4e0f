"""The common part of tasks on suites of environments: an optional package, and a seed for each example."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from areal_like.errors import ConfigError
from rollout_server.tasks.base import Example, Split, Task


@dataclass(frozen=True, kw_only=True)
class GameTask(Task):
    """Base of tasks whose examples are seeds of an environment. All samples of a group get the same one."""

    system_prompt: str = ""
    """First message of every episode; empty: none."""

    def example(self, split: Split, index: int) -> Example:
        """Returns a seed: even for training, odd for held-out examples."""
        seed = 2 * self.rng(split, index).getrandbits(30) + (split == "eval")
        return Example(prompt=f"game {seed}", answer=seed)

    def first_messages(self, observation: str) -> list[dict[str, Any]]:
        """Returns the system prompt, if there is one, and the first observation."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": observation}]


def optional_package(package: str, *, task: str, distribution: str = "") -> Any:
    """Imports a package. If it is missing, raises ConfigError that says how to install it.

    `distribution`: its name on the package index, if different.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"task {task} needs a package: pip install {distribution or package} ({error})"
        ) from error
