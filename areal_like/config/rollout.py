"""Settings of sampling, of the rollout servers, and of their engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from areal_like.config.common import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    check_device,
    require,
)
from areal_like.config.sglang_args import TENSOR_PARALLEL, check_args, number, words_of


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section, key="sampling"):
    """Sampling of completions for training.

    top_p, top_k, min_p and penalties are left out on purpose: with them the recorded log-prob would not be a
    probability under the policy, and importance ratios would be wrong.
    """

    group_size: Annotated[int, Bounds(1, 10_000)] = 8
    """Number of samples of one prompt (a group), which are one message."""
    max_new_tokens: PositiveInt = 10
    """Limit of sampled tokens in one turn."""
    greedy_baseline: bool = False
    """Sample one more completion of each prompt at temperature 0, as the baseline of `advantage=remax`; it is
    not trained on."""
    temperature: float = 1.0
    """Softmax temperature; engine and trainer both compute log-probs after applying it."""
    stop: tuple[str, ...] = ()
    """Texts that end a turn, in addition to the model's own end-of-turn tokens. The tokens of the text are
    kept."""

    def check(self) -> None:
        require(
            self.temperature > 0,
            "sampling.temperature must be above 0 for training (eval.sets have temperatures of their own)",
        )
        require(
            all(self.stop) and len(self.stop) <= 16,
            f"sampling.stop={list(self.stop)}: give at most 16 texts, none of them empty",
        )


@dataclass(frozen=True, kw_only=True)
class SglangConfig(Section, key="rollout.sglang"):
    """With `rollout.engine=sglang`: how to start SGLang, or the address of a running SGLang server.

    In `args` and `url`, `{index}` is replaced by the number at the end of the rollout server's name
    (rollout-2: 2; no number: 0), so that each server can have its own GPUs or host.
    """

    python: str = ""
    """Interpreter of the environment with SGLang; empty: the current interpreter if it has SGLang, else the
    one built by `make sglang`."""
    args: str = ""
    """More options of sglang.launch_server, as in a shell: `--mem-fraction-static 0.8`. They override the
    options that the rollout server sets."""
    env: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the engine, added to the environment of the rollout server."""
    url: str = ""
    """`https://host:port` of a running engine, or `http://` on this machine's loopback. It is used, updated
    and reset, but never started or stopped, and must be able to read `model.path`. Empty: the rollout server
    starts an engine."""
    api_key_file: str = ""
    """With `url`: file with the engine's API key, readable by its owner only."""
    ca_file: str = ""
    """With an https `url`: PEM file with the certificates that verify the engine's certificate; empty: those
    of the system."""

    def check(self) -> None:
        """Checks `args` (see sglang_args.py), and that `url` is not combined with settings that start an
        engine."""
        check_args(self.args)
        require(
            not self.url or self.url.startswith(("http://", "https://")),
            f"rollout.sglang.url={self.url}: give https://host:port, or http://127.0.0.1:port",
        )
        require(
            bool(self.url) or not (self.api_key_file or self.ca_file),
            "rollout.sglang.api_key_file and ca_file are for an engine at rollout.sglang.url: "
            "an engine that the rollout server starts gets a key of its own",
        )
        require(
            not (self.url and (self.args or self.env or self.python)),
            "rollout.sglang.url names an engine that is already running: "
            "python, args and env would change nothing, remove them",
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section, key="rollout"):
    """The rollout servers and their engines."""

    num_servers: PositiveInt = 1
    """Rollout servers that the local launcher starts."""
    engine: Literal["embedded", "sglang"] = "embedded"
    """Inference engine of each server, in a separate process; `embedded` is the one in this repository."""
    engine_device: str = "cpu"
    """Device of the engine: `cpu`, `cuda` or `cuda:N`; `cuda` means `cuda:0`. The embedded engine of every
    server uses GPU N. The SGLang engine of server I (the number at the end of its name) uses
    `gpus_per_engine` GPUs, starting with GPU N + I * `gpus_per_engine`."""
    gpus_per_engine: PositiveInt = 1
    """GPUs of one engine, which share each of its layers (SGLang's `--tp-size`). On a CPU, processes. The
    embedded engine has one."""
    max_running: PositiveInt = 128
    """Sequences that one engine decodes at the same time (KV slots)."""
    adaptive_concurrency: bool | Literal["auto"] = "auto"
    """Lower the number of samples at an engine below `max_running` while its KV cache is full, and raise it
    again while there is room. `auto`: with SGLang on GPUs."""
    max_context: NonNegativeInt = 0
    """Longest sequence (prompt and completion), in tokens; 0: derived from the task and `sampling`."""
    queue_samples: NonNegativeInt = 32
    """Samples leased in addition to max_running, so that a freed KV slot never waits for the network."""
    max_episodes: NonNegativeInt = 0
    """Samples that one server holds at the same time, including those that wait for a tool or a reward and
    are not at the engine; 0: twice `max_running` + `queue_samples`."""
    reward_workers: PositiveInt = 1
    """Processes that compute rewards. While rewards hang, there are up to twice as many."""
    reward_concurrency: PositiveInt = 1
    """Rewards that one of these processes computes at the same time, for a task with `async def reward`."""
    reward_timeout_s: PositiveFloat = 10.0
    """Time limit of one reward and of one task.example(), in seconds. After it the worker process is killed
    and the sample counts as failed (`buffer.on_failure`)."""
    generate_timeout_s: PositiveFloat = 120.0
    """Longest time, in seconds, in which an engine with requests may make no progress (no token, no context
    computed). After it the engine is replaced, and its samples are generated elsewhere. The time in which a
    push pauses the engine does not count. A request that makes progress has no limit."""
    sample_timeout_s: NonNegativeFloat = 0.0
    """Time limit of one episode from its first request to the engine on, in seconds: all turns, and the calls
    of its environment between them. After it the sample is truncated: the tokens sampled so far are kept.
    0: none."""
    start_timeout_s: PositiveFloat = 180.0
    """Longest time, in seconds, that a starting engine may go without a new line in its log or, at a url,
    without becoming ready. The time to read the model's weights at 100 MB/s is added."""
    host: str = "127.0.0.1"
    """Address that a server binds to receive weight pushes. Its engine listens on loopback only."""
    advertise_host: str = ""
    """Address at which the trainer reaches this server; empty: `host`."""
    num_threads: int | Literal["auto"] = "auto"
    """CPU threads of one engine. `auto`: one, and with a model of 20 million parameters or more on the
    embedded engine also one for each core of the machine that is idle, so that it has the trainer's cores
    while the trainer waits."""
    sglang: SglangConfig = field(default_factory=SglangConfig)

    def check(self) -> None:
        """Checks ranges, and that `sglang` settings are only given with that engine."""
        require(bool(self.host), "rollout.host is empty: give an address to bind, e.g. 127.0.0.1")
        require(
            self.most_episodes >= self.max_running,
            f"rollout.max_episodes={self.max_episodes} is below rollout.max_running={self.max_running}: the "
            "engine would never be full; set it to 0, or to a number above max_running",
        )
        require(
            self.num_threads == "auto" or self.num_threads >= 1,
            f"rollout.num_threads must be at least 1 or auto, not {self.num_threads}",
        )
        check_device(self.engine_device, key="rollout.engine_device")
        require(
            self.engine == "sglang" or self.sglang == SglangConfig(),
            "rollout.sglang is set, but rollout.engine=embedded would ignore it: set rollout.engine=sglang",
        )
        require(
            self.adaptive_concurrency is not True or self.engine == "sglang",
            "rollout.adaptive_concurrency=true needs rollout.engine=sglang: the embedded engine has KV "
            "memory for rollout.max_running sequences of any length and never retracts one",
        )
        self._check_gpus()
        require(
            self.num_servers == 1 or not self.sglang.url or "{index}" in self.sglang.url,
            f"rollout.sglang.url={self.sglang.url} is one engine for rollout.num_servers={self.num_servers}: "
            "put {index} into the url",
        )

    @property
    def least_threads(self) -> int:
        """CPU threads that an engine always has."""
        return 1 if self.num_threads == "auto" else self.num_threads

    @property
    def most_episodes(self) -> int:
        """The resolved `max_episodes`."""
        return self.max_episodes or 2 * (self.max_running + self.queue_samples)

    @property
    def adapts_concurrency(self) -> bool:
        """The resolved `adaptive_concurrency`."""
        if self.adaptive_concurrency == "auto":
            return self.engine == "sglang" and self.engine_device != "cpu"
        return self.adaptive_concurrency

    def _check_gpus(self) -> None:
        num_gpus = self.gpus_per_engine
        require(
            num_gpus == 1 or self.engine == "sglang",
            f"rollout.gpus_per_engine={num_gpus}: the embedded engine uses one device: "
            "set it to 1, or rollout.engine=sglang",
        )
        require(
            num_gpus == 1 or not self.sglang.url,
            f"rollout.gpus_per_engine={num_gpus} would change nothing for the engine that runs at "
            "rollout.sglang.url: start that engine with --tp-size, and remove the setting",
        )
        given = number(words_of(self.sglang.args), TENSOR_PARALLEL)
        require(
            given in (None, num_gpus),
            f"rollout.sglang.args: {TENSOR_PARALLEL[0]} {given} and rollout.gpus_per_engine={num_gpus} "
            f"contradict each other: set rollout.gpus_per_engine={given} and leave the option out",
        )
