"""Requests of a run to a Ray cluster: placement groups with a bundle for each node of each role, and actors.

An actor owns one child process, the daemon of its role.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from launch.local_job.child import python_path
from launch.nodes.settings import ClusterOptions, gpus_of
from launch.nodes.start import address_of_interface

Resources = Mapping[str, float]
_LEAST_CPUS = 0.01
"""Minimal resource of a bundle: Ray does not reserve a bundle without resources."""
_TICK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class RayOptions(ClusterOptions):
    """A user's choices for the actors of a run."""

    address: str = "auto"
    """Address of the cluster, as `ray.init` takes it."""
    cpus: float = 1.0
    """CPUs that each actor reserves."""
    strategy: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = "SPREAD"
    """Strategy of the placement group."""
    wait: float = 300.0
    """Longest wait for the resources, in seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.cpus >= 0 and self.wait > 0):
            raise ConfigError("submit --ray: use --cpus of at least 0, and --wait above 0")


class ActorLostError(ArealError):
    """An actor has ended with its node or its process, or does not respond."""


def resources_of(config: Config, role: str, options: RayOptions) -> Resources:
    """The resources that one actor of a role reserves."""
    gpus = gpus_of(config, role, trainer_nodes=options.trainer_nodes)
    return {"CPU": max(_LEAST_CPUS, options.cpus)} | ({"GPU": float(gpus)} if gpus else {})


def import_ray() -> Any:
    """Returns the package `ray`. Raises ConfigError that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "submit --ray needs Ray in this environment and on all nodes: pip install 'areal-like[ray]' "
            f"({error})"
        ) from None
    return ray


class RoleActor:
    """Runs a role on the node that Ray has chosen: a child process, the daemon, which ends with it
    (`die_with_parent`). It carries no data.

    Its methods are coroutines, so that all run in one thread that lives as long as the actor: the kernel
    signals a child when the *thread* that started it ends.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    async def address(self, interface: str) -> str:
        """The numeric address of this node: of the interface or, if it is empty, the one Ray uses.

        Raises ConfigError.
        """
        if interface:
            return address_of_interface(interface)
        import ray.util

        return str(ray.util.get_node_ip_address())

    async def run(self, words: list[str], *, directory: str, log: str) -> int:
        """Runs `python -m launch.nodes.start WORDS` to its end and returns its exit code (128 + signal)."""
        with Path(log).open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "launch.nodes.start", *words],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        while (code := self._child.poll()) is None:
            await asyncio.sleep(_TICK_S)
        return code if code >= 0 else 128 - code

    async def stop(self) -> None:
        """Sends SIGTERM to the child, which drains."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.terminate()


class Cluster:
    """A connection to Ray. Use it as a context manager; all of the run's actors end with it."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._ray = import_ray()
        self._groups: list[Any] = []

    def __enter__(self) -> Cluster:
        try:
            self._ray.init(
                address=self._options.address,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster at --address {self._options.address}: start one with `ray start --head` "
                f"({error})"
            ) from None
        return self

    def __exit__(self, *exc: object) -> None:
        for group in self._groups:
            self._ray.util.remove_placement_group(group)
        self._ray.shutdown()

    def reserve(self, bundles: Sequence[Resources]) -> list[tuple[Any, int]]:
        """Reserves the bundles, all or none; returns (placement group, index) of each.

        If a node is lost, Ray places its bundles again. Raises ArealError if the cluster does not have the
        resources within the limit.
        """
        ray, options = self._ray, self._options
        group = ray.util.placement_group([dict(each) for each in bundles], strategy=options.strategy)
        ready, _ = ray.wait([group.ready()], timeout=options.wait)
        if not ready:
            ray.util.remove_placement_group(group)
            raise ArealError(
                f"Ray does not have the resources for {_summed(bundles)} in {len(bundles)} bundles "
                f"({options.strategy}) within {options.wait:.0f} s; the cluster has "
                f"{_shown(ray.cluster_resources())}, of which {_shown(ray.available_resources())} are free"
            )
        self._groups.append(group)
        return [(group, index) for index in range(len(bundles))]

    def actor(self, place: tuple[Any, int], resources: Resources) -> Any:
        """An actor in a reserved bundle. Ray does not start it again: the run's supervision does."""
        ray = self._ray
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=place[0], placement_group_bundle_index=place[1]
        )
        return (
            ray.remote(RoleActor)
            .options(
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=strategy,
            )
            .remote()
        )

    def get(self, reference: Any, *, timeout_s: float) -> Any:
        """Returns a result. Raises ActorLostError if its actor is lost or too slow, ArealError if it
        failed."""
        try:
            return self._ray.get(reference, timeout=timeout_s)
        except self._ray.exceptions.RayTaskError as error:
            raise ArealError(f"its actor failed: {error.cause}") from None
        except self._ray.exceptions.RayError as error:
            raise ActorLostError(f"its actor did not respond ({type(error).__name__})") from None

    def done(self, references: Sequence[Any], *, timeout_s: float) -> list[Any]:
        """Waits for a first result or the time limit; returns the references that have a result."""
        if not references:
            return []
        ready, _ = self._ray.wait(list(references), timeout=timeout_s, num_returns=1)
        more, _ = self._ray.wait(list(references), timeout=0, num_returns=len(references))
        return list({*ready, *more})

    def kill(self, actor: Any) -> None:
        """Ends an actor and its child."""
        self._ray.kill(actor)


def _summed(bundles: Sequence[Resources]) -> str:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return _shown(total)


def _shown(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
