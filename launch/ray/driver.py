"""`areal-like submit --ray`: places the roles of a run on a Ray cluster and restarts those that fail.

The driver is the launcher of the run: it stays until the run has ended, and all actors end with it. A signal
drains the run. Ray places processes and detects lost nodes. The daemons communicate over their own
connections, with keys; records and weights never pass through Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from launch.nodes.settings import MOST_SERVERS, counts_of, make_directory
from launch.nodes.start import SIDE_ROLES, RolePlace
from launch.ray.cluster import ActorLostError, Cluster, RayOptions, resources_of
from launch.ray.roles import RoleState, Supervision
from launch.run_directory.rundir import is_locked

_TICK_S = 0.5
_ANSWER_S = 60.0
_MARGIN_S = 15.0


def run_on_ray(
    config: Config, options: RayOptions, *, num_servers: int, listen: Callable[[], Callable[[], bool]]
) -> int:
    """Runs the run to its end; returns the exit code.

    `listen` installs the signal handlers, after Ray has installed its own, and returns a function that tells
    whether the run is to drain.

    Raises ConfigError without a cluster or if a launcher or another driver runs the run, ArealError if the
    cluster does not have the resources.
    """
    paths = RunPaths.of(config)
    make_directory(config, folders=[directory_of(paths)])
    with as_driver(paths), Cluster(options) as cluster:
        is_stopped = listen()
        _say(f"the run is in {paths.root}; `areal-like status {paths.root}` shows it")
        driver = Driver(config, options, cluster, num_servers=num_servers)
        return driver.run(is_stopped=is_stopped)


class Started:
    """One start of one role: its actors, one for each node, and their pending results."""

    def __init__(self, actors: list[Any], runs: list[Any]) -> None:
        """`runs`: the object reference of each actor's `run`."""
        self.actors, self.runs = actors, runs
        self.codes: dict[Any, int | None] = {}
        """Reference -> exit code, or None if the actor is lost, for the nodes that have ended."""
        self.is_stopped = False

    @property
    def code(self) -> int | None:
        """The exit code of the start as a whole, when all nodes have ended.

        It is the first of these that a node has: a wrong setting, a failure, a loss (None), a drain, 0.
        """
        codes = list(self.codes.values())
        for code in (2, *(c for c in codes if c not in (None, 0, 2, 75)), None, 75):
            if code in codes:
                return code
        return 0


