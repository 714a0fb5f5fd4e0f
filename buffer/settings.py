"""The part of the configuration that the ledger's rules depend on. Only `areal_like.config` has defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from areal_like.config import BufferConfig, Config
from areal_like.errors import ConfigError
from areal_like.shards import WHOLE, Shard
from areal_like.wire.records import BYTES_PER_TOKEN

GROUPS_PER_STEP, DURABILITY = "trainer.groups_per_step", "buffer.durability"
OVERDUE, BEYOND = "buffer.overdue", "staleness.beyond"
"""Recorded by step, although they change only with the start of a trainer."""


@dataclass(frozen=True, kw_only=True)
class LedgerSettings:
    """Settings of one shard's ledger. Fields without a description are as in the configuration."""

    buffer: BufferConfig
    """For `overdue` and `durability`, use the fields `overdue` and `durable` below."""
    staleness_cap: int
    """Largest staleness bound of a ticket, in optimizer steps: `max_staleness`, or `max_staleness_cap` if
    `adaptive`."""
    adaptive: bool
    """True for `max_staleness: auto`: the bound starts at 0, and the trainer changes it up to the cap."""
    sync_interval: int
    """Steps between weight pushes that no group may span; 1: groups may span pushes."""
    groups_per_step: int
    """Groups of this shard in each optimizer step."""
    group_size: int
    num_greedy: int
    """Greedy samples in each group, in addition to `group_size`."""
    num_steps: int
    seed: int
    overdue: str
    """`wait`, `drop` or `close`; `auto` is resolved."""
    close_after: int
    """With `close`: a group is closed when the trainer begins the step `close_after - 1` after the group's
    begin."""
    max_tokens: int
    """Maximum tokens of a sample (prompt, turns and messages between them, over all segments). Longer samples
    are refused."""
    max_segment_tokens: int
    """Maximum tokens of one segment: as many as fit into a micro-batch."""
    max_eval_tokens: int
    """Maximum tokens of a sample of an evaluation, which no trainer gets: as many as fit into a message."""
    keep_evaluations: int
    """`eval.keep`."""
    router_replay: bool
    """`model.router_replay`: samples to train on need the routes of their tokens; without it none may have
    some."""
    eval_sets: Mapping[str, int]
    """Number of samples of each prompt, by evaluation set."""
    eval_sets_with_task: frozenset[str]
    """Sets whose prompts and rewards are not those of the job's task."""
    journal_bytes: int
    """`sessions.journal_bytes`."""
    durable: bool
    """True if the store survives this process. Then a closed stream keeps its tickets, and committed steps
    can be served again."""
    recorded: Mapping[str, str] = field(default_factory=dict)
    """Settings of the job, as text, whose values the ledger records by step for the audit."""
    shard: Shard = WHOLE
    """The shard of the job's numbers (tickets, leases, positions) that this ledger owns."""

    @property
    def closes(self) -> bool:
        """True if groups are closed, and the staleness bound holds for each token."""
        return self.overdue == "close"

    def __post_init__(self) -> None:
        if self.buffer.group_filter == "spread" and self.group_size < 2:
            raise ConfigError(
                "buffer.group_filter=spread drops every group of one sample: "
                "set sampling.group_size to at least 2"
            )

    @classmethod
    def from_config(cls, config: Config, shard: Shard = WHOLE) -> Self:
        # If a group may span a push, a longer interval only means fewer pushes and does not affect deadlines.
        sync_interval = config.weights.sync_interval if config.buffer.group_filter == "single_version" else 1
        return cls(
            buffer=config.buffer,
            staleness_cap=config.staleness_cap,
            adaptive=config.max_staleness == "auto",
            sync_interval=sync_interval,
            groups_per_step=shard.share(config.trainer.groups_per_step),
            group_size=config.sampling.group_size,
            num_greedy=int(config.sampling.greedy_baseline),
            num_steps=config.trainer.num_steps,
            seed=config.seed,
            overdue=config.overdue,
            close_after=config.close_after,
            max_tokens=max(config.trainer.tokens_per_microbatch, config.episode.max_tokens),
            max_segment_tokens=config.trainer.tokens_per_microbatch,
            max_eval_tokens=config.buffer.max_message_bytes // BYTES_PER_TOKEN,
            keep_evaluations=config.eval.keep,
            router_replay=config.model.router_replay,
            eval_sets={name: one.num_samples for name, one in config.eval.resolved_sets.items()},
            eval_sets_with_task=frozenset(name for name, one in config.eval.sets.items() if one.task),
            journal_bytes=config.sessions.journal_bytes,
            durable=config.buffer.durability != "none",
            recorded={
                GROUPS_PER_STEP: str(config.trainer.groups_per_step),
                DURABILITY: config.buffer.durability,
                OVERDUE: config.overdue,
                BEYOND: config.staleness.beyond,
            },
            shard=shard,
        )
