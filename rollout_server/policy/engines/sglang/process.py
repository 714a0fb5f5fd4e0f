"""SGLang as this server's engine: started in a separate Python environment, or already running at a URL.

The environment is separate because SGLang pins versions of torch and transformers. A process that this server
started is ended with SIGKILL: it holds no state that is needed later, and it may take five seconds to react
to a request to drain. An engine at a URL is reset at every start, because an earlier client may have left it
paused, in an update session or with other weights. It is considered lost when it stops responding;
"restarting" it means resetting it again.

If a weight push cannot reach some of an engine's ranks, this would show only at the first push; if an engine
cannot hold a whole sequence, it would end completions too early. So both are checked before the engine gets
any work.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from areal_like.automatic_settings import compute_dtype, model_facts, start_limit_s, uses_fp32_head
from areal_like.config import Config
from areal_like.config.gpus import engine_gpus
from areal_like.config.sglang_args import CONTEXT_LENGTH, UNREACHABLE, number, words_of
from areal_like.config.weights import MAX_TIMEOUT_S
from areal_like.errors import ConfigError, EngineError
from areal_like.hosts import LOOPBACK, is_loopback
from areal_like.runtime.tied_exec import foreign_environment
from areal_like.weights.adapters import linear_layers
from areal_like.weights.foreign_torch import torch_versions
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.process import EngineProcess, check_routes_fit
from rollout_server.policy.engines.sglang import launch_with_key
from rollout_server.policy.http import key_in, tls_of
from rollout_server.policy.routes import RoutesReader
from rollout_server.policy.sglang_client import STREAM_INTERVAL, SglangClient
from rollout_server.weights.checkpoint_shapes import CheckpointShapes

BUILT_PYTHON = Path("areal_like/sglang/bin/python")
"""Path, relative to the cache directory, of the interpreter that `make sglang` builds."""
UNUSABLE_TOKENS = 8
"""SGLang 0.5.23 uses N - 2 of N tokens (`--context-length`, or the KV cache if that is smaller) for prompt
and completion, and accepts prompts of fewer than N - 6."""
_BEYOND_PROMPT = 6
"""The difference between the N tokens and SGLang's `max_req_input_len`."""
_MAX_CPU_KV_TOKENS = 1 << 16
"""KV cache size on a CPU. By default SGLang would take most of the machine's memory."""
_WATCHDOG_S = 2 * MAX_TIMEOUT_S
"""SGLang ends itself if a batch takes longer, and counts a batch as running while it is paused with `keep`:
its default of 300 s is shorter than the push of a large model may take. The supervisor detects an engine that
hangs."""
_POLL_S = 0.5
_PROBE_S = 2.0
_LOST_AFTER_S = 15.0
"""An engine at a URL that has not responded for this long is considered lost."""
_CHECK_TIMEOUT_S = 60.0
_PORTS = {"http": 80, "https": 443}
_MODULE_CHECK = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"


def find_python(configured: str) -> str:
    """Returns the interpreter to start SGLang with. Raises ConfigError if none has SGLang."""
    if configured:
        candidates = [str(Path(configured).expanduser())]
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        candidates = [sys.executable, str(cache / BUILT_PYTHON)]
    for candidate in candidates:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            environment = foreign_environment(os.environ)
            command = [candidate, "-c", _MODULE_CHECK]
            check = subprocess.run(
                command, env=environment, stderr=subprocess.DEVNULL, check=False, timeout=_CHECK_TIMEOUT_S
            )
            if check.returncode == 0:
                return candidate
    raise ConfigError(
        f"rollout.engine=sglang: no SGLang in {' or '.join(candidates)}: set rollout.sglang.python to the "
        "interpreter of an environment that has it, or build one for this CPU with `make sglang`"
    )


