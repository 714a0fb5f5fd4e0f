"""Options, settings and directory of a run whose roles a scheduler starts on nodes of its choice."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from areal_like.config import Config
from areal_like.config.job import tasks_with_job_scorers
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config, with_kept_choices
from areal_like.security.keys import KeyDirectory
from launch.local_job.specs import DRAINED
from launch.run_directory.kept_settings import check_resume, keep, stored
from launch.run_directory.open_run import is_begun, with_own_settings
from launch.run_directory.rundir import release_for_others

MOST_SERVERS = 1000


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The options of every scheduler. Raises ConfigError for a number that is out of range."""

    rollout_jobs: int | None = None
    """Rollout servers; by default `rollout.num_servers` of the settings."""
    trainer_nodes: int = 1
    """Nodes of the trainer."""
    interface: str = ""
    """Network interface whose address the daemons bind; by default the address that the scheduler knows."""
    max_failures: int = 5
    """Failures in a row after which a role is not started again."""

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise ConfigError(f"--max-failures {self.max_failures}: use at least 0")

    @classmethod
    def of(cls, args: argparse.Namespace, kept: Mapping[str, Any] = MappingProxyType({})) -> Self:
        """The options of a command line; an option that is not given (None) comes from `kept`, or is the
        default."""
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        return cls(**dict(kept) | {name: value for name, value in given.items() if value is not None})

    def num_servers(self, *, default: int) -> int:
        """Rollout servers: as chosen, or `default`. Raises ConfigError outside of 1 to MOST_SERVERS."""
        number = default if self.rollout_jobs is None else self.rollout_jobs
        if not 1 <= number <= MOST_SERVERS:
            raise ConfigError(f"--rollout-jobs {number}: use 1 to {MOST_SERVERS}")
        return number


def gpus_of(config: Config, role: str, *, trainer_nodes: int) -> int:
    """GPUs that one node of a role needs; 0: none."""
    rollout = config.rollout
    if role == "trainer" and config.trainer.device != "cpu":
        return config.trainer.world_size // trainer_nodes
    if role == "rollout" and rollout.engine_device != "cpu" and not rollout.sglang.url:
        return rollout.gpus_per_engine
    if role == "scorer" and config.scorer.device != "cpu":
        return 1
    return 0


def counts_of(config: Config, *, num_servers: int) -> dict[str, int]:
    """Role -> number of them that a scheduler places, in the order in which they are started.

    `num_servers`: rollout servers. The trainer counts once, on however many nodes it is.
    """
    num_scorers = config.scorer.num_servers if config.scorer.path else 0
    counts = {"buffer": 1, "trainer": 1, "scorer": num_scorers, "router": config.sessions.num_routers}
    return {role: number for role, number in counts.items() if number} | {"rollout": num_servers}


def settings_for_nodes(argv: Sequence[str], *, trainer_nodes: int) -> Config:
    """The configuration of a new or existing run, with the settings that its roles need under a scheduler.

    Raises ConfigError for settings with which the roles would not find or admit each other.
    """
    config = load_config(argv)
    paths = RunPaths.of(config)
    if is_begun(paths):
        if "--config" not in argv:
            config = with_own_settings(config, argv, own=paths.config)
        config = with_kept_choices(config, argv, own=paths.config)
        check_resume(stored(paths), config, paths)
    config = dataclasses.replace(
        config.with_resolved_objective(),
        runs_dir=str(paths.root.parent),
        resume="auto",
        buffer=dataclasses.replace(config.buffer, discovery="run_dir", ports=()),
        daemon=dataclasses.replace(config.daemon, exit_code_on_drain=DRAINED),
        security=dataclasses.replace(config.security, keys=_absolute(config.security.keys)),
    )
    _check(config, trainer_nodes)
    return config


def make_directory(config: Config, *, folders: Sequence[Path] = ()) -> None:
    """Writes the run's directory with its configuration, and removes endpoints of earlier processes.

    Raises ConfigError, also if a launcher runs it.
    """
    paths = RunPaths.of(config)
    release_for_others(paths)
    for stale in paths.endpoints.glob("*.json"):
        stale.unlink(missing_ok=True)
    try:
        for folder in (paths.root, paths.logs, paths.endpoints, *folders):
            folder.mkdir(parents=True, exist_ok=True)
        keep(config, paths, by="submit")
    except OSError as error:
        raise ConfigError(f"cannot write to {paths.root}: {error.strerror}") from None


def _check(config: Config, nodes: int) -> None:
    if not config.scorer.path and (names := tasks_with_job_scorers(config)):
        raise ConfigError(
            f"submit: {names[0]}: the reward `model` without `url` asks score servers of the job: set "
            "scorer.path to the directory of a reward model, or the reward's url"
        )
    ports = {
        "scorer.port": (config.scorer.port, config.scorer.num_servers if config.scorer.path else 0),
        "sessions.router_port": (config.sessions.router_port, config.sessions.num_routers),
    }
    for setting, (port, number) in ports.items():
        if port and number > 1:
            raise ConfigError(
                f"submit: {setting}={port}: several of the {number} may be placed on one node, where they "
                f"cannot share a port: leave {setting} out"
            )
    world_size = config.trainer.world_size
    if nodes < 1 or world_size % nodes:
        raise ConfigError(
            f"--trainer-nodes {nodes}: trainer.world_size={world_size} ranks cannot be divided evenly over "
            "them: change one of the two"
        )
    if config.trainer.num_hosts != 1:
        raise ConfigError("submit: leave trainer.num_hosts out, --trainer-nodes N sets it")
    if config.buffer.num_shards != 1:
        raise ConfigError(
            f"submit: buffer.num_shards={config.buffer.num_shards}: a submitted run has one, set it to 1"
        )
    if config.buffer.durability == "none":
        raise ConfigError(
            "submit: a scheduler may start the buffer again, and with buffer.durability=none it would have "
            "lost its ledger: set buffer.durability=power_loss"
        )
    if config.security.keys:
        KeyDirectory(Path(config.security.keys))
    elif not config.security.insecure:
        raise ConfigError(
            "submit: the roles communicate over the network, so they need keys: make them with `areal-like "
            "keys init DIR`, in a directory that the nodes see and only you can read, and give "
            "security.keys=DIR"
        )


def _absolute(directory: str) -> str:
    return str(Path(directory).expanduser().resolve()) if directory else ""
