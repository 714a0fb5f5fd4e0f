"""Runs a whole job on this machine: starts the daemons, watches them, ends them, and leaves nothing behind.

    PREPARING -> STARTING -> RUNNING -> CLOSING -> (returns an exit code)
        |            |           |
        +------------+-----------+----> CLOSING when a daemon fails, a person stops the run, or the trainer is done

PREPARING builds the model while the buffer starts; STARTING waits for the trainer and the rollout servers. CLOSING goes in one order
whatever its cause: trainer (it finishes its step, checkpoints and commits), servers, buffer. A daemon that ends by itself with code 0 was
asked to by a person: a server is then not missed while another is left, anything else closes the run.

A daemon that dies is started again, and the others do not notice more than a pause: a server's samples are
generated elsewhere, the buffer comes back at the same port with its ledger (unless `buffer.durability=none`), the trainer with its newest
checkpoint. Deaths in a row are bounded; those of the trainer count until it gets further than any before, because a step whose data kill it
is reached again after minutes of health. A trainer whose code failed before the first step was done is not tried again, nor is anybody who
says that the settings are wrong (exit code 2), but for a server or buffer that has been ready with them.

Everything happens in the main thread, ten times a second: the kernel ties children to the thread that started them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import signal
import time
from collections.abc import Callable
from enum import StrEnum
from http.client import HTTPException

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.shards import all_shards
from launch.local_job.child import Child, ChildSpec, describe_exit, kill_marked
from launch.local_job.observe import Observer, post_json
from launch.local_job.restarts import Phase as Life
from launch.local_job.restarts import Restarts
from launch.local_job.rundir import OpenRun, checkpoints, take_order
from launch.view.view import View

log = logging.getLogger(__name__)

TICK_S = 0.1
BUFFER_START_TIMEOUT_S = 60.0
START_PATIENCE = 2.0
"""Times `rollout.start_timeout_s`: after one of them a server says itself why its engine did not start."""
FAILURE_CLOSE_S = 10.0
"""How long the others get to end when one daemon has failed."""
CLOSE_RESERVES = {"trainer": 0.25, "servers": 0.1, "buffer": 0.0}
"""Part of `daemon.drain_timeout_s` that each of them leaves to those that end after it."""


class Phase(StrEnum):
    """Where the job is."""

    PREPARING = "preparing the model"
    """The model is built; the buffer starts."""
    STARTING = "starting"
    """Servers and trainer load the model and find one another."""
    RUNNING = "running"
    """Everything is ready."""
    CLOSING = "closing"
    """Daemons end one after another."""


class LocalJob:
    """One job from start to end: `run()` once. `num_stops`: how often a person has asked for its end so far."""

    def __init__(self, run: OpenRun, *, view: View, num_stops: Callable[[], int]) -> None:
        self._run, self._view, self._num_stops = run, view, num_stops
        self._config: Config = run.config
        self._marker = f"{run.paths.root}:{os.getpid()}:{time.time_ns()}"
        self._observer = Observer(run.paths)
        self._buffers = [shard.name for shard in all_shards(run.config.buffer.num_shards)]
        self._phase = Phase.PREPARING
        self._phase_since_s = time.monotonic()
        self._children: dict[str, Child] = {}
        """Living ones, as far as we know."""
        self._specs: dict[str, ChildSpec] = {}
        self._restarts: dict[str, Restarts] = {}
        """Rollout servers that belong to the job, dead ones too."""
        self._cores: dict[str, Restarts] = {}
        """Buffers and trainer: as many as there are, and the run needs each of them."""
        self._best_step = -1
        """Newest step that any trainer of this job has done."""
        self._trainer_died: list[str] = []
        """How the last one did, in lines for a person."""
        self._is_replacing = False
        """The trainer was asked to make room for another."""
        self._were_ready: set[str] = set()
        """Daemons that have been ready in some life: their settings are no mistake."""
        self._last_server: tuple[Child, int] | None = None
        """Of our own rollout servers the one that ended last, and its exit code."""
        self._guests_seen_s = -math.inf
        """When a server that joined by itself was there though none of our own was left."""
        self._asked: set[str] = set()
        """Told to end."""
        self._close_by_s = self._close_within_s = 0.0
        self._exit_code = 0
        self.failure: list[str] = []
        """Why the run failed, in lines for a person; empty when it did not."""

    def run(self) -> int:
        """Returns 0 finished or drained, 1 failed, 2 the user's mistake."""
        self._observer.start()
        try:
            for name in self._buffers:
                self._start(name, "buffer", "--config", str(self._run.paths.config), "--name", name)
            prepare = ("trainer.prepare_model", "--config", str(self._run.paths.config))
            # On one thread, so that a seed gives the same model on every machine; SIGINT, so that it removes its temporary files.
            self._start("prepare_model", *prepare, stop_signal=signal.SIGINT)
            while not (self._phase is Phase.CLOSING and not self._children):
                self._obey_signals()
                self._notice_deaths()
                self._advance()
                self._view.update(self._observer.newest, phase=self._phase, detail=self._detail())
                time.sleep(TICK_S)
        finally:
            for child in self._children.values():
                child.kill()
            kill_marked(self._marker)
            self._observer.close()
            for left in self._run.paths.endpoints.glob("*.json"):  # of daemons that were killed
                left.unlink()
        return self._exit_code

    # Starting

    def _start(
        self, name: str, *command: str, num_threads: int = 1, stop_signal: signal.Signals = signal.SIGTERM
    ) -> None:
        self._specs[name] = ChildSpec(
            name=name, command=command, num_threads=num_threads, stop_signal=stop_signal
        )
        self._spawn(name)

    def _spawn(self, name: str) -> None:
        child = Child(
            self._specs[name], paths=self._run.paths, marker=self._marker, lock_fd=self._run.lock_fd
        )
        log.info("%s started, pid %d", name, child.pid)
        self._children[name] = child

    def _start_others(self, buffer_ports: list[str]) -> None:
        where = f"buffer.ports=[{','.join(buffer_ports)}]"
        common = ("--config", str(self._run.paths.config), where)
        for name in self._buffers if self._config.buffer.durability != "none" else ():
            self._cores[name] = Restarts(now_s=time.monotonic())
            spec = self._specs[name]
            self._specs[name] = dataclasses.replace(spec, command=(*spec.command, where))
        self._cores["trainer"] = Restarts(now_s=time.monotonic(), healthy_s=math.inf)
        self._best_step = self._newest_step()
        for index in range(self._config.rollout.num_servers):
            name = f"rollout-{index}"
            self._restarts[name] = Restarts(now_s=time.monotonic())
            self._start(
                name, "rollout_server", *common, "--name", name, num_threads=self._config.rollout.num_threads
            )
        self._start("trainer", "trainer", *common, num_threads=self._config.trainer.num_threads)

    def _advance(self) -> None:
        """One step of the phase machine."""
        waited_s = time.monotonic() - self._phase_since_s
        if self._phase is Phase.PREPARING:
            seen = self._observer.newest.daemons
            unready = [
                name
                for name in self._buffers
                if name not in seen or seen[name].not_ready or "stream" not in seen[name].endpoint
            ]
            if "prepare_model" not in self._children and not unready:
                self._start_others(
                    [str(seen[name].endpoint["stream"]).rpartition(":")[2] for name in self._buffers]
                )
                self._enter(Phase.STARTING)
            elif unready and waited_s > BUFFER_START_TIMEOUT_S:
                self._fail_unready(unready, waited_s)
        elif self._phase is Phase.STARTING:
            unready = self._unready()
            if not unready:
                self._enter(Phase.RUNNING)
                self._observer.settle()
            elif waited_s > START_PATIENCE * self._config.rollout.start_timeout_s:
                self._fail_unready(unready, waited_s)
        elif self._phase is Phase.RUNNING:
            if (settings := take_order(self._run.paths)) is not None:
                self._replace_trainer(settings)
        elif self._phase is Phase.CLOSING:
            self._advance_closing()
        if (step := self._newest_step()) > self._best_step and "trainer" in self._cores:
            self._best_step = step
            # It is seen up to a second late, perhaps after the death that followed it.
            late_s = time.time() - float(self._observer.newest.steps[-1]["time_unix_s"])
            self._cores["trainer"].got_on(at_s=time.monotonic() - late_s)
        self._were_ready |= {
            view.name for view in self._observer.newest.daemons.values() if not view.not_ready
        }
        if self._phase in (Phase.STARTING, Phase.RUNNING):
            self._end_without_servers()
        if self._phase in (Phase.STARTING, Phase.RUNNING):
            self._start_again(self._restarts | self._cores)
        elif "trainer" in self._children:  # it needs them for its last checkpoint
            self._start_again({name: self._cores[name] for name in self._buffers if name in self._cores})

    def _start_again(self, restarts_by_name: dict[str, Restarts]) -> None:
        for name, restarts in restarts_by_name.items():
            if restarts.is_due(now_s=time.monotonic()):
                restarts.started(now_s=time.monotonic())
                if name == "trainer":
                    self._resume_trainer()
                self._spawn(name)

    def _resume_trainer(self) -> None:
        """From its newest checkpoint, whatever the run was resumed from; without one from the beginning, with the recorded groups.

        A run that was to go back to a step has not as long as no trainer was ready: newer checkpoints may still be there.
        """
        if self._config.resume.startswith("step:") and "trainer-0" not in self._were_ready:
            return
        spec = self._specs["trainer"]
        command = tuple(part for part in spec.command if not part.startswith("resume="))
        resume = "resume=latest" if checkpoints(self._run.paths) else "resume=''"
        self._specs["trainer"] = dataclasses.replace(spec, command=(*command, resume))

    def _replace_trainer(self, settings: list[str]) -> None:
        """Has the trainer hand over; it is started again, with these settings, when it has ended."""
        self._view.notice(f"the trainer is replaced by one with {' '.join(settings) or 'the same settings'}")
        spec = self._specs["trainer"]
        changed = {setting.partition("=")[0] for setting in settings}
        command = tuple(part for part in spec.command if part.partition("=")[0] not in changed)
        self._specs["trainer"] = dataclasses.replace(spec, command=(*command, *settings))
        trainer = self._children.get("trainer")
        if trainer is None:  # it died just now: its next life has the settings
            return
        self._is_replacing = True
        seen = self._observer.newest.daemons.get("trainer-0")
        try:
            if seen is None:
                raise ConnectionError("it is still starting")
            post_json(str(seen.endpoint["http"]), "/control/hand_over", {})
        except (OSError, HTTPException, ConfigError) as error:
            log.warning("the trainer cannot be asked to hand over (%s): it drains", error)
            trainer.terminate()

    def _newest_step(self) -> int:
        steps = self._observer.newest.steps
        return int(steps[-1].get("step", -1)) if steps else -1

    def _enter(self, phase: Phase) -> None:
        log.info("%s", phase)
        self._phase, self._phase_since_s = phase, time.monotonic()

    def _unready(self) -> list[str]:
        """Daemons that are not ready yet (ranks of the trainer by their own names)."""
        ranks = [f"trainer-{rank}" for rank in range(self._config.trainer.world_size)]
        servers = [name for name, restarts in self._restarts.items() if restarts.phase is not Life.GIVEN_UP]
        seen = self._observer.newest.daemons
        return [name for name in (*servers, *ranks) if name not in seen or seen[name].not_ready]

    def _why_unready(self, name: str) -> str:
        view = self._observer.newest.daemons.get(name)
        return (view.not_ready if view else "") or "starting"

    def _fail_unready(self, names: list[str], waited_s: float) -> None:
        lines = []
        for name in names:
            lines.append(f"{name} was not ready after {waited_s:.0f} s: {self._why_unready(name)}")
            child = self._children.get("trainer" if name.startswith("trainer-") else name)
            lines += [f"  {line}" for line in child.last_words()] if child else []
        self._fail(lines, exit_code=1)

    def _detail(self) -> str:
        """What the phase waits for, in a few words."""
        if self._phase is Phase.PREPARING:
            child = self._children.get("prepare_model")
            # Without the time and logger's name of a log line.
            return re.sub(r"^\S+ [\d:,]+ [\w.]+: ", "", child.last_line()) if child else "the buffer starts"
        if self._phase is Phase.STARTING:
            return ", ".join(f"{name} ({self._why_unready(name)})" for name in self._unready())
        if self._phase is Phase.CLOSING:
            return (
                f"waiting for {', '.join(sorted(self._asked & set(self._children)))}"
                if self._asked & set(self._children)
                else ""
            )
        return ""

    # Deaths

    def _notice_deaths(self) -> None:
        # Buffers first: when one dies the others soon follow, and they are not to blame.
        for name in sorted(
            self._children, key=lambda name: (name not in self._buffers, name != "trainer", name)
        ):
            child = self._children.get(name)  # an earlier death in this loop may have closed the run
            code = child.exit_code() if child else None
            if child is None or code is None:
                continue
            del self._children[name]
            child.kill()  # what it left of its process group
            (self._run.paths.endpoints / f"{name}.json").unlink(missing_ok=True)
            log.info("%s ended: %s", name, describe_exit(code))
            if self._phase is Phase.CLOSING and not (
                name in self._cores and name in self._buffers and "trainer" in self._children
            ):
                self._died_closing(child, code)
            elif code == 2 and not (name in self._were_ready and name in self._restarts | self._cores):
                self._fail(
                    [child.complaint(), *(self._trainer_died if name == "trainer" else ())], exit_code=2
                )
            elif name in self._restarts:
                self._server_died(child, code)
            elif code != 0:
                self._core_died(child, code)
            elif name == "trainer" and self._is_replacing:
                self._is_replacing = False
                self._resume_trainer()
                self._spawn(name)
            elif name == "trainer":
                self._close(self._config.daemon.drain_timeout_s)
            elif name in self._buffers:
                self._view.notice(f"the {name} was asked to stop: closing the run")
                self._close(self._config.daemon.drain_timeout_s)

    def _server_died(self, child: Child, code: int) -> None:
        restarts = self._restarts[child.name]
        if code == 0:
            del self._restarts[child.name]
            self._view.notice(f"{child.name} was asked to stop")
        else:
            restarts.died(now_s=time.monotonic())
            if restarts.phase is Life.WAITING:
                delay_s = restarts.due_s - time.monotonic()
                self._view.notice(
                    f"{child.name} ended ({describe_exit(code)}): starting it again in {delay_s:.1f} s"
                )
            else:
                self._view.notice(f"{child.name} ended {restarts.num_quick_deaths} times in a row: given up")
        self._last_server = child, code

    def _end_without_servers(self) -> None:
        """Asked all the time, because a guest may be the last to leave. A buffer that was started again knows its guests after a while."""
        if self._last_server is None or any(
            other.phase is not Life.GIVEN_UP for other in self._restarts.values()
        ):
            return
        if self._guests():
            self._guests_seen_s = time.monotonic()
        if time.monotonic() - self._guests_seen_s < self._config.buffer.lease_timeout_s:
            return
        child, code = self._last_server
        if code == 0:
            self._close(self._config.daemon.drain_timeout_s)
        else:
            self._fail(
                [
                    f"{child.name} failed ({describe_exit(code)}) and no rollout server is left; its last lines:"
                ]
                + [f"  {line}" for line in child.last_words()],
                exit_code=1,
            )

    def _guests(self) -> list[str]:
        """Rollout servers that joined by themselves and are there: they answer, or the buffer knows them (they may be on machines that do
        not see the run's directory)."""
        seen = self._observer.newest
        answering = [
            view.name for view in seen.daemons.values() if view.role == "rollout" and view.status is not None
        ]
        known = [str(peer["name"]) for peer in seen.buffer.get("peers", []) if peer.get("role") == "rollout"]
        return [name for name in answering + known if name not in self._specs]

    def _core_died(self, child: Child, code: int) -> None:
        words = [
            f"{child.name} failed ({describe_exit(code)}); its last lines:",
            *(f"  {x}" for x in child.last_words()),
        ]
        restarts = self._cores.get(child.name)
        is_hopeless = (
            child.name == "trainer" and 0 < code < 128 and self._best_step < 0
        )  # from 128 on: a rank that was killed
        if restarts is None or is_hopeless:
            self._fail(words, exit_code=1)
            return
        restarts.died(now_s=time.monotonic())
        if restarts.phase is Life.GIVEN_UP:
            self._fail([f"{child.name} died {restarts.num_quick_deaths} times in a row", *words], exit_code=1)
            return
        if child.name == "trainer":
            self._is_replacing = False  # what is started again has the new settings
            self._trainer_died = words
        for line in words[1:] if code > 0 else ():
            log.error("%s", line)
        self._view.notice(
            f"{child.name} ended ({describe_exit(code)}): starting it again in {restarts.due_s - time.monotonic():.1f} s"
        )

    def _died_closing(self, child: Child, code: int) -> None:
        if (
            child.name == "trainer"
            and code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
            and not self.failure
        ):
            self._failed(
                [
                    f"trainer failed while it drained ({describe_exit(code)}); its last lines:",
                    *(f"  {x}" for x in child.last_words()),
                ],
                1,
            )
        elif code not in (0, -signal.SIGTERM, -child.spec.stop_signal):
            log.warning("%s ended while closing: %s", child.name, describe_exit(code))

    # Ending

    def _obey_signals(self) -> None:
        if self._num_stops() >= 2 and self._children:
            self._view.notice("stopped at once: what was trained since the last checkpoint is lost")
            self._failed([], 1)
            for child in self._children.values():
                child.kill()
            kill_marked(self._marker)
            self._children.clear()
            self._enter(Phase.CLOSING)
        elif self._num_stops() == 1 and self._phase is not Phase.CLOSING:
            self._view.notice(
                "stopping: the trainer finishes its step and writes a checkpoint (Ctrl-C again to stop at once)"
            )
            self._close(self._config.daemon.drain_timeout_s)

    def _failed(self, lines: list[str], exit_code: int) -> None:
        self.failure, self._exit_code = lines, exit_code
        for line in lines:
            log.error("%s", line)

    def _fail(self, lines: list[str], *, exit_code: int) -> None:
        self._failed(lines, exit_code)
        self._close(min(FAILURE_CLOSE_S, self._config.daemon.drain_timeout_s))

    def _close(self, timeout_s: float) -> None:
        if self._phase is not Phase.CLOSING:
            self._close_by_s, self._close_within_s = time.monotonic() + timeout_s, timeout_s
            self._enter(Phase.CLOSING)
        self._advance_closing()

    def _advance_closing(self) -> None:
        """Trainer, then servers, then buffer; who overstays is killed, so that the next still has time."""
        left_s = self._close_by_s - time.monotonic()
        groups = {
            "trainer": ("prepare_model", "trainer"),
            "servers": tuple(self._restarts),
            "buffer": tuple(self._buffers),
        }
        for group, names in groups.items():
            living = [name for name in names if name in self._children]
            for name in set(living) - self._asked:
                self._children[name].terminate()
                self._asked.add(name)
            if living and left_s < CLOSE_RESERVES[group] * self._close_within_s:
                for name in living:
                    self._children.pop(name).kill()
                self._view.notice(f"{', '.join(living)} did not end in time: killed")
                self._exit_code = self._exit_code or 1
            elif living:
                return
