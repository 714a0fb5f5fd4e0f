"""The state machine of a local job: observations in, actions out; no processes, files or clocks.

    PREPARING -> STARTING -> RUNNING -> CLOSING -> over (no process runs)
        |            |           |
        +------------+-----------+----> CLOSING when a daemon fails and is not restarted, a user stops the
                                        run, or the trainer has finished

- PREPARING builds the model while the buffers start, unless a resumed run has its model already; STARTING
  waits for all daemons. Trainer and servers import their libraries while the buffers read their ledgers.
- CLOSING always ends the processes in the same order: trainer (finishes its step, writes a checkpoint,
  commits), rollout servers, then buffers, routers and score servers (if the job has them).
- A daemon that drains before CLOSING was stopped by a user. A stopped server is not replaced, and the run
  continues while another server is left; any other daemon closes the run. Exit code 0 of a
  daemon means that the run is finished, which also closes it; a trainer gets time to end by itself then.
- A daemon that dies is started again, and the others only pause: other servers generate a dead server's
  samples, rewards wait for a score server, agents for a router, a buffer restarts at the same port with its
  ledger (unless `buffer.durability=none`), the trainer restarts from its newest checkpoint. The number of
  deaths in a row is limited (areal_like/runtime/restarts.py, trainer.py).
- Not started again: a trainer whose code failed before the first step was done, and a daemon that rejects its
  settings (exit code 2), unless it is a server or buffer that has been ready with these settings before.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum

from areal_like.automatic_settings import start_limit_s
from areal_like.config import Config
from areal_like.runtime.progress import ProgressClock
from areal_like.runtime.restarts import RestartLimits, Restarts, RestartState
from areal_like.shards import all_shards
from launch.local_job.actions import Action, Exit, HandOver, Kill, KillEverything, Notice, Start, Terminate
from launch.local_job.servers import SupervisedServers
from launch.local_job.shutdown import Shutdown, Stage
from launch.local_job.specs import DRAINED, JobSpecs
from launch.local_job.trainer import SupervisedTrainer
from launch.observation.observer import Observation

log = logging.getLogger(__name__)

BUFFER_START_TIMEOUT_S = 300.0
"""A buffer that has reported no address by then is hung. Reading a large journal on a loaded machine takes
a minute."""
START_PATIENCE = 2.0
"""Longest time without progress in STARTING, in multiples of `start_limit_s`. Above 1, because a server
reports the reason itself if its engine does not start."""
_LATEST_S = 5.0
"""Longest delay until a finished step is observed. A longer one means that a clock was set."""
FAILURE_CLOSE_S = 10.0
"""Time for the other daemons to end after one has failed."""
FINISHED_GRACE_S = 10.0
"""Time for the trainer of a finished run to end by itself: it tells the others to end, and they end first."""
TRAINER_RESERVE, SERVERS_RESERVE = 0.25, 0.1
"""Fraction of `daemon.drain_timeout_s` that trainer and servers must leave to the processes that end after
them."""


class Phase(StrEnum):
    """The phase of the job."""

    PREPARING = "preparing the model"
    """The model is built; the buffers start."""
    STARTING = "starting"
    """Servers and trainer load the model and connect to the buffers, which may still start."""
    RUNNING = "running"
    """All daemons are ready."""
    CLOSING = "closing"
    """Daemons end one after another."""


class JobOutcome:
    """The job counts as successful until a failure is recorded; a later failure replaces an earlier one."""

    def __init__(self) -> None:
        self.exit_code = 0
        """The exit code of the whole job: 0 finished or drained, 1 failed, 2 the user's mistake."""
        self.is_finished = False
        """True when the run is finished: all steps are done."""
        self.failure: list[str] = []
        """The reason for a failure, in lines for the user; empty when the run did not fail."""

    def failed(self, lines: Sequence[str], *, exit_code: int) -> None:
        """Records a failure."""
        self.exit_code, self.failure = exit_code, list(lines)
        for line in lines:
            log.error("%s", line)

    def overran(self) -> None:
        """Records that a process did not end in time and was killed: exit code 1."""
        self.exit_code = self.exit_code or 1

    def note_exit_while_closing(self, ended: Exit) -> None:
        """Records an exit during the shutdown; only a failure of the trainer makes the run fail."""
        # torchrun exits with 128 + the number of the signal that ended one of its ranks.
        was_terminated = ended.code in (0, DRAINED, -signal.SIGTERM, 128 + signal.SIGTERM)
        if ended.name == "trainer" and not was_terminated and not self.failure:
            headline = f"trainer failed while it drained ({ended.description}); its last lines:"
            self.failed(ended.failure_lines(headline), exit_code=1)
        elif not was_terminated and ended.code != -signal.SIGINT:
            log.warning("%s ended while closing: %s", ended.name, ended.description)


