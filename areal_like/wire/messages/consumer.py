"""Trainer ranks <-> buffer: batches in; versions, steps and commits out. Every request is answered with its `rid`.

Any request may be answered `Refused` (an older incarnation, a step that makes no sense) or `JobFailed`. `Fetch` is a long poll: the
answer comes when the group is recorded. Only rank 0 sends anything but `Fetch` and `TrainerHeartbeat`. Of several buffers (shards.py) the
first gives out versions, evaluates and holds the directory; the rest is asked of the one whose place it is, or told to all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from areal_like.trajectory import Trajectory
from areal_like.wire.records import Record


@dataclass(frozen=True, kw_only=True)
class TrainerHeartbeat:
    """Rank -> buffer, every `daemon.heartbeat_s`. Answered by `HeartbeatAck`."""

    state: str
    """`starting` | `loading` | `pushing` | `evaluating` | `training` | `draining`."""
    step: int
    stats: dict[str, float] = field(default_factory=dict)
    """`tokens_per_s`, `loss`, `reward`, ..."""


@dataclass(frozen=True, kw_only=True)
class StartTraining:
    """Rank 0 -> buffer, once an incarnation, before any other request: where the trainer stands. Answered `Welcome`.

    Fences every older trainer incarnation. Its checkpoint is the authority: recorded steps from `step` on are served again identically,
    weights of later steps are abandoned. A ledger without a past starts the stream at `step`.
    """

    step: int
    """Completed optimizer steps (0 for a new run, K after resuming from checkpoint K)."""
    stream: dict[str, int | list[int]] = field(default_factory=dict)
    """What `StreamState` said when the checkpoint was made; empty for a new run. Only a ledger without a past needs it."""


@dataclass(frozen=True, kw_only=True)
class AllocVersion:
    """Rank 0 -> buffer, before each push. Answered `VersionGranted`."""

    step: int
    """Optimizer step that these weights are the start of (weights after finishing step k-1 have step k)."""


@dataclass(frozen=True, kw_only=True)
class VersionGranted:
    """Buffer -> rank 0."""

    version: int
    """Never given out before."""


@dataclass(frozen=True, kw_only=True)
class AdoptVersion:
    """Rank 0 -> every buffer but the first, which gave the version out, before it is pushed. Answered `Ok`. Idempotent."""

    version: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Rank -> buffer: the group recorded at this place. Answered `Group` when there is one (long poll).

    The same place always gets the same group. The asker gives up by its own timeout and may ask again.
    """

    step: int
    position: int
    """0 <= position < groups_per_step, of those that this buffer fills."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Buffer -> rank: one recorded group."""

    step: int
    position: int
    ticket_id: int
    prompt_index: int
    records: list[Record]
    """In sample order, as the servers made them."""
    version_steps: list[int]
    """For each record, the optimizer step of its oldest masked-in token's weights: lag = step - this."""

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        """The records with their arrays."""
        return [record.trajectory() for record in self.records]


@dataclass(frozen=True, kw_only=True)
class CompleteStep:
    """Rank 0 -> buffer: the optimizer step is done (not yet durable). Answered `Ok`. Idempotent."""

    step: int


@dataclass(frozen=True, kw_only=True)
class SetMaxStaleness:
    """Rank 0 -> buffer, with `max_staleness: auto`: the bound on lag of tickets issued from now on. Answered `Ok`. Idempotent."""

    max_staleness: int
    """0 <= max_staleness <= max_staleness_cap."""


@dataclass(frozen=True, kw_only=True)
class CommitStep:
    """Rank 0 -> buffer: a checkpoint that contains steps <= step is durable. Answered `Ok`. Idempotent."""

    step: int
    oldest_kept_step: int = 0
    """Completed steps of the oldest checkpoint that is kept: nobody will go back further, so records of earlier steps may be released."""


@dataclass(frozen=True, kw_only=True)
class GetStreamState:
    """Rank 0 -> buffer: where the prompt stream stands, to be kept in a checkpoint made after `step`. Answered `StreamState`."""

    step: int


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Buffer -> rank 0: opaque to the trainer."""

    stream: dict[str, int | list[int]]


@dataclass(frozen=True, kw_only=True)
class RequestEval:
    """Rank 0 -> buffer: evaluate held-out prompts 0..num_prompts-1 greedily. Answered `EvalResult` when done (long poll).

    Asking again with the same eval_id waits for the same evaluation.
    """

    eval_id: int
    num_prompts: int
    min_version: int
    """Only servers at this version or a newer one take part."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Buffer -> rank 0."""

    eval_id: int
    num_evaluated: int
    num_failed: int
    mean_reward: float
    mean_tokens: float
    oldest_version: int
    newest_version: int


@dataclass(frozen=True, kw_only=True)
class ServerEntry:
    """One registered rollout server."""

    name: str
    incarnation: int
    weights_address: str
    device: str
    state: str
    weights_version: int


@dataclass(frozen=True, kw_only=True)
class Directory:
    """Buffer -> every rank, unasked (rid 0): after its hello, and when a server joins, leaves, or changes its state."""

    servers: list[ServerEntry]


@dataclass(frozen=True, kw_only=True)
class CloseAdmission:
    """Rank 0 -> buffer: no more leases of train tickets until a trainer starts. Eval goes on. Answered `Ok`.

    A durable ledger keeps everything that was recorded or is ready; one in memory drops as `cancelled` what no completed step holds.
    """

    reason: str


@dataclass(frozen=True, kw_only=True)
class GetRunCounters:
    """Rank 0 -> buffer: the account of the run. Answered `RunCounters`."""


@dataclass(frozen=True, kw_only=True)
class RunCounters:
    """Buffer -> rank 0: what `summary.json` says about the stream."""

    tickets: dict[str, int]
    """A count for each state: queued, leased, ready, batched, trained, evaluated, dropped, and issued."""
    drops: dict[str, int]
    """A count for each drop reason (zeros included)."""
    counters: dict[str, float]
    """tokens_generated, tokens_trained, max_trained_lag, mean_trained_lag, samples_*, refusals_*, generation_idle_s, ..."""


MESSAGES = (
    TrainerHeartbeat,
    StartTraining,
    AllocVersion,
    VersionGranted,
    AdoptVersion,
    Fetch,
    Group,
    CompleteStep,
    SetMaxStaleness,
    CommitStep,
    GetStreamState,
    StreamState,
    RequestEval,
    EvalResult,
    Directory,
    CloseAdmission,
    GetRunCounters,
    RunCounters,
)
