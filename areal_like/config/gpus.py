"""The GPUs of its machine that a local job uses for the engines and for the trainer's ranks.

SGLang takes most of a GPU's memory at its start, and NCCL refuses two processes on one GPU. So a job in which
two of them would share a GPU by accident is refused before anything starts. To share a GPU on purpose (a
small model on a machine with one GPU), state how much memory SGLang may take:
`rollout.sglang.args=--mem-fraction-static 0.3`. Left out: the number of GPUs of the machine, which only torch
knows; the daemons report a missing GPU.
"""

from __future__ import annotations

from areal_like.config.common import require
from areal_like.config.job import Config
from areal_like.config.rollout import RolloutConfig
from areal_like.config.sglang_args import FIRST_GPU, STATIC_MEMORY, number, option, words_of
from areal_like.errors import ConfigError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SHARING_FRACTION = 0.75
"""From this `--mem-fraction-static` on, an engine is expected to have its GPUs to itself."""


def trainer_gpus(config: Config) -> range:
    """GPUs of the trainer's ranks; empty if it is not on GPUs."""
    first = _ordinal(config.trainer.device)
    return range(0) if first is None else range(first, first + config.trainer.world_size)


def engine_gpus(rollout: RolloutConfig, *, index: int) -> range:
    """GPUs of the engine of server `index`; empty if it is not on GPUs or runs at a URL.

    `--base-gpu-id` in `rollout.sglang.args` overrides the first of them. Raises ConfigError if it is not a
    number.
    """
    first = _ordinal(rollout.engine_device)
    if first is None or rollout.sglang.url:
        return range(0)
    if rollout.engine == "embedded":
        return range(first, first + 1)
    words = words_of(rollout.sglang.args.replace("{index}", str(index)))
    given = number(words, FIRST_GPU)
    start = first + index * rollout.gpus_per_engine if given is None else given
    return range(start, start + rollout.gpus_per_engine)


def check_gpus_are_separate(config: Config) -> None:
    """Raises ConfigError if an SGLang engine of a local job would share a GPU and may take all of it."""
    rollout = config.rollout
    if rollout.engine != "sglang" or _VISIBLE in rollout.sglang.env:  # its GPUs have other numbers then
        return
    if config.trainer.num_hosts > 1 or _static_fraction(rollout.sglang.args) < _SHARING_FRACTION:
        return
    share = "to share a GPU, bound the engine's memory: rollout.sglang.args='--mem-fraction-static 0.3'"
    owners: dict[int, int] = {}
    for server in range(rollout.num_servers):
        for gpu in engine_gpus(rollout, index=server):
            require(
                gpu not in owners,
                f"the engines of rollout-{owners.get(gpu)} and rollout-{server} would share GPU {gpu}: "
                f"remove --base-gpu-id from rollout.sglang.args, or change it; {share}",
            )
            owners[gpu] = server
    shared = [gpu for gpu in trainer_gpus(config) if gpu in owners]
    free = max(owners, default=0) + 1
    require(
        not shared,
        f"rollout.engine_device={rollout.engine_device} (rollout.num_servers={rollout.num_servers}, "
        f"rollout.gpus_per_engine={rollout.gpus_per_engine}) and trainer.device={config.trainer.device} "
        f"(trainer.world_size={config.trainer.world_size}) share the GPUs {_listed(shared)}: "
        f"set trainer.device=cuda:{free}; {share}",
    )


def _static_fraction(args: str) -> float:
    given = option(words_of(args), STATIC_MEMORY)
    try:
        return 1.0 if given is None else float(given)
    except ValueError:
        raise ConfigError(f"rollout.sglang.args: {STATIC_MEMORY[0]} {given}: give a number below 1") from None


def _ordinal(device: str) -> int | None:
    kind, _, ordinal = device.partition(":")
    return int(ordinal or 0) if kind == "cuda" else None


def _listed(gpus: list[int]) -> str:
    return ", ".join(map(str, gpus))
