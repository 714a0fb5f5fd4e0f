"""The part of the configuration that the ledger's rules depend on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Self

from areal_like.config import BufferConfig, Config
from areal_like.errors import ConfigError
from areal_like.shards import WHOLE, Shard
from buffer.prompts.curriculum import CurriculumSettings, Kind


@dataclass(frozen=True, kw_only=True)
class LedgerSettings:
    """What the rules depend on; fields as in the configuration."""

    max_staleness: int
    """The bound on lag in steps; with `adaptive` the largest that it may become."""
    groups_per_step: int
    """Of this shard."""
    group_size: int
    num_steps: int
    num_greedy: int = 0
    """Greedy samples of each group, beside its `group_size` others."""
    adaptive: bool = False
    """`max_staleness: auto`: the bound begins at 0 and the trainer moves it."""
    sync_interval: int = 1
    """Steps between weights that no group may mix, each trained on its own groups; 1: new weights may come at any time."""
    seed: int = 0
    overdue: str = "wait"
    group_filter: str = "none"
    max_reissues: int = 3
    max_sample_retries: int = 2
    max_consecutive_failures: int = 20
    lease_timeout_s: float = 10.0
    max_tokens: int = sys.maxsize
    """Longest sequence, prompt included, that the trainer can take: a longer one is refused where it comes in, and ends no trainer."""
    durable: bool = False
    """Whether the store survives this process: then a closed stream keeps what it has, and committed steps can be served again."""
    curriculum: CurriculumSettings | None = None
    shard: Shard = WHOLE
    """Which part of the job's numbers this ledger gives out."""

    def __post_init__(self) -> None:
        if self.group_filter == "spread" and self.group_size < 2:
            raise ConfigError(
                "buffer.group_filter=spread drops every group of one sample: set sampling.group_size to at least 2"
            )

    @classmethod
    def from_config(cls, config: Config, shard: Shard = WHOLE) -> Self:
        """Picks the fields out of the job's configuration."""
        return cls(
            max_staleness=config.staleness_cap,
            adaptive=config.max_staleness == "auto",
            # Where a group may span a push, a longer interval only means fewer pushes.
            sync_interval=config.weights.sync_interval
            if config.buffer.group_filter == "single_version"
            else 1,
            groups_per_step=shard.share(config.trainer.groups_per_step),
            group_size=config.sampling.group_size,
            num_greedy=int(config.sampling.greedy_baseline),
            num_steps=config.trainer.num_steps,
            seed=config.seed,
            overdue=config.buffer.overdue,
            group_filter=config.buffer.group_filter,
            max_reissues=config.buffer.max_reissues,
            max_sample_retries=config.buffer.max_sample_retries,
            max_consecutive_failures=config.buffer.max_consecutive_failures,
            lease_timeout_s=config.buffer.lease_timeout_s,
            max_tokens=config.trainer.tokens_per_microbatch,
            durable=config.buffer.durability != "none",
            curriculum=_curriculum(config.buffer),
            shard=shard,
        )


def _curriculum(config: BufferConfig) -> CurriculumSettings | None:
    if config.curriculum == "none":
        return None
    return CurriculumSettings(
        kind=Kind(config.curriculum),
        pool=config.curriculum_pool,
        target=config.curriculum_target,
        exploration=config.curriculum_exploration,
        memory=config.curriculum_memory,
        half_life=config.curriculum_half_life,
        reward_low=config.curriculum_reward_low,
        reward_high=config.curriculum_reward_high,
    )