class JobLifecycle:
    """One job from start to end.

    Calls: `start()`, then any of `stop_requested`, `exited`, `replace_trainer` and `tick` until `is_over`.
    Each returns actions, which the caller carries out in order before the next call. `last_words` reads the
    last lines of output of a running process. Times are seconds on one monotonic clock.
    """

    def __init__(
        self, config: Config, *, specs: JobSpecs, last_words: Callable[[str], Sequence[str]], now_s: float
    ) -> None:
        self._config, self._specs, self._last_words = config, specs, last_words
        self._buffers = {
            shard.name: specs.buffer(shard.name) for shard in all_shards(config.buffer.num_shards)
        }
        self._buffer_restarts: dict[str, Restarts] = {}
        """Restartable buffers; empty without a durable ledger, and until all buffers have been ready: a dead
        buffer then ends the run."""
        self._servers = SupervisedServers(
            [f"rollout-{index}" for index in range(config.rollout.num_servers)],
            now_s=now_s,
            lease_timeout_s=config.buffer.lease_timeout_s,
        )
        self._scorers = SupervisedServers(
            [f"scorer-{index}" for index in range(config.scorer.num_servers if config.scorer.path else 0)],
            now_s=now_s,
            lease_timeout_s=0.0,
            role="scorer",
        )
        self._routers = SupervisedServers(
            [f"router-{index}" for index in range(config.sessions.num_routers)],
            now_s=now_s,
            lease_timeout_s=0.0,
            role="router",
        )
        self._groups = (self._servers, self._scorers, self._routers)
        self._buffers_have_ports = False
        """True once all buffers have been ready: they keep their ports after a restart."""
        self._trainer = SupervisedTrainer(specs.trainer(), resume=config.resume, now_s=now_s)
        self._shutdown: Shutdown | None = None
        self._running: set[str] = set()
        self._ever_ready: set[str] = set()
        """Daemons that have been ready at least once, so their settings are valid."""
        self._began_s = self._phase_since_s = now_s
        self._progress = ProgressClock(now_s=now_s)
        self._seen = Observation()
        """The newest observation."""
        self.phase = Phase.PREPARING
        self.has_begun = False  # True once all daemons have been ready at the same time
        self.outcome = JobOutcome()

    @property
    def is_over(self) -> bool:
        """True when the job is closing and no process runs any more."""
        return self.phase is Phase.CLOSING and not self._running

    def by_exit_priority(self, names: Iterable[str]) -> list[str]:
        """Names in the order in which their exits must be handled: buffers, trainer, all others.

        The death of a buffer soon makes trainer and servers fail, so that the buffer is the cause to report.
        """
        return sorted(names, key=lambda name: (name not in self._buffers, name != "trainer", name))

    # Observations

    def start(self, *, has_model: bool = False) -> list[Action]:
        """Starts the buffers and, unless the run has its model already, the process that builds it."""
        specs = [*self._buffers.values(), *([] if has_model else [self._specs.prepare_model()])]
        return self._started([Start(spec) for spec in specs])

    def stop_requested(self, num_requests: int, *, now_s: float) -> list[Action]:
        """`num_requests`: stop signals so far. The first drains the job, the second ends it at once."""
        if num_requests >= 2 and self._running:
            self.outcome.failed([], exit_code=1)
            self._running.clear()
            self._enter(Phase.CLOSING, now_s=now_s)
            return [Notice(f"stopped at once: {self._specs.stopped_at_once}"), KillEverything()]
        if num_requests == 1 and self.phase is not Phase.CLOSING:
            notice = Notice(f"stopping: {self._specs.stopping} (Ctrl-C again to stop at once)")
            return [notice, *self._drain(now_s=now_s)]
        return []

    def exited(self, ended: Exit, *, now_s: float) -> list[Action]:
        """Handles the end of a process that was not ended by a `Kill` action."""
        self._running.discard(ended.name)
        # Only the trainer and the buffers know this; in a server, a task's code may call sys.exit().
        if ended.code == 0 and (ended.name == "trainer" or ended.name in self._buffers):
            self.outcome.is_finished = True
        if self.phase is Phase.CLOSING and not self._is_needed_to_close(ended.name):
            self.outcome.note_exit_while_closing(ended)
            return []
        if ended.name == "trainer" and self._trainer.is_on_trial:
            if ended.code == 0:  # the last step is trained
                return [self._trainer.end_trial(), *self._ended(ended, now_s=now_s)]
            if ended.code != DRAINED:
                return self._fall_back(ended)
        if ended.name == "trainer" and ended.code == 2 and self._trainer.has_untried_settings:
            return self._fall_back(ended)  # another order has come meanwhile, which ended the trial
        if ended.code == 2 and not self._has_worked(ended.name):
            report = self._trainer.death_report if ended.name == "trainer" else []
            return self._fail([ended.complaint, *report], exit_code=2, now_s=now_s)
        for group in self._groups:
            if ended.name in group:
                return [Notice(group.exited(ended, now_s=now_s))]
        if ended.code not in (0, DRAINED):
            return self._process_failed(ended, now_s=now_s)
        if ended.name == "trainer" and self._trainer.takes_over(ended):
            return self._started([self._next_trainer()])
        if ended.name == "trainer" or ended.name in self._buffers:
            return self._ended(ended, now_s=now_s)
        return []  # the model is prepared

    def replace_trainer(self, settings: Sequence[str], *, seen: Observation) -> list[Action]:
        """Replaces the trainer by one with these settings, once the current one has ended."""
        assert self.phase is Phase.RUNNING
        self._trainer.change_settings(settings)
        text = f"replacing the trainer by one with {' '.join(settings) or 'the same settings'}"
        if "trainer" not in self._running:  # it just died: its restart uses the new settings
            return [Notice(text)]
        self._trainer.is_handing_over = True
        rank0 = seen.daemons.get("trainer-0")
        return [Notice(text), HandOver(str(rank0.endpoint.get("http", "")) if rank0 else None)]

    def replace(self, name: str, *, now_s: float) -> list[Action]:
        """Replaces a server, once it has drained, or a buffer with a durable ledger. A server that does not
        run, because it was given up or drained, is started."""
        is_running = name in self._running
        if name in self._buffer_restarts and is_running:
            # It is killed, because a buffer that drains without a trainer ends the run.
            return [Notice(f"restarting {name}"), Kill(name), Start(self._buffers[name])]
        if name in self._buffer_restarts:
            return [Notice(f"{name} has ended, and is started again anyway")]
        if any(group.replace(name, is_running=is_running, now_s=now_s) for group in self._groups):
            return [Notice(f"restarting {name}"), *([Terminate(name)] if is_running else [])]
        return [Notice(f"{name} is not restarted: this launcher does not run it")]

    def tick(self, seen: Observation, *, now_s: float, now_unix_s: float) -> list[Action]:
        """Advances the phase and starts what is due. Call it about ten times per second."""
        self._seen = seen
        actions = self._advance_phase(seen, now_s=now_s)
        if seen.last_step > self._trainer.best_step:
            # The step may be observed up to a second late, after a later death: pass the time of the step
            # itself.
            finished_unix_s = float(seen.steps[-1].get("time_unix_s", now_unix_s))
            late_s = min(max(0.0, now_unix_s - finished_unix_s), _LATEST_S)
            self._trainer.reached(seen.last_step, at_s=now_s - late_s)
        if self.phase is Phase.RUNNING:
            rank0 = seen.daemons.get("trainer-0")
            is_ready = rank0 is not None and not rank0.not_ready
            if (tried := self._trainer.see(rank0.endpoint if rank0 else {}, is_ready=is_ready)) is not None:
                actions += [Notice(f"the trainer is ready with {' '.join(tried.settings)}"), tried]
        self._ever_ready |= {view.name for view in seen.daemons.values() if not view.not_ready}
        if self.phase in (Phase.STARTING, Phase.RUNNING):
            actions += self._close_without_servers(seen, now_s=now_s)
        return actions + self._start_due(now_s=now_s)

    def waiting_for(self, seen: Observation) -> str:
        """A short text about the daemons that the current phase waits for, and the reasons."""
        if self.phase is Phase.STARTING:
            unready = self._unready(seen)
            return ", ".join(f"{name} ({seen.reason_unready(name)})" for name in unready)
        if self._shutdown is not None and (names := self._shutdown.awaited(self._running)):
            return f"waiting for {', '.join(names)}"
        return ""

    # Phases

    def _advance_phase(self, seen: Observation, *, now_s: float) -> list[Action]:
        if self.phase is Phase.CLOSING:
            return self._advance_closing(seen, now_s=now_s)
        if not self._buffers_have_ports:
            if not (unready := self._unready_buffers(seen)):
                self._keep_ports(seen, now_s=now_s)
            elif now_s - self._began_s > BUFFER_START_TIMEOUT_S:
                return self._fail_unready(unready, seen, now_s=now_s)
        if self.phase is Phase.PREPARING and "prepare_model" not in self._running:
            self._enter(Phase.STARTING, now_s=now_s)
        if self.phase is Phase.STARTING:
            return self._advance_starting(seen, now_s=now_s)
        return []

    def _keep_ports(self, seen: Observation, *, now_s: float) -> None:
        """Records the ports of the buffers, which they keep after a restart, and supervises them."""
        self._buffers_have_ports = True
        streams = [str(seen.daemons[name].endpoint["stream"]) for name in self._buffers]
        where = f"buffer.ports=[{','.join(stream.rpartition(':')[2] for stream in streams)}]"
        self._buffers = {name: spec.with_settings([where]) for name, spec in self._buffers.items()}
        if self._config.buffer.durability != "none":
            self._buffer_restarts = {name: Restarts(RestartLimits(), now_s=now_s) for name in self._buffers}
            for restarts in self._buffer_restarts.values():
                restarts.started(now_s=now_s)

    def _advance_starting(self, seen: Observation, *, now_s: float) -> list[Action]:
        unready = self._unready(seen)
        self._progress.observe("daemons", seen.signs_of_progress, now_s=now_s)
        if not unready:
            self._enter(Phase.RUNNING, now_s=now_s)
        elif seen.is_evaluating and not any(name in self._servers for name in unready):
            # All daemons have started. The first evaluation may wait for agents; the trainer limits that
            # wait.
            self._progress.advance(now_s=now_s)
        elif now_s - self._progress.last_s > START_PATIENCE * start_limit_s(self._config):
            return self._fail_unready(unready, seen, now_s=now_s)
        return []

    def _unready(self, seen: Observation) -> list[str]:
        """Daemons that are not ready yet; the trainer's ranks are daemons.

        Once all buffers have been ready, they no longer count: a job waits for a buffer whose disk is full.
        """
        buffers = [] if self._buffers_have_ports else self._unready_buffers(seen)
        ranks = [f"trainer-{rank}" for rank in range(self._config.trainer.world_size)]
        names = [*self._scorers.expected, *self._routers.expected, *self._servers.expected, *ranks]
        return [*buffers, *(name for name in names if not _is_ready(seen, name))]

    def _unready_buffers(self, seen: Observation) -> list[str]:
        """Buffers that are not ready, or have not written their address."""
        return [
            name
            for name in self._buffers
            if not (_is_ready(seen, name) and "stream" in seen.daemons[name].endpoint)
        ]

    def _enter(self, phase: Phase, *, now_s: float) -> None:
        log.info("%s", phase)
        self.phase, self._phase_since_s = phase, now_s
        self.has_begun |= phase is Phase.RUNNING

    # Deaths and restarts

    def _is_needed_to_close(self, name: str) -> bool:
        """True for a restartable buffer while the trainer runs, which needs it for its last checkpoint."""
        return name in self._buffer_restarts and "trainer" in self._running

    def _has_worked(self, name: str) -> bool:
        return name in self._ever_ready and (
            name in self._buffer_restarts or any(name in group for group in self._groups)
        )

    def _process_failed(self, ended: Exit, *, now_s: float) -> list[Action]:
        """Handles the failure of a buffer, the trainer or prepare_model: a restart, or the end of the run."""
        words = ended.failure_lines(f"{ended.name} failed ({ended.description}); its last lines:")
        if ended.name == "trainer":  # it may have waited for a buffer that cannot write
            unready = self._unready_buffers(self._seen)
            words += [f"{name} was not ready: {self._seen.reason_unready(name)}" for name in unready]
        if ended.name == "trainer" and not self._trainer.is_hopeless(ended):
            self._trainer.died(ended, report=words, now_s=now_s)
            restarts = self._trainer.restarts
        elif ended.name in self._buffer_restarts:
            restarts = self._buffer_restarts[ended.name]
            restarts.failed(now_s=now_s)
        else:
            return self._fail(words, exit_code=1, now_s=now_s)
        if restarts.state is RestartState.GIVEN_UP:
            headline = f"{ended.name} died {restarts.num_failures} times in a row"
            return self._fail([headline, *words], exit_code=1, now_s=now_s)
        for line in words[1:] if ended.code > 0 else ():
            log.error("%s", line)
        return [Notice(ended.restart_notice(restarts.due_s - now_s))]

    def _fall_back(self, ended: Exit) -> list[Action]:
        """Handles the end of a trainer with new settings that was not ready: they may be the cause."""
        tried = self._trainer.fall_back(ended)
        for line in ended.last_words if ended.code > 0 else ():
            log.error("%s", line)
        words = " ".join(tried.settings)
        text = f"the trainer with {words} ended ({ended.description}) before it was ready"
        return [
            Notice(f"{text}: starting it again with the previous settings"),
            tried,
            *self._started([self._next_trainer()]),
        ]

    def _ended(self, ended: Exit, *, now_s: float) -> list[Action]:
        """Handles the orderly end of the trainer, or of a buffer that ends before it: the run is over."""
        if ended.code == 0:
            return self._finish(now_s=now_s)
        return [Notice(f"a user stopped the {ended.name}: closing the run"), *self._drain(now_s=now_s)]

    def _next_trainer(self) -> Start:
        return self._trainer.start(was_ready="trainer-0" in self._ever_ready)

    def _start_due(self, *, now_s: float) -> list[Action]:
        starts: list[Start] = []
        is_open = self.phase in (Phase.STARTING, Phase.RUNNING)
        if is_open:
            due = self._servers.start_due(now_s=now_s)
            starts += [Start(self._specs.server(name)) for name in due]
        if self.phase is not Phase.CLOSING:  # they need no model of the run, and load their own meanwhile
            due = self._scorers.start_due(now_s=now_s)
            starts += [Start(self._specs.scorer(name)) for name in due]
            due = self._routers.start_due(now_s=now_s)
            starts += [Start(self._specs.router(name)) for name in due]
        for name, restarts in self._buffer_restarts.items():
            is_wanted = self.phase is not Phase.CLOSING or self._is_needed_to_close(name)
            if is_wanted and restarts.is_due(now_s=now_s):
                restarts.started(now_s=now_s)
                starts.append(Start(self._buffers[name]))
        if is_open and self._trainer.restarts.is_due(now_s=now_s):
            self._trainer.restarts.started(now_s=now_s)
            starts.append(self._next_trainer())
        return self._started(starts)

    def _close_without_servers(self, seen: Observation, *, now_s: float) -> list[Action]:
        for group, what in ((self._scorers, "score server"), (self._routers, "router")):
            if (ended := group.last_exit_if_none_left(seen, now_s=now_s)) is not None:
                headline = f"{ended.name} ended ({ended.description}) and no {what} is left; its last lines:"
                return self._fail(ended.failure_lines(headline), exit_code=1, now_s=now_s)
        ended = self._servers.last_exit_if_none_left(seen, now_s=now_s)
        if ended is None:
            return []
        if ended.code == 0:
            return self._finish(now_s=now_s)
        if ended.code == DRAINED:
            return self._drain(now_s=now_s)
        headline = f"{ended.name} failed ({ended.description}) and no rollout server is left; its last lines:"
        return self._fail(ended.failure_lines(headline), exit_code=1, now_s=now_s)

    # Closing

    def _finish(self, *, now_s: float) -> list[Action]:
        """Closes a finished run: its daemons already know that they should end."""
        timeout_s = self._config.daemon.drain_timeout_s
        return self._close(timeout_s, grace_s=min(FINISHED_GRACE_S, timeout_s / 4), now_s=now_s)

    def _drain(self, *, now_s: float) -> list[Action]:
        return self._close(self._config.daemon.drain_timeout_s, now_s=now_s)

    def _fail(self, lines: Sequence[str], *, exit_code: int, now_s: float) -> list[Action]:
        self.outcome.failed(lines, exit_code=exit_code)
        return self._close(min(FAILURE_CLOSE_S, self._config.daemon.drain_timeout_s), now_s=now_s)

    def _fail_unready(self, names: Sequence[str], seen: Observation, *, now_s: float) -> list[Action]:
        lines = []
        for name in names:
            waited_s = now_s - (self._began_s if name in self._buffers else self._phase_since_s)
            lines.append(f"{name} was not ready after {waited_s:.0f} s: {seen.reason_unready(name)}")
            process = "trainer" if name.startswith("trainer-") else name
            lines += [f"  {line}" for line in self._last_words(process)]
        if seen.cause:
            lines.append(f"the job {seen.cause}")
        return self._fail(lines, exit_code=1, now_s=now_s)

    def _close(self, timeout_s: float, *, now_s: float, grace_s: float = 0.0) -> list[Action]:
        """Starts the shutdown. `grace_s`: seconds before the trainer is asked to end."""
        if self.phase is not Phase.CLOSING:
            stages = (
                Stage(names=("prepare_model", "trainer"), reserve=TRAINER_RESERVE, grace_s=grace_s),
                Stage(names=tuple(self._servers.ours), reserve=SERVERS_RESERVE),
                Stage(names=(*self._scorers.ours, *self._routers.ours, *self._buffers), reserve=0.0),
            )
            self._shutdown = Shutdown(stages, now_s=now_s, timeout_s=timeout_s)
            self._enter(Phase.CLOSING, now_s=now_s)
        return self._advance_closing(None, now_s=now_s)

    def _advance_closing(self, seen: Observation | None, *, now_s: float) -> list[Action]:
        if self._shutdown is None:  # stopped at once
            return []
        reason = self._reason_of_slow_closing(seen) if seen is not None else ""
        actions = self._shutdown.advance(self._running, now_s=now_s, reason=reason)
        killed = {action.name for action in actions if isinstance(action, Kill)}
        self._running -= killed
        if killed:
            self.outcome.overran()
        return actions

    def _reason_of_slow_closing(self, seen: Observation) -> str:
        """What the job waits on, or what the process that ends next is doing."""
        if seen.cause:
            return f"the job {seen.cause}"
        names = self._shutdown.awaited(self._running) if self._shutdown is not None else []
        return seen.longest_wait("trainer-0" if names[0] == "trainer" else names[0]) if names else ""

    def _started(self, starts: Sequence[Start]) -> list[Action]:
        self._running |= {start.spec.name for start in starts}
        return list(starts)


def _is_ready(seen: Observation, name: str) -> bool:
    return name in seen.daemons and not seen.daemons[name].not_ready
