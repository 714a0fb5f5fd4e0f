"""The command line of an SGLang engine, from the job's settings."""

from __future__ import annotations

import shlex

from areal_like.automatic_settings import compute_dtype
from areal_like.config import Config
from areal_like.config.gpus import engine_gpus
from areal_like.config.weights import MAX_TIMEOUT_S
from areal_like.hosts import LOOPBACK
from rollout_server.policy.sglang_client import STREAM_INTERVAL

_MAX_CPU_KV_TOKENS = 1 << 16
"""KV cache size on a CPU. By default SGLang would take most of the machine's memory."""
_WATCHDOG_S = 2 * MAX_TIMEOUT_S
"""SGLang ends itself if a batch takes longer, and counts a batch as running while it is paused with `keep`:
its default of 300 s is shorter than the push of a large model may take. The supervisor finds an engine that
hangs."""


def launch_options(
    config: Config, *, model: str, port: int, version: int, index: int, context_length: int
) -> list[str]:
    """Arguments of `python -m sglang.launch_server`, without the API key."""
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