def server_index(name: str) -> int:
    """Returns the number at the end of a server's name: 2 for `rollout-2`; 0 if there is none."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


class SglangProcess(EngineProcess):
    """A `sglang.launch_server` started by this process."""

    def __init__(
        self,
        config: Config,
        *,
        name: str,
        model: str,
        context_tokens: int,
        max_positions: int,
        vocab_size: int,
    ) -> None:
        """`max_positions`: longest sequence of the model, in tokens.

        Raises ConfigError if no interpreter with SGLang is found, or if `--context-length` in
        `rollout.sglang.args` is too short for the job.
        """
        super().__init__(config, name=name, model=model, context_tokens=context_tokens)
        check_context_option(config.rollout.sglang.args, context_tokens=context_tokens)
        self._context_length = min(context_tokens + UNUSABLE_TOKENS, max_positions)
        self._python = find_python(config.rollout.sglang.python)
        self._nccl_version = ""
        if config.rollout.engine_device.startswith("cuda") and (versions := torch_versions(self._python)):
            self._nccl_version = versions.nccl
        self._index = server_index(name)
        self._vocab_size = vocab_size
        self._targets = adapter_targets(config, model=model)
        self._routes = routes_reader(config)
        self._chosen_port = 0

    def kill(self) -> None:
        """Kills the engine and its scheduler processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _command(self, *, version: int, secret_file: str) -> list[str]:
        # SGLang cannot pick a free port and report it. If another process takes this port meanwhile, SGLang
        # ends and is started again.
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            self._chosen_port = probe.getsockname()[1]
        options = launch_options(
            self._config, model=self._model, port=self._chosen_port, version=version, index=self._index,
            context_length=self._context_length, targets=self._targets,
        )  # fmt: skip
        tied = [sys.executable, "-m", "areal_like.runtime.tied_exec", self._python]
        return [*tied, launch_with_key.__file__, secret_file, *options]

    def _environment(self) -> dict[str, str]:
        rollout = self._config.rollout
        environment = super()._environment()
        if rollout.engine_device == "cpu":
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
        return environment | {key: str(value) for key, value in rollout.sglang.env.items()}

    async def _port(self) -> int:
        return self._chosen_port

    async def _connect(self, port: int) -> EngineClient:
        client = await super()._connect(port)
        try:
            check_server_info(
                await client.server_info(),
                name="the engine",
                context_tokens=self._context_tokens,
                fp32_head=head_precision(self._config),
                needs_routes=self._routes is not None,
            )
        except BaseException:
            await client.close()
            raise
        return client

    def _client(self, url: str) -> EngineClient:
        return SglangClient(
            url,
            vocab_size=self._vocab_size,
            nccl_version=self._nccl_version,
            routes=self._routes,
            api_key=self.api_key,
        )


class SglangAtUrl:
    """An SGLang engine that this server neither starts nor stops."""

    pid = 0
    """Always 0: this server started no process."""

    def __init__(
        self, config: Config, *, name: str, model: str, context_tokens: int, vocab_size: int
    ) -> None:
        """Raises ConfigError if the file with the API key or with certificates cannot be used."""
        self._config = config
        self._context_tokens = context_tokens
        self._model = model
        sglang = config.rollout.sglang
        self._url = sglang.url.replace("{index}", str(server_index(name)))
        self._access: dict[str, Any] = {
            "api_key": key_in(sglang.api_key_file, setting="rollout.sglang.api_key_file"),
            "tls": tls_of(sglang.ca_file, setting="rollout.sglang.ca_file"),
        }
        self._routes = routes_reader(config)
        check_routes_fit(config, self._routes, context_tokens=context_tokens)
        self._vocab_size = vocab_size
        self._abandoned = asyncio.Event()
        self.num_starts = 0

    async def start(self, *, version: int) -> EngineClient:
        """Resets the engine and loads the weights at `model.path` as `version`.

        Raises EngineError if the engine refuses or is not ready within `start_limit_s`, and ConfigError if
        its options contradict the configuration.
        """
        self._abandoned.clear()
        self.num_starts += 1
        timeout_s = start_limit_s(self._config)
        client = SglangClient(self._url, vocab_size=self._vocab_size, routes=self._routes, **self._access)
        try:
            async with asyncio.timeout(timeout_s):
                while not await client.health():
                    with contextlib.suppress(EngineError):  # a paused engine is not ready either
                        await client.resume()
                    await asyncio.sleep(_POLL_S)
                await self._reset(client, version=version)
        except TimeoutError:
            await client.close()
            raise EngineError(
                f"no engine was ready at rollout.sglang.url={self._url} "
                f"within {timeout_s:.0f} s (rollout.start_timeout_s)"
            ) from None
        except BaseException:  # a cancelled start, too, must not leak the client's connections
            await client.close()
            raise
        return client

    async def died(self) -> str:
        """Waits until the engine has not responded for too long, stops listening, or `kill` is called.

        Returns the reason.
        """
        loop = asyncio.get_running_loop()
        async with EngineClient(self._url, **self._access) as probe:
            responded_s, num_refused = loop.time(), 0
            while loop.time() - responded_s < _LOST_AFTER_S:
                try:
                    await probe.model_info()
                    responded_s, num_refused = loop.time(), 0
                except EngineError:
                    # Check for a closed port, to return early: each lease taken in the meantime would fail at
                    # once and consume one of its ticket's retries.
                    num_refused = num_refused + 1 if await _refuses(self._url) else 0
                    if num_refused == 2:
                        return f"no server listens at {self._url} any more"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S if num_refused else _PROBE_S):
                        await self._abandoned.wait()
                        return f"the engine at {self._url} was abandoned"
        return f"the engine at {self._url} has not responded for {_LOST_AFTER_S:g} s"

    async def stop(self) -> None:
        """Leaves the engine running; closing the connections aborted this server's requests."""

    def kill(self) -> None:
        """Abandons the engine: `died` returns, so that `start` can reset it."""
        self._abandoned.set()

    async def _reset(self, client: SglangClient, *, version: int) -> None:
        check_server_info(
            await client.server_info(),
            name=f"the engine at rollout.sglang.url={self._url}",
            context_tokens=self._context_tokens,
            fp32_head=head_precision(self._config),
            needs_routes=self._routes is not None,
            weights_host=self._config.weights.host,
        )
        await client.fetch_info()
        await client.abort()
        with contextlib.suppress(EngineError):  # SGLang responds with 400 if no session is open
            await client.end_weight_update(timeout_s=_PROBE_S)
        await client.update_weights_from_disk(
            self._model, weight_version=version, timeout_s=start_limit_s(self._config)
        )


