"""Trainer ranks <-> buffer: groups to the ranks; versions, steps and commits to the buffer.

Every request gets a reply with its `rid`, which may also be `Refused` (an older incarnation, an impossible
step) or `JobFailed`. `Fetch` is a long poll: the reply comes when the group is recorded. Ranks other than 0
send only `Fetch` and `TrainerHeartbeat`. With several buffer shards (shards.py), only the first one allocates
versions, runs evaluations and sends the directory of servers; a `Fetch` goes to the shard that owns the
position, and the other requests go to all shards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from areal_like.spans.recorder import unix_now
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.evaluation import EvalResult as EvalResult
from areal_like.wire.messages.evaluation import RequestEval as RequestEval
from areal_like.wire.records import Record
from areal_like.wire.routes import RoutesShape


@dataclass(frozen=True, kw_only=True)
class TrainerHeartbeat:
    """Rank -> buffer, every `daemon.heartbeat_s`. Replied to with `HeartbeatAck`."""

    state: str
    """`starting`, `loading`, `pushing`, `evaluating`, `training` or `draining`."""
    step: int
    stats: dict[str, float] = field(default_factory=dict)
    """`tokens_per_s`, `loss`, `reward`, ..."""
    waits: dict[str, float] = field(default_factory=dict)
    """The rank's waits and their seconds: at most `MAX_WAITS`, the longest ones."""
    sent_s: float = field(default_factory=unix_now)
    """Unix time of the rank."""


@dataclass(frozen=True, kw_only=True)
class StartTraining:
    """Rank 0 -> buffer, once per incarnation, before any other request: the trainer's position.

    Reply: `Welcome`, or `JobFinished` if the run is finished and `step` is its last.

    Older trainer incarnations are refused from now on. The buffer follows the trainer's checkpoint: recorded
    steps from `step` on are served again identically, and weights of later steps are abandoned. An empty
    ledger starts the stream at `step`.
    """

    max_header_bytes: ClassVar[int] = 4 << 20
    """A curriculum that remembers 100,000 prompts: 400,000 integers."""

    step: int
    """Completed optimizer steps (0 for a new run, K after resuming from checkpoint K)."""
    stream: dict[str, int | list[int]] = field(default_factory=dict)
    """The checkpoint's `StreamState.stream`; empty for a new run. Only an empty ledger uses it."""
    settings: dict[str, str] = field(default_factory=dict)
    """The trainer's values of the settings that may change during the run, as text by key. Those that
    differ from the previous trainer's values apply from `step` on, and replace an operator's."""
    routes_shape: list[int] = field(default_factory=list)
    """`RoutesShape` of the trainer's model, which the routes of samples must have; empty without router
    replay."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no routes can have."""
        if self.routes_shape:
            if len(self.routes_shape) != len(RoutesShape._fields):
                raise ValueError(f"routes_shape has {len(self.routes_shape)} numbers")
            RoutesShape(*self.routes_shape).check()


@dataclass(frozen=True, kw_only=True)
class GetStepSettings:
    """Rank 0 -> buffer, after `StartTraining` and `CompleteStep`: the settings of the step that begins.

    Reply: `StepSettings`. The request changes nothing: an operator's change applies from the step after the
    one in training.
    """

    step: int


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Buffer -> rank 0: settings that an operator may change. Those of one step are always the same."""

    step: int
    lr: float
    """`trainer.lr`, before warm-up and schedule."""
    eval_interval: int
    """`eval.interval`; 0: there are no evaluations."""
    max_staleness: int
    """The bound of tickets that begin in this step."""
    evaluate: bool
    """Evaluate before this step."""
    checkpoint: bool
    """Save a checkpoint before this step."""


@dataclass(frozen=True, kw_only=True)
class AllocVersion:
    """Rank 0 -> buffer, before each push: allocate a version. Reply: `VersionGranted`."""

    step: int
    """Optimizer step that starts from these weights: step k for the weights after step k-1."""


@dataclass(frozen=True, kw_only=True)
class VersionGranted:
    """Buffer -> rank 0: a new version."""

    version: int
    """Larger than every version allocated before."""


@dataclass(frozen=True, kw_only=True)
class AdoptVersion:
    """Rank 0 -> every shard except the first, before a push: the version that the first shard allocated.

    Reply: `Ok`. Idempotent.
    """

    version: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Rank -> buffer: fetch the group recorded at a position of a step.

    Reply: `Group`, when it is recorded (long poll).

    The same step and position always return the same group. The caller has its own timeout and may repeat the
    request.
    """

    step: int
    position: int
    """0 <= position < groups_per_step; the position must belong to this shard."""


@dataclass(frozen=True, kw_only=True)
class EarlyMember:
    """A sample that was complete when its group was closed, for the baselines of the group's samples."""

    sample_index: int
    reward: float
    num_sampled: int
    is_truncated: bool


