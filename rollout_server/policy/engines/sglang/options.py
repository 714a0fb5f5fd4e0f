"""Builds the command line of an SGLang engine from the job's settings, and checks an engine's capabilities.

If a weight push cannot reach some of an engine's ranks, this would show only at the first push; if an engine
cannot hold a whole sequence, it would end completions too early. So both are checked before the engine gets
any work.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from areal_like.automatic_settings import compute_dtype
from areal_like.config import Config
from areal_like.config.gpus import engine_gpus
from areal_like.config.sglang_args import CONTEXT_LENGTH, UNREACHABLE, number, words_of
from areal_like.config.weights import MAX_TIMEOUT_S
from areal_like.errors import ConfigError
from areal_like.hosts import LOOPBACK
from rollout_server.policy.sglang_client import STREAM_INTERVAL

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


def launch_options(
    config: Config, *, model: str, port: int, version: int, index: int, context_length: int
) -> list[str]:
    """Returns the arguments of `python -m sglang.launch_server`, without the API key."""
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
    if config.model.fp32_head:
        flags.append("enable-fp32-lm-head")
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    words += [f"--{flag}" for flag in flags]
    return words + shlex.split(rollout.sglang.args.replace("{index}", str(index)))


def check_context_option(args: str, *, context_tokens: int) -> None:
    """Raises ConfigError if `rollout.sglang.args` makes the context too short for the job's sequences."""
    given = number(words_of(args), CONTEXT_LENGTH)
    if given is not None and given < context_tokens:
        raise ConfigError(
            f"rollout.sglang.args: {CONTEXT_LENGTH[0]} {given} is shorter than the job's sequences of up to "
            f"{context_tokens} tokens (task.max_prompt_tokens, sampling.max_new_tokens, "
            "rollout.max_context): leave the option out, the rollout server sets it"
        )


def check_server_info(info: Mapping[str, Any], *, name: str, context_tokens: int) -> None:
    """Raises ConfigError if pushes cannot reach all ranks of the engine, or if a sequence does not fit into
    it.

    `info`: the response of `/server_info`; fields that it does not contain are not checked.
    """
    for key in ("dp_size", "pp_size"):
        if int(info.get(key) or 1) > 1:
            raise ConfigError(f"{name} runs with {key}={info[key]}: {UNREACHABLE}")
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
