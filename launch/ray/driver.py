"""`areal-like submit --ray`: places the roles of a run on a Ray cluster and starts again what fails.

The driver is the launcher of the run: it stays until the run has ended, and all actors end with it. A signal
drains the run. Ray places processes and notices lost nodes. The daemons speak with each other by connections
of their own, with keys, and no record or weight passes through Ray.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from areal_like.config import Config
from areal_like.errors import ArealError
from areal_like.paths import RunPaths
from launch.nodes.settings import make_directory
from launch.nodes.start import ROLES, Place
from launch.ray.actors import Started
from launch.ray.cluster import ActorLostError, Cluster, RayOptions, own_directory, resources_of
from launch.ray.roles import RoleState, Supervision
from launch.ray.wanted import as_driver, directory_of, wanted_servers

_TICK_S = 0.5
_ANSWER_S = 60.0
_MARGIN_S = 15.0


def run_on_ray(
    config: Config, options: RayOptions, *, num_servers: int, listen: Callable[[], Callable[[], bool]]
) -> int:
    """Runs the run to its end; returns the exit code.

    `listen` sets the handlers of signals, after Ray, which has its own, and returns a function that tells
    whether the run is to drain.

    Raises ConfigError without a cluster or if a launcher or another driver runs the run, ArealError if the
    cluster has not the resources.
    """
    paths = RunPaths.of(config)
    make_directory(config, folders=[directory_of(paths)])
    with as_driver(paths), Cluster(options) as cluster:
        is_stopped = listen()
        _say(f"the run is in {paths.root}; `areal-like status {paths.root}` shows it")
        driver = Driver(config, options, cluster, num_servers=num_servers)
        return driver.run(is_stopped=is_stopped)


class Driver:
    """One run on one cluster."""

    def __init__(self, config: Config, options: RayOptions, cluster: Cluster, *, num_servers: int) -> None:
        self._config, self._options, self._cluster = config, options, cluster
        self._paths = RunPaths.of(config)
        self._supervision = Supervision(max_failures=options.max_failures)
        self._started: dict[int, Started] = {}
        """By the identity of the role."""
        self._places: dict[int, list[Any]] = {}
        self._stop_limit_s = float("inf")
        self._number = int(time.time())
        self._job = f"y{os.getpid()}"
        now_s = time.monotonic()
        roles = [self._supervision.add(role, now_s=now_s) for role in ROLES[:2]]
        roles += [self._supervision.add("rollout", now_s=now_s) for _ in range(num_servers)]
        self._reserve(roles)

    def run(self, *, is_stopped: Callable[[], bool]) -> int:
        """Supervises the run to its end; returns the exit code. `is_stopped`: true when it is to drain."""
        supervision = self._supervision
        while not supervision.is_over:
            now_s = time.monotonic()
            if is_stopped() and not supervision.is_stopping:
                _say("draining")
                supervision.is_stopping = True
            if supervision.is_stopping:
                self._stop_all(now_s)
            elif supervision.is_finished:
                self._end_unstarted(now_s)  # those that run end by themselves
            else:
                self._scale(now_s)
                self._begin_due(now_s)
            self._collect()
        return supervision.exit_code

    def _reserve(self, roles: list[RoleState]) -> None:
        nodes = [(role, n) for role in roles for n in range(self._num_nodes(role))]
        bundles = [resources_of(self._config, role.role, self._options) for role, _ in nodes]
        for (role, _), place in zip(nodes, self._cluster.reserve(bundles), strict=True):
            self._places.setdefault(id(role), []).append(place)

    def _num_nodes(self, role: RoleState) -> int:
        return self._options.trainer_nodes if role.role == "trainer" else 1

    def _begin_due(self, now_s: float) -> None:
        for role in self._supervision.roles:
            if role.is_over or not role.restarts.is_due(now_s=now_s):
                continue
            role.begin(now_s=now_s)
            try:
                self._begin(role)
            except ArealError as error:
                code = None if isinstance(error, ActorLostError) else 1
                _say(f"{role.name} was not started: {error}")
                _say(self._supervision.ended(role, code, now_s=time.monotonic()))

    def _begin(self, role: RoleState) -> None:
        resources = resources_of(self._config, role.role, self._options)
        actors = [self._cluster.actor(place, resources) for place in self._places[id(role)]]
        addresses = [
            self._cluster.get(actor.address.remote(self._options.interface), timeout_s=_ANSWER_S)
            for actor in actors
        ]
        label = f"rollout-{self._job}n{role.number}" if role.role == "rollout" else role.role
        runs = []
        for index, (actor, address) in enumerate(zip(actors, addresses, strict=True)):
            place = replace(
                self._place(role),
                address=address,
                num_nodes=len(actors),
                index=index,
                first_address=addresses[0],
            )
            words = [role.role, str(self._paths.root), json.dumps(asdict(place))]
            log = self._paths.logs / f"ray-{label}-{index}.out"
            runs.append(actor.run.remote(words, directory=own_directory(), log=str(log)))
        self._started[id(role)] = Started(actors, runs)
        _say(f"{role.name} is on {', '.join(addresses)}, start {role.num_starts}")

    def _place(self, role: RoleState) -> Place:
        """Of the role's last start, on a node that is not known yet."""
        return Place(
            address="",
            job=f"{self._job}n{role.number}",
            number=self._number + role.num_starts,
            num_starts=role.num_starts - 1,
        )

    def _collect(self) -> None:
        """Takes the exit codes that have come; waits a moment for one."""
        running = {run: role for role in self._supervision.roles for run in self._runs_of(role)}
        if not running:
            time.sleep(_TICK_S)
            return
        for run in self._cluster.done(list(running), timeout_s=_TICK_S):
            role = running[run]
            started = self._started[id(role)]
            try:
                started.codes[run] = int(self._cluster.get(run, timeout_s=_ANSWER_S))
            except ActorLostError:
                started.codes[run] = None
            except ArealError as error:
                _say(f"{role.name}: {error}")
                started.codes[run] = 1
            if len(started.codes) < len(started.runs):
                self._stop(started)  # the nodes of a trainer begin and end together
                continue
            for actor in started.actors:
                self._cluster.kill(actor)
            del self._started[id(role)]
            if role.role == "rollout":  # the next start has another name
                name = self._place(role).server_name
                (self._paths.endpoints / f"{name}.json").unlink(missing_ok=True)
            _say(self._supervision.ended(role, started.code, now_s=time.monotonic()))

    def _runs_of(self, role: RoleState) -> list[Any]:
        started = self._started.get(id(role))
        return [] if started is None else [run for run in started.runs if run not in started.codes]

    def _stop(self, started: Started) -> None:
        if not started.is_stopped:
            started.is_stopped = True
            for actor in started.actors:
                actor.stop.remote()

    def _stop_all(self, now_s: float) -> None:
        """Servers and trainer first; the buffer when they have ended, because they say goodbye to it."""
        self._end_unstarted(now_s)
        if self._stop_limit_s == float("inf"):
            self._stop_limit_s = now_s + self._config.daemon.drain_timeout_s + _MARGIN_S
        others = [role for role in self._supervision.roles if role.role != "buffer" and not role.is_over]
        for role in self._supervision.roles:
            started = self._started.get(id(role))
            if started is None or (role.role == "buffer" and others and now_s < self._stop_limit_s):
                continue
            self._stop(started)
            if now_s > self._stop_limit_s + _MARGIN_S:
                for actor in started.actors:
                    self._cluster.kill(actor)

    def _end_unstarted(self, now_s: float) -> None:
        for role in self._supervision.roles:
            if not role.is_over and id(role) not in self._started:
                self._supervision.ended(role, None, now_s=now_s)

    def _scale(self, now_s: float) -> None:
        """Follows `areal-like scale`."""
        servers = self._supervision.servers()
        wanted = wanted_servers(self._paths)
        if wanted is None or wanted == len(servers):
            return
        added = [self._supervision.add("rollout", now_s=now_s) for _ in range(wanted - len(servers))]
        for role in added:
            try:
                self._reserve([role])
            except ArealError as error:
                _say(f"{role.name} was not started: {error}")
                role.is_over = True
        for role in servers[wanted:]:
            if (started := self._started.get(id(role))) is not None:
                self._stop(started)
            else:
                role.is_over = True


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")
    sys.stdout.flush()
