"""Settings of the buffer: the ledger of tickets, the curriculum, and the storage of trajectories.

The staleness bound that the buffer enforces, `max_staleness`, is a setting of the whole job (job.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from areal_like.config.common import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, Section, require
from areal_like.failures import FailureKind, FailurePolicy

Policy = Literal["retry", "zero", "drop"]
MAX_PEERS = 4096
"""Most peers of a buffer: the trainer gets the list of all of them in one message."""


@dataclass(frozen=True, kw_only=True)
class OnFailureConfig(Section, key="buffer.on_failure"):
    """Treatment of a failed sample, by the kind of its failure.

    `retry`: sample it again, up to `buffer.max_sample_retries` times; `zero`: train on its tokens with reward
    0 (before the first sampled token: as `retry`); `drop`: drop its ticket at once.
    """

    engine: Policy = "retry"
    """The engine responded with an error, or its completion cannot be used: `retry` or `drop`."""
    timeout: Policy = "retry"
    """The engine returned no token within `rollout.sample_timeout_s`: `retry` or `drop`."""
    reward: Policy = "retry"
    """The reward function raised, returned no finite number, or its process died."""
    reward_timeout: Policy = "zero"
    """The reward function exceeded `rollout.reward_timeout_s`. With `retry` or `drop`, completions that hang
    the verifier are never trained on with a low reward."""
    prompt: Policy = "drop"
    """The prompt is too long, or the engine refuses it: `drop` (and do not issue it again) or `retry`."""
    environment: Policy = "zero"
    """The task's example() or the episode raised or hung, or its conversation became too long for the
    engine."""
    routes: Policy = "retry"
    """With `model.router_replay`: the engine returned no routes for the completion, or unusable ones:
    `retry` or `drop`."""
    teacher: Policy = "retry"
    """With teachers at servers (`distill.teachers`): none returned the log-probs of the sample's tokens
    within `distill.retry_s`: `retry` or `drop`."""
    agent: Policy = "drop"
    """External agents did not make the sample, although its server gave it to several of them: `drop`,
    or `retry` (at another server, if one has room)."""

    def check(self) -> None:
        """Allows `zero` only for failures that leave tokens to train on."""
        for name in ("engine", "timeout", "prompt", "routes", "teacher", "agent"):
            lacks = "log-probs of its teacher" if name == "teacher" else "tokens to train on"
            require(
                getattr(self, name) != "zero",
                f"buffer.on_failure.{name}=zero: such a sample has no {lacks}: use retry or drop",
            )

    def policy(self, kind: FailureKind) -> FailurePolicy:
        """The policy for one kind of failure."""
        return FailurePolicy(getattr(self, kind.value))


@dataclass(frozen=True, kw_only=True)
class BufferConfig(Section, key="buffer"):
    """The buffer between rollout servers and trainer."""

    host: str = "127.0.0.1"
    """Address to bind. With several shards, `{shard}` in it is replaced by the shard's number."""
    port: int = 0
    """Port to bind; shard i binds port + i. With 0, a free port is chosen: daemons started by hand then need
    `discovery=run_dir`."""
    advertise_host: str = ""
    """Address at which other hosts reach the buffer, `{shard}` as in `host`; empty: `host`."""
    discovery: Literal["address", "run_dir"] = "address"
    """How rollout servers and ranks find the buffer. `address`: at `advertise_host` (`host`) and `port`.
    `run_dir`: at the address in its file in the run's directory, which all machines must share. A buffer that
    does not respond is looked up again, so it may be restarted on another machine, and its port may be 0.
    `areal-like run` starts its daemons with `run_dir`."""
    num_shards: PositiveInt = 1
    """Buffer daemons (buffer-0, buffer-1, ...) that split the prompts and the groups of every step; fixed for
    a run's life."""
    ports: tuple[int, ...] = ()
    """The shards' ports one by one; empty: `port` and those after it."""
    lease_timeout_s: PositiveFloat = 10.0
    """Seconds without a heartbeat after which a lease expires and its missing samples are leased again."""
    overdue: Literal["auto", "wait", "drop", "close"] = "auto"
    """Treatment of a group whose slowest samples are still running when its steps are due: `wait` reserves a
    position of the step for it, `drop` drops it when it exceeds the staleness bound, `close` closes it by
    `staleness.close_after`: it trains on the samples that are complete then, and on each later one when it is
    complete, with the staleness bound applied to each token. `auto`: `close` where the other settings allow
    it, else `wait`."""
    group_filter: Literal["none", "spread", "single_version"] = "none"
    """Groups that may be trained on: `spread` drops and replaces groups whose rewards are all equal (DAPO
    dynamic sampling), `single_version` drops groups that mix weight versions."""
    curriculum: Literal["none", "goldilocks", "paced"] = "none"
    """Choice of the next prompt among a few candidates: `goldilocks` prefers a solve rate near 1/2, `paced` a
    solve rate near curriculum_target."""
    curriculum_pool: Annotated[int, Bounds(2)] = 4
    """Candidate prompts for each choice, at least 2; those not chosen wait for the next epoch."""
    curriculum_target: Annotated[float, Bounds(0, 1, excludes_low=True, excludes_high=True)] = 0.5
    """Solve rate that `curriculum=paced` prefers."""
    curriculum_exploration: Annotated[float, Bounds(0, 1, excludes_low=True)] = 0.1
    """Fraction of choices that take the first candidate regardless of solve rates. Above 0, so that a prompt
    that never wins is tried again."""
    curriculum_memory: Annotated[int, Bounds(1, 100_000)] = 16384
    """Number of prompts whose outcomes are remembered (they are part of every checkpoint)."""
    curriculum_half_life: PositiveInt = 1024
    """Half-life of an outcome, in complete groups."""
    curriculum_reward_low: float = 0.0
    """Reward that counts as a solve rate of 0."""
    curriculum_reward_high: float = 1.0
    """Reward that counts as a solve rate of 1; rewards in between count in proportion."""
    max_reissues: NonNegativeInt = 3
    """Number of times that the prompt of a dropped ticket may be issued again."""
    max_sample_retries: NonNegativeInt = 2
    """Number of times that a failed sample is retried before its ticket is dropped with reason `failed`."""
    max_consecutive_failures: PositiveInt = 20
    """Consecutive failed samples, each of a different ticket, after which a rollout server gets no leases for
    a while. If the task's code failed at every server before the first good sample of the run, the run ends
    with the last error instead."""
    on_failure: OnFailureConfig = field(default_factory=OnFailureConfig)
    max_peers: Annotated[int, Bounds(1, MAX_PEERS)] = 1024
    """Maximum number of registered rollout servers and trainer ranks; further ones are refused."""
    max_message_bytes: Annotated[int, Bounds(1 << 16)] = 64 << 20
    """Largest message accepted from any peer, in bytes."""
    durability: Literal["power_loss", "process_crash", "none"] = "process_crash"
    """The kind of failure that acknowledged samples survive. Before an acknowledgement, `power_loss` syncs
    the sample to disk and `process_crash` writes it to the operating system's page cache. `none` keeps it in
    memory only: if the buffer dies, the run ends."""
    retain_trajectories: bool = False
    """Keep every accepted trajectory on disk, for replay and analysis. Otherwise only trajectories that may
    still be trained on are kept."""
    ledger_dir: str = ""
    """Directory for the ledger, for example on a local disk where `runs_dir` is a network file system: the
    ledger is `<ledger_dir>/<name>/ledger`, and a link in the run's directory leads to it. Empty: the ledger
    is in the run's directory."""
    segment_bytes: Annotated[int, Bounds(1 << 16, 1 << 31)] = 64 << 20
    """Size at which the next segment file is started, in bytes. A segment is deleted when no record in it is
    needed any more."""
    journals_bytes: NonNegativeInt = 4 << 30
    """Largest size of the journals of all sessions, in bytes on disk. Sessions whose next entry would exceed
    it do not survive their server."""
    cache_bytes: NonNegativeInt = 256 << 20
    """Size of the cache of trajectories in memory, in bytes. Other trajectories are read back from disk when
    a rank fetches them. While the disk is full, no more samples than that are taken from servers."""
    min_free_bytes: NonNegativeInt = 256 << 20
    """Free disk space to keep, in bytes: with less, nothing is admitted or acknowledged until space is
    available again."""

    def check(self) -> None:
        """Ranges; the number of ports; no retained trajectories without a ledger on disk."""
        require(bool(self.host), "buffer.host is empty: give an address to bind, e.g. 127.0.0.1")
        self._check_ports()
        require(
            self.curriculum_reward_low < self.curriculum_reward_high,
            "buffer.curriculum_reward_low must be below buffer.curriculum_reward_high",
        )
        require(
            not (self.retain_trajectories and self.durability == "none"),
            "buffer.retain_trajectories=true keeps trajectories on disk: "
            "set buffer.durability to process_crash or power_loss",
        )
        require(
            not (self.ledger_dir and self.durability == "none"),
            f"buffer.ledger_dir={self.ledger_dir}: with buffer.durability=none there is no ledger on disk",
        )

    def _check_ports(self) -> None:
        largest = 65536 - self.num_shards
        require(0 <= self.port <= largest, f"buffer.port={self.port}: use 0..{largest}")
        are_distinct = len(set(self.ports)) == self.num_shards == len(self.ports)
        require(
            not self.ports or (are_distinct and all(0 < port < 65536 for port in self.ports)),
            f"buffer.ports={list(self.ports)}: "
            f"give buffer.num_shards={self.num_shards} different ports of 1..65535, or none",
        )
