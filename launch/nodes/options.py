"""What a user chooses for a run whose roles a scheduler starts on nodes of its choice."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from areal_like.config import Config
from areal_like.errors import ConfigError

MOST_SERVERS = 1000


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The options of every scheduler. Raises ConfigError for a number that is out of range."""

    rollout_jobs: int | None = None
    """Rollout servers; None: `rollout.num_servers` of the settings."""
    trainer_nodes: int = 1
    interface: str = ""
    """Network interface whose address the daemons bind; empty: the address that the scheduler knows."""
    max_failures: int = 5
    """Failures in a row after which a role is not started again."""

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise ConfigError(f"--max-failures {self.max_failures}: use at least 0")

    @classmethod
    def of(cls, args: argparse.Namespace, kept: Mapping[str, Any] = MappingProxyType({})) -> Self:
        """The options of a command line; one that is not given (None) is as in `kept`, or the default."""
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        return cls(**dict(kept) | {name: value for name, value in given.items() if value is not None})

    def num_servers(self, *, default: int) -> int:
        """Rollout servers: as chosen, or `default`. Raises ConfigError outside of 1 to MOST_SERVERS."""
        number = default if self.rollout_jobs is None else self.rollout_jobs
        if not 1 <= number <= MOST_SERVERS:
            raise ConfigError(f"--rollout-jobs {number}: use 1 to {MOST_SERVERS}")
        return number


def gpus_of(config: Config, role: str, *, trainer_nodes: int) -> int:
    """GPUs that one node of a role needs; 0: none."""
    rollout = config.rollout
    if role == "trainer" and config.trainer.device != "cpu":
        return config.trainer.world_size // trainer_nodes
    if role == "rollout" and rollout.engine_device != "cpu" and not rollout.sglang.url:
        return rollout.gpus_per_engine
    return 0
