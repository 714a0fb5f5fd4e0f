"""Registration: the first message of every peer, and what the buffer answers.

A peer that speaks before its `Hello` was accepted is answered `HelloRequired` (so a restarted buffer is re-registered with at once).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """What a peer is."""

    ROLLOUT = "rollout"
    """A rollout server: takes leases, streams samples."""
    TRAINER = "trainer"
    """One rank of the trainer: takes batches; rank 0 also commits and allocates versions."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Peer -> buffer. `rid` of the envelope is answered with `Welcome` or `Refused`."""

    role: Role
    name: str
    """Stable name, e.g. `rollout-0`, `trainer-0`."""
    incarnation: int
    """Grows with every start of the same name (nanoseconds of wall clock at start); an older one is refused."""
    job: str
    """Name of the job the peer was configured for."""
    model: str
    """Fingerprint of the model's config (architecture, not weights)."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dataset: str
    """Fingerprint of the task and its settings."""
    settings: str = ""
    """`fingerprint.shared_settings`: what this role and the buffer must have alike, spelled out. Empty: not compared."""
    http_address: str
    """`host:port` of the peer's HTTP plane."""
    shard: int = 0
    """Which of `num_shards` buffers it takes this one for."""
    num_shards: int = 1
    weights_address: str = ""
    """tcp://host:port of a rollout server's weight control socket."""
    weights_version: int = 0
    """Version of the weights that the peer holds."""
    device: str = "cpu"
    """Device of the engine or rank: `cpu` | `cuda`; rank 0 picks gloo or NCCL by it."""
    num_train_prompts: int = 0
    """Rollout servers: training prompts that the task has (the buffer chooses among them by index)."""
    num_eval_prompts: int = 0
    """Rollout servers: held-out prompts that the task has."""
    rank: int = 0
    """Trainer rank."""
    world_size: int = 1
    """Trainer ranks."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """Buffer -> peer: registered."""

    job: str
    step: int
    """Optimizer steps completed so far (absolute)."""
    newest_version: int
    """Newest allocated weights version."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Buffer -> peer: a request or hello was not accepted, with what to change. Answers any request."""

    field: str
    """The field that differs or the rule that forbids it, e.g. `incarnation`, `model`, `step`."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class HelloRequired:
    """Buffer -> peer: we do not know you (any more); say hello again."""


@dataclass(frozen=True, kw_only=True)
class Ok:
    """Positive answer without content."""


@dataclass(frozen=True, kw_only=True)
class JobFailed:
    """Buffer -> anyone, as the answer to a request or pushed: the job cannot go on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Goodbye:
    """Peer -> buffer: leaving on purpose; leases were returned before."""

    stats: dict[str, float] = field(default_factory=dict)
    """Last statistics, same keys as in the heartbeat."""


MESSAGES = (Hello, Welcome, Refused, HelloRequired, Ok, JobFailed, Goodbye)
