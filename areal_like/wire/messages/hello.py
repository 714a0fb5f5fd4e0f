"""Registration and departure: the first and the last messages between every peer and the buffer.

A peer that sends any other message before its `Hello` was accepted gets `HelloRequired`, so that peers of a
restarted buffer register again at once.

A name belongs to the process that responds under it. When another process says hello under a name that is
taken, the buffer sends `AreYouAlive` to the process that has it. It refuses the newcomer if that process
responds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar


class Role(StrEnum):
    """Kinds of peers."""

    ROLLOUT = "rollout"
    """A rollout server: takes leases and sends samples."""
    TRAINER = "trainer"
    """One rank of the trainer: fetches groups; rank 0 also commits steps and allocates versions."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Peer -> buffer: registers the peer. Reply: `Welcome` or `Refused`."""

    max_header_bytes: ClassVar[int] = 8 << 10
    """The only message of an unregistered peer that is decoded."""

    role: Role
    name: str
    """Stable name, e.g. `rollout-0`, `trainer-0`."""
    process: str
    """Identity of the process: 32 hexadecimal digits, random, chosen at its start. All ranks of one trainer
    have the same."""
    incarnation: int = 0
    """The incarnation that this buffer has granted to this process (`Welcome.incarnation`); 0: none yet."""
    job: str
    """Name of the job that the peer is configured for."""
    model: str
    """Fingerprint of the model's config (architecture, not weights)."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dataset: str
    """Fingerprint of the task and its settings."""
    content: str = ""
    """Rollout servers: `Task.fingerprint`, over the content of data files and the first examples; equal in
    all servers of a job. Empty: not compared."""
    eval_content: str = ""
    """The same fingerprint for all evaluation sets together."""
    settings: str = ""
    """`fingerprint.shared_settings`: the settings that must equal the buffer's, as text. Empty: not
    compared."""
    http_address: str
    """`host:port` of the peer's HTTP server."""
    shard: int = 0
    """Index of the buffer shard that the peer expects at this address, of `num_shards`."""
    num_shards: int = 1
    weights_address: str = ""
    """tcp://host:port of a rollout server's socket for weight pushes."""
    weights_version: int = 0
    """Version of the peer's weights."""
    sessions_url: str = ""
    """URL of a rollout server's sessions for external agents; empty: it has none."""
    dtype: str = ""
    """Dtype of the weights in the engine, or in the trainer's forward; empty: not known."""
    device: str = "cpu"
    """Device of the engine or rank, `cpu` or `cuda`; it decides between gloo and NCCL."""
    num_train_prompts: int = 0
    """Rollout servers: number of the task's training prompts, among which the buffer chooses by index."""
    source_sizes: list[int] = field(default_factory=list)
    """Rollout servers: training prompts of each task of a mixture, which follow one another; their sum is
    `num_train_prompts`. Empty: no mixture."""
    source_weights: list[float] = field(default_factory=list)
    """How often each of these tasks is drawn."""
    eval_sets: dict[str, int] = field(default_factory=dict)
    """Rollout servers: number of held-out prompts that the task of each evaluation set has, by name."""
    rank: int = 0
    """Trainer rank."""
    world_size: int = 1
    """Trainer ranks."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """Buffer -> peer: the peer is registered."""

    job: str
    incarnation: int
    """Number of this process among all processes that have had its name; all ranks of one trainer have the
    same number. A replaced process has a smaller one and is refused."""
    step: int
    """Optimizer steps completed so far (absolute)."""
    newest_version: int
    """Newest allocated weights version."""
    session_secret: str = ""
    """To a rollout server: the secret of the keys of all sessions of this buffer's tickets
    (`areal_like.security.session_keys`), in hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Buffer -> peer: a request or hello was not accepted. May be the reply to any request."""

    field: str
    """The field that differs or the rule that forbids it, e.g. `incarnation`, `model`, `step`."""
    reason: str
    """The difference, and the necessary change."""


@dataclass(frozen=True, kw_only=True)
class HelloRequired:
    """Buffer -> peer: the peer is not registered (any more) and must send `Hello`."""


@dataclass(frozen=True, kw_only=True)
class Ok:
    """Buffer -> peer: the request succeeded, and has no result."""


@dataclass(frozen=True, kw_only=True)
class JobFailed:
    """Buffer -> any peer, as a reply or unsolicited: the job cannot continue."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class AreYouAlive:
    """Buffer -> peer: another process says hello under the peer's name. Any message counts as a reply."""


@dataclass(frozen=True, kw_only=True)
class StillAlive:
    """Peer -> buffer: the reply to `AreYouAlive`."""


@dataclass(frozen=True, kw_only=True)
class Drain:
    """Buffer -> rollout server: an operator requested that the server leave (`areal-like drain`)."""


@dataclass(frozen=True, kw_only=True)
class JobFinished:
    """Buffer -> any peer, unsolicited or as the reply to `Hello` or `StartTraining`: the run is finished.

    Rollout servers drain and exit with code 0. The reply to `StartTraining` means that there is no step left.
    """


@dataclass(frozen=True, kw_only=True)
class Goodbye:
    """Peer -> buffer: the peer leaves on purpose, after returning its leases."""

    stats: dict[str, float] = field(default_factory=dict)
    """Last statistics, with the same keys as in heartbeats."""


TO_BUFFER = (Hello, StillAlive, Goodbye)
"""The messages that peers send to a buffer."""
FROM_BUFFER = (Welcome, Refused, HelloRequired, Ok, JobFailed, AreYouAlive, Drain, JobFinished)
"""The messages that a buffer sends."""
MESSAGES = (*TO_BUFFER, *FROM_BUFFER)