@dataclass(frozen=True, kw_only=True)
class ClosedGroup:
    """A group that was closed; some of its samples are among the records of a `Group` message."""

    ticket_id: int
    prompt_index: int
    begin_step: int
    """Step of the weights at the group's begin. The baseline uses the running statistics of rewards as of
    this step, because whether a sample is early must not decide which statistics it is compared with."""
    early: list[EarlyMember]
    """By sample index."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Buffer -> rank: the samples recorded at one position: a whole group, or parts of closed groups."""

    max_header_bytes: ClassVar[int] = 1 << 20
    """16 bytes for each sample and version, and 30 for each early member of a closed group: 10,000 samples,
    or parts of 64 groups of 500."""

    step: int
    position: int
    ticket_id: int
    prompt_index: int
    records: list[Record]
    """Byte for byte as the servers sent them: a whole group's by sample index, parts in recorded order."""
    version_steps: list[int]
    """For each record, the optimizer step of the oldest weights that sampled one of its tokens."""
    max_staleness: int = -1
    """The bound of this position: in `step`, tokens of weights of steps before `step - max_staleness` are
    beyond it. -1: a group of an earlier release, whose samples are within the bound of the job as a whole."""
    versions: list[int] = field(default_factory=list)
    """All weight versions that sampled a token of the records, ascending."""
    steps: list[int] = field(default_factory=list)
    """For each of `versions`, the optimizer step that starts from its weights."""
    begin_step: int = -1
    """With `buffer.overdue=close`, for a whole group: step of the weights at its begin; else -1."""
    closed: list[ClosedGroup] = field(default_factory=list)
    """The closed groups that the records come from (`Record.ticket_id`), by ticket id; empty for a whole
    group. If not empty, `prompt_index` is -1, and `ticket_id` is that of the position itself."""

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        """The records, decoded."""
        return [record.trajectory() for record in self.records]


@dataclass(frozen=True, kw_only=True)
class CompleteStep:
    """Rank 0 -> buffer: the optimizer step is done, but not in a checkpoint yet. Reply: `Ok`. Idempotent."""

    step: int


@dataclass(frozen=True, kw_only=True)
class SetMaxStaleness:
    """Rank 0 -> buffer, with `max_staleness: auto`: the new staleness bound.

    It applies to tickets issued from now on, and to those that no server has started. Reply: `Ok`.
    Idempotent.
    """

    max_staleness: int
    """0 <= max_staleness <= max_staleness_cap."""


@dataclass(frozen=True, kw_only=True)
class CommitStep:
    """Rank 0 -> buffer: a checkpoint that contains steps <= `step` is durable. Reply: `Ok`. Idempotent."""

    step: int
    oldest_kept_step: int = 0
    """Completed steps of the oldest checkpoint on disk. No trainer resumes at an earlier step, so records of
    earlier steps may be released."""


@dataclass(frozen=True, kw_only=True)
class GetStreamState:
    """Rank 0 -> buffer: the prompt stream's state, for the checkpoint after `step`. Reply: `StreamState`."""

    step: int


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Buffer -> rank 0: state of the prompt stream. The trainer stores it without interpreting it."""

    max_header_bytes: ClassVar[int] = 4 << 20
    """It holds what `StartTraining` sends back."""

    stream: dict[str, int | list[int]]


@dataclass(frozen=True, kw_only=True)
class ServerEntry:
    """One registered rollout server."""

    name: str
    incarnation: int
    weights_address: str
    device: str
    state: str
    weights_version: int
    public_key: str = ""
    """The CURVE key with which the server has authenticated itself to the buffer, and which its weight socket
    must have; empty without keys."""


@dataclass(frozen=True, kw_only=True)
class Directory:
    """Buffer -> every rank, unsolicited: the registered servers.

    Sent after the rank's hello, and when a server joins, leaves or changes its state.
    """

    max_header_bytes: ClassVar[int] = 4 << 20
    """Up to 700 bytes for each of `MAX_PEERS` servers."""

    servers: list[ServerEntry]


@dataclass(frozen=True, kw_only=True)
class CloseAdmission:
    """Rank 0 -> buffer: lease no train tickets until a trainer starts; evaluations continue. Reply: `Ok`.

    A durable ledger keeps all recorded and ready tickets; a ledger in memory drops the tickets outside
    completed steps with reason `cancelled`.
    """

    reason: str


@dataclass(frozen=True, kw_only=True)
class FinishRun:
    """Rank 0 -> buffer, its last request: the last step, evaluation and checkpoint are done. Reply: `Ok`.

    The buffer sends `JobFinished` to every peer and ends when they have left. Idempotent.
    """


@dataclass(frozen=True, kw_only=True)
class GetRunCounters:
    """Rank 0 -> buffer: request the run's counters. Reply: `RunCounters`."""


@dataclass(frozen=True, kw_only=True)
class RunCounters:
    """Buffer -> rank 0: the stream's counters, for `summary.json`."""

    tickets: dict[str, int]
    """Number of tickets in each state (queued, leased, ready, batched, trained, evaluated, dropped), and
    `issued`, their sum."""
    drops: dict[str, int]
    """Number of dropped tickets by reason, zeros included."""
    counters: dict[str, float]
    """tokens_generated, tokens_trained, max_trained_lag, mean_trained_lag, samples_*, refusals_*,
    generation_idle_s, ..."""


TO_BUFFER = (
    TrainerHeartbeat,
    StartTraining,
    GetStepSettings,
    AllocVersion,
    AdoptVersion,
    Fetch,
    CompleteStep,
    SetMaxStaleness,
    CommitStep,
    GetStreamState,
    RequestEval,
    CloseAdmission,
    FinishRun,
    GetRunCounters,
)
"""The messages that ranks send."""
TO_TRAINER = (StepSettings, VersionGranted, Group, StreamState, EvalResult, Directory, RunCounters)
"""The messages that a buffer sends to ranks."""
MESSAGES = (*TO_BUFFER, *TO_TRAINER)