async def _refuses(url: str) -> bool:
    """True if the host refuses connections at every address; False if it does not respond at all."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    num_refused = 0
    try:
        async with asyncio.timeout(_PROBE_S):
            for family, kind, protocol, _, address in await loop.getaddrinfo(
                parts.hostname, parts.port or _PORTS[parts.scheme], type=socket.SOCK_STREAM
            ):
                with socket.socket(family, kind, protocol) as probe:
                    probe.setblocking(False)
                    try:
                        await loop.sock_connect(probe, address)
                        return False
                    except ConnectionRefusedError:
                        num_refused += 1
    except (OSError, TimeoutError):
        return False
    return num_refused > 0


def launch_options(
    config: Config,
    *,
    model: str,
    port: int,
    version: int,
    index: int,
    context_length: int,
    targets: Sequence[str] = (),
) -> list[str]:
    """Returns the arguments of `python -m sglang.launch_server`, without the API key.

    `targets`: layers that pushed adapters change, by the last parts of their names; empty: no adapters.
    """
    rollout = config.rollout
    device = rollout.engine_device.partition(":")[0]
    options = {
        "model-path": model, "host": LOOPBACK, "port": port, "device": device,
        "dtype": compute_dtype(config), "max-running-requests": rollout.max_running,
        "weight-version": version, "random-seed": config.seed + index, "stream-interval": STREAM_INTERVAL,
        "sampling-defaults": "openai", "context-length": context_length, "schedule-policy": "lpm",
        "tp-size": rollout.gpus_per_engine, "watchdog-timeout": _WATCHDOG_S,
    }  # fmt: skip
    flags = ["skip-tokenizer-init", "enable-metrics"]
    if gpus := engine_gpus(rollout, index=index):
        options["base-gpu-id"] = gpus.start
    if device == "cpu":
        options |= {"attention-backend": "torch_native", "max-total-tokens": _MAX_CPU_KV_TOKENS}
        # Without sleep-on-idle, SGLang's idle loop uses a whole core.
        flags += ["disable-cuda-graph", "disable-overlap-schedule", "sleep-on-idle"]
    if uses_fp32_head(config):
        flags.append("enable-fp32-lm-head")
    if config.model.router_replay:
        flags.append("enable-return-routed-experts")
    if targets:
        flags.append("enable-lora")
        # SGLang counts requests without an adapter as one more, and wants room for it in both limits.
        num_loras = config.num_adapters + 1
        options |= {
            "max-lora-rank": config.model.lora.rank, "max-loras-per-batch": num_loras,
            "max-loaded-loras": num_loras,
        }  # fmt: skip
        if device == "cpu":
            options["lora-backend"] = "torch_native"
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if targets:
        words += ["--lora-target-modules", *targets]
    words += [f"--{flag}" for flag in flags]
    return words + shlex.split(rollout.sglang.args.replace("{index}", str(index)))


def adapter_targets(config: Config, *, model: str) -> list[str]:
    """The layers that pushed adapters change, by the last parts of their names; empty if none are pushed.

    SGLang allocates its adapters at its start, before it has seen one. Raises ConfigError without readable
    safetensors.
    """
    if not config.num_adapters:
        return []
    targets = config.model.lora.targets
    names = linear_layers(CheckpointShapes.of(model).shapes) if isinstance(targets, str) else targets
    return sorted({name.rpartition(".")[2] for name in names})


def routes_reader(config: Config) -> RoutesReader | None:
    """Reads SGLang's routes; None if the job needs none. Raises ConfigError for a model without experts."""
    if not config.model.router_replay:
        return None
    return RoutesReader.of_model(model_facts(config, needed_for="model.router_replay"))