class Driver:
    """One run on one cluster."""

    def __init__(self, config: Config, options: RayOptions, cluster: Cluster, *, num_servers: int) -> None:
        self._config, self._options, self._cluster = config, options, cluster
        self._paths = RunPaths.of(config)
        self._supervision = Supervision(max_failures=options.max_failures)
        self._started: dict[RoleState, Started] = {}
        self._places: dict[RoleState, list[Any]] = {}
        self._stop_limit_s = float("inf")
        self._number = int(time.time())
        self._job = f"y{os.getpid()}"
        now_s = time.monotonic()
        counts = counts_of(config, num_servers=num_servers)
        names = [role for role, number in counts.items() for _ in range(number)]
        self._reserve([self._supervision.add(role, now_s=now_s) for role in names])

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
                self._end_unstarted(now_s)
                self._stop_side_roles()  # the others end by themselves
            else:
                self._scale(now_s)
                self._begin_due(now_s)
            self._collect()
        return supervision.exit_code

    def _reserve(self, roles: list[RoleState]) -> None:
        nodes = [(role, n) for role in roles for n in range(self._num_nodes(role))]
        bundles = [resources_of(self._config, role.role, self._options) for role, _ in nodes]
        for (role, _), place in zip(nodes, self._cluster.reserve(bundles), strict=True):
            self._places.setdefault(role, []).append(place)

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
        actors = [self._cluster.actor(place, resources) for place in self._places[role]]
        addresses = [
            self._cluster.get(actor.address.remote(self._options.interface), timeout_s=_ANSWER_S)
            for actor in actors
        ]
        label = role.role if role.is_single else f"{role.role}-{self._job}n{role.number}"
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
            # Relative paths in the configuration are relative to this directory on every node.
            runs.append(actor.run.remote(words, directory=str(Path.cwd()), log=str(log)))
        self._started[role] = Started(actors, runs)
        _say(f"{role.name} is on {', '.join(addresses)}, start {role.num_starts}")

    def _place(self, role: RoleState) -> RolePlace:
        """The place of the role's last start, on a node that is not known yet."""
        return RolePlace(
            address="",
            job=f"{self._job}n{role.number}",
            number=self._number + role.num_starts,
            num_starts=role.num_starts - 1,
        )

    def _collect(self) -> None:
        """Collects the exit codes that have arrived; waits a moment for one."""
        running = {run: role for role in self._supervision.roles for run in self._runs_of(role)}
        if not running:
            time.sleep(_TICK_S)
            return
        for run in self._cluster.done(list(running), timeout_s=_TICK_S):
            role = running[run]
            started = self._started[role]
            try:
                started.codes[run] = int(self._cluster.get(run, timeout_s=_ANSWER_S))
            except ActorLostError:
                started.codes[run] = None
            except ArealError as error:
                _say(f"{role.name}: {error}")
                started.codes[run] = 1
            if len(started.codes) < len(started.runs):
                self._stop(started)  # the nodes of a trainer start and stop together
                continue
            for actor in started.actors:
                self._cluster.kill(actor)
            del self._started[role]
            if name := self._place(role).name_of(role.role):  # of a lost one it is still there
                (self._paths.endpoints / f"{name}.json").unlink(missing_ok=True)
            _say(self._supervision.ended(role, started.code, now_s=time.monotonic()))

    def _runs_of(self, role: RoleState) -> list[Any]:
        started = self._started.get(role)
        return [] if started is None else [run for run in started.runs if run not in started.codes]

    def _stop(self, started: Started) -> None:
        if not started.is_stopped:
            started.is_stopped = True
            for actor in started.actors:
                actor.stop.remote()

    def _stop_all(self, now_s: float) -> None:
        """Stops servers and trainer first; the buffer when they have ended, because they deregister from
        it."""
        self._end_unstarted(now_s)
        if self._stop_limit_s == float("inf"):
            self._stop_limit_s = now_s + self._config.daemon.drain_timeout_s + _MARGIN_S
        others = [role for role in self._supervision.roles if role.role != "buffer" and not role.is_over]
        for role in self._supervision.roles:
            started = self._started.get(role)
            if started is None or (role.role == "buffer" and others and now_s < self._stop_limit_s):
                continue
            self._stop(started)
            if now_s > self._stop_limit_s + _MARGIN_S:
                for actor in started.actors:
                    self._cluster.kill(actor)

    def _stop_side_roles(self) -> None:
        """Stops score servers and routers when the roles that use them have ended."""
        roles = self._supervision.roles
        if all(role.is_over for role in roles if role.role not in SIDE_ROLES):
            for role in roles:
                if (started := self._started.get(role)) is not None:
                    self._stop(started)

    def _end_unstarted(self, now_s: float) -> None:
        for role in self._supervision.roles:
            if not role.is_over and role not in self._started:
                self._supervision.ended(role, None, now_s=now_s)

    def _scale(self, now_s: float) -> None:
        """Adjusts the number of servers to the request of `areal-like scale`."""
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
                for each in added[added.index(role) :]:
                    each.is_over = True
                # Each attempt takes up to --wait, in which nothing is supervised. A newer order stays.
                if wanted_servers(self._paths) == wanted:
                    (directory_of(self._paths) / "servers").unlink(missing_ok=True)
                break
        for role in servers[wanted:]:
            if (started := self._started.get(role)) is not None:
                self._stop(started)
            else:
                role.is_over = True


def directory_of(paths: RunPaths) -> Path:
    """The folder of a run on Ray, with the number that `areal-like scale` asks for and the driver's lock."""
    return paths.root / "ray"


def wanted_servers(paths: RunPaths) -> int | None:
    """The requested number of rollout servers; None without a request, or if the file is still incomplete."""
    try:
        number = int((directory_of(paths) / "servers").read_text())
    except (OSError, ValueError):
        return None
    return number if 1 <= number <= MOST_SERVERS else None


def want_servers(paths: RunPaths, number: int) -> None:
    """Asks the run's driver for this number of rollout servers. Raises ConfigError if there is no driver."""
    if not has_driver(paths):
        raise ConfigError(
            f"no driver runs {paths.root} on Ray: continue it with `areal-like submit --ray "
            f"name={paths.root.name}`"
        )
    file = directory_of(paths) / "servers"
    partial = file.with_name(f".servers.{os.getpid()}")
    partial.write_text(f"{number}\n")
    partial.replace(file)


def has_driver(paths: RunPaths) -> bool:
    """True while a driver runs the run."""
    return bool(is_locked(directory_of(paths) / "lock"))


@contextlib.contextmanager
def as_driver(paths: RunPaths) -> Iterator[None]:
    """Holds the lock during the block. Raises ConfigError if another driver holds it."""
    file = os.open(directory_of(paths) / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ConfigError(
            f"another `areal-like submit --ray` runs {paths.root}: `areal-like scale` changes the number of "
            "its rollout servers"
        ) from None
    try:
        (directory_of(paths) / "servers").unlink(missing_ok=True)
        yield
    finally:
        os.close(file)


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")
    sys.stdout.flush()
