"""Environment variables that torch and NCCL read once, for ranks on GPUs. No import of torch here.

* The allocator grows its segments: with the sizes of packed micro-batches, fixed segments leave gaps that
  together can be gigabytes.
* The flight recorder writes the last collectives of a rank into the run's `traces/` when one times out. That
  file is torch's own, a pickle; `torchfrtrace` reads it.
* NCCL allocates as SGLang's does, for weights that travel to it: SGLang turns CUDA's virtual memory
  management and NVLink SHARP off in its processes, unless the variables are set. NCCL does not compare these
  settings, and ranks with different ones cannot map each other's memory.

A variable that the user has set, also under its older name, stays.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from areal_like.config import Config
from areal_like.paths import RunPaths

_ALIASES = {
    "PYTORCH_ALLOC_CONF": ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    "TORCH_FR_BUFFER_SIZE": ("TORCH_NCCL_TRACE_BUFFER_SIZE",),
    "TORCH_FR_DUMP_TEMP_FILE": ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE",),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": (),
}
"""Variable -> its older names, which torch 2.11 to 2.14 still read."""
_SGLANG_NCCL = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
"""Variables that SGLang 0.5.23 sets to 0 (`_set_envs_and_config`)."""


def set_torch_variables(config: Config, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what is not set; does nothing for ranks on a CPU. Call it before torch is imported."""
    if config.trainer.device == "cpu":
        return
    traces = RunPaths.of(config).traces
    traces.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(traces / "nccl_rank_"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    rollout = config.rollout
    if rollout.engine == "sglang" and rollout.engine_device != "cpu" and config.weights.backend != "gloo":
        wanted |= {name: str(rollout.sglang.env.get(name, "0")) for name in _SGLANG_NCCL}
    for name, value in wanted.items():
        if not any(alias in environment for alias in (name, *_ALIASES.get(name, ()))):
            environment[name] = value
