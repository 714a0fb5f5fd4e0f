"""The split of a job's GPUs into engines and trainer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from areal_like.config import Config
from areal_like.config.gpus import engine_gpus, trainer_gpus
from areal_like.errors import ConfigError
from areal_like.gpus import GPUS, GpuKind

GIB = float(1 << 30)
GPUS_PER_HOST = 8
DEFAULT_KIND = "h100"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The GPUs of a job."""

    gpu: GpuKind
    engine_gpus: int
    """GPUs of all engines together."""
    trainer_gpus: int
    """One for each rank."""
    is_shared: bool
    """True if the engines use the trainer's GPUs."""
    given_host_bytes: float | None = None
    """Memory of a host, if it is known."""

    @property
    def host_bytes(self) -> float:
        """Memory of a host: as given, or assumed for its kind of GPU."""
        return self.given_host_bytes or self.gpu.host_memory_bytes

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole job."""
        used = (self.engine_gpus, self.trainer_gpus)
        return max(used) if self.is_shared else sum(used)

    @property
    def is_one_host(self) -> bool:
        """True if engines and trainer fit on one host of eight GPUs."""
        return self.num_gpus <= GPUS_PER_HOST

    @property
    def text(self) -> str:
        """The GPUs in the form of `--gpus`."""
        if self.is_shared:
            return f"{self.num_gpus}x{self.gpu.name}"
        return f"{self.engine_gpus}+{self.trainer_gpus}x{self.gpu.name}"


def parse_gpus(text: str) -> Placement:
    """`4+4xH100`: 4 GPUs of engines and 4 trainer ranks. `1xH100`: both on the same GPU.

    Raises ConfigError.
    """
    match = re.fullmatch(r"(\d{1,5})(?:\+(\d{1,5}))?x(\w+)", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ConfigError(
            f"--gpus {text}: give the engines' and the trainer's GPUs and their kind, such as 4+4xH100, "
            "or 1xH100 for one GPU that both share"
        )
    first, second, kind = match.groups()
    gpu = GPUS.get(kind.lower())
    if gpu is None:
        known = ", ".join(known.name for known in GPUS.values())
        raise ConfigError(f"--gpus {text}: {kind} is not in the table of GPUs ({known})")
    engines, trainer = int(first), int(second or first)
    if not engines or not trainer:
        raise ConfigError(f"--gpus {text}: engines and trainer need at least one GPU each")
    return Placement(gpu=gpu, engine_gpus=engines, trainer_gpus=trainer, is_shared=second is None)


def placement_of(config: Config) -> Placement:
    """The GPUs that the configuration uses, of the kind DEFAULT_KIND. An engine that is given by its URL has
    its own GPU.

    Engines and trainer share GPUs where a local job would place both on the same ones.
    """
    rollout = config.rollout
    engines = [gpu for index in range(rollout.num_servers) for gpu in engine_gpus(rollout, index=index)]
    return Placement(
        gpu=GPUS[DEFAULT_KIND],
        engine_gpus=rollout.num_servers * rollout.gpus_per_engine,
        trainer_gpus=config.trainer.world_size,
        is_shared=config.trainer.num_hosts == 1 and bool(set(engines) & set(trainer_gpus(config))),
    )


def on_gpus(config: Config, placement: Placement) -> Config:
    """The configuration with as many servers and ranks as `placement` has room for, all on GPUs.

    Raises ConfigError if an engine's GPUs do not divide those of all engines.
    """
    gpus_per_engine = config.rollout.gpus_per_engine
    if placement.engine_gpus % gpus_per_engine:
        raise ConfigError(
            f"--gpus {placement.text}: an engine has rollout.gpus_per_engine={gpus_per_engine} GPUs, which "
            f"does not divide {placement.engine_gpus}"
        )
    rollout, trainer = config.rollout, config.trainer
    return replace(
        config,
        rollout=replace(
            rollout,
            num_servers=placement.engine_gpus // gpus_per_engine,
            engine_device=_on_gpu(rollout.engine_device),
        ),
        trainer=replace(trainer, world_size=placement.trainer_gpus, device=_on_gpu(trainer.device)),
    )


def _on_gpu(device: str) -> str:
    return "cuda" if device == "cpu" else device