def check_context_option(args: str, *, context_tokens: int) -> None:
    """Raises ConfigError if `rollout.sglang.args` makes the context too short for the job's sequences."""
    given = number(words_of(args), CONTEXT_LENGTH)
    if given is not None and given < context_tokens:
        raise ConfigError(
            f"rollout.sglang.args: {CONTEXT_LENGTH[0]} {given} is shorter than the job's sequences of up to "
            f"{context_tokens} tokens (task.max_prompt_tokens, sampling.max_new_tokens, "
            "rollout.max_context): leave the option out, the rollout server sets it"
        )


def head_precision(config: Config) -> bool | None:
    """Whether the engine has to compute the logits in float32; None in float32, where it makes no difference.

    Raises ConfigError as `compute_dtype` does.
    """
    return uses_fp32_head(config) if compute_dtype(config) == "bfloat16" else None


def check_server_info(
    info: Mapping[str, Any],
    *,
    name: str,
    context_tokens: int,
    fp32_head: bool | None = None,
    needs_routes: bool = False,
    weights_host: str = "",
) -> None:
    """Raises ConfigError if pushes cannot reach all ranks of the engine, if its output head has another
    precision than the trainer's, if a sequence does not fit into it, or if it does not return routes although
    the job needs them.

    `info`: the response of `/server_info`; fields that it does not contain are not checked. `fp32_head`: of
    `head_precision`. `weights_host`: `weights.host`.
    """
    replicas = () if info.get("enable_dp_attention") else ("dp_size",)
    for key in (*replicas, "pp_size"):
        if int(info.get(key) or 1) > 1:
            raise ConfigError(f"{name} runs with {key}={info[key]}: {UNREACHABLE}")
    num_hosts = int(info.get("nnodes") or 1)
    if num_hosts > 1 and is_loopback(weights_host):
        raise ConfigError(
            f"{name} runs on {num_hosts} hosts, and weights.host={weights_host} is reached from one of them "
            "only: set weights.host to an address of the trainer's machine that all of them can reach"
        )
    has_fp32_head = info.get("enable_fp32_lm_head")
    if fp32_head is not None and has_fp32_head is not None and bool(has_fp32_head) != fp32_head:
        raise ConfigError(
            f"{name} runs {'with' if has_fp32_head else 'without'} --enable-fp32-lm-head, and "
            f"model.fp32_head is {str(fp32_head).lower()} in this job, so log-probs would differ from the "
            f"trainer's: start it {'with' if fp32_head else 'without'} the option, or set "
            f"model.fp32_head={str(not fp32_head).lower()}"
        )
    if needs_routes and info.get("enable_return_routed_experts") is False:
        raise ConfigError(
            f"{name} returns no routes, which model.router_replay needs: start it with "
            "--enable-return-routed-experts"
        )
    longest_prompt = info.get("max_req_input_len")
    if longest_prompt is None:
        return
    num_tokens = int(longest_prompt) + _BEYOND_PROMPT
    if num_tokens < context_tokens:
        raise ConfigError(
            f"{name} holds sequences of {num_tokens} tokens, and those of this job have up to "
            f"{context_tokens} (task.max_prompt_tokens, sampling.max_new_tokens, rollout.max_context): "
            "give it more memory for KV (--mem-fraction-static, --max-total-tokens), a longer "
            "--context-length, or the job shorter sequences"
        )
