"""Environment variables that torch reads when it is imported, for ranks on GPUs. No import of torch here.

* The allocator uses expandable segments: with the varying sizes of packed micro-batches, fixed segments leave
  gaps of gigabytes in total.
* The flight recorder writes the last collectives of a rank into the run's `traces/` when one times out. That
  file is torch's own, a pickle; `torchfrtrace` reads it.
* NCCL gets the transports of SGLang, which turns two of them off unless its environment or its options say
  otherwise (0.5.23, `_set_envs_and_config`). Both processes are ranks of the group of a push, and each rank's
  own variable decides how two ranks share memory.

A variable that the user has set, even under its older name, stays.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from areal_like.config import Config
from areal_like.config.sglang_args import words_of
from areal_like.paths import RunPaths

_ALIASES = {
    "PYTORCH_ALLOC_CONF": ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    "TORCH_FR_BUFFER_SIZE": ("TORCH_NCCL_TRACE_BUFFER_SIZE",),
    "TORCH_FR_DUMP_TEMP_FILE": ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE",),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": (),
    "NCCL_CUMEM_ENABLE": (),
    "NCCL_NVLS_ENABLE": (),
}
"""Variable -> its older names, which torch 2.11 to 2.14 still read."""


def set_torch_variables(config: Config, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that are not set; does nothing for ranks on a CPU. Call it before torch is
    imported."""
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
    if config.rollout.engine == "sglang" and config.weights.backend != "gloo":
        wanted |= _nccl_of_sglang(config)
    for name, value in wanted.items():
        if not any(alias in environment for alias in (name, *_ALIASES[name])):
            environment[name] = value


def _nccl_of_sglang(config: Config) -> dict[str, str]:
    words, own = words_of(config.rollout.sglang.args), config.rollout.sglang.env
    symmetric = "--enable-symm-mem" in words
    defaults = {
        "NCCL_CUMEM_ENABLE": int(symmetric),
        "NCCL_NVLS_ENABLE": int(symmetric or "--enable-nccl-nvls" in words),
    }
    return {name: str(own.get(name, value)) for name, value in defaults.items()}
