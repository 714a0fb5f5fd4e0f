"""Runs a whole job on this machine: starts the daemons, watches them, and ends all of their processes.

Ten times per second `LocalJob` passes observations to the state machine (lifecycle.py) and performs the
actions that it returns. It runs in the main thread: the kernel ends a child when the thread that started it
ends.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from http.client import HTTPException

from areal_like.built_model import is_built
from areal_like.errors import ConfigError
from areal_like.paths import write_json
from areal_like.runtime.command_line import load_config, save_config
from launch.local_job.actions import Action, HandOver, Kill, KillEverything, Notice, Start, Terminate, Tried
from launch.local_job.child import ProcessTable
from launch.local_job.display import View
from launch.local_job.lifecycle import JobLifecycle, Phase
from launch.local_job.specs import JobSpecs
from launch.observation.http_json import Operator, post_json
from launch.observation.observer import Observer
from launch.run_directory.kept_settings import keep
from launch.run_directory.open_run import OpenRun
from launch.run_directory.rundir import checkpoints, restart_outcome_file, take_restart_order

log = logging.getLogger(__name__)

TICK_S = 0.1
_KEEP_AGAIN_S = 10.0


class LocalJob:
    """One job from start to end: call `run()` once. `num_stops`: the number of stop signals so far."""

    def __init__(
        self, run: OpenRun, *, view: View, num_stops: Callable[[], int], specs: JobSpecs | None = None
    ) -> None:
        """`specs`: the specs of the job's processes; by default those of a run.

        Raises ConfigError if the run has keys and the operator's token is not on this machine.
        """
        self._run, self._paths, self._view, self._num_stops = run, run.paths, view, num_stops
        self._unkept: Callable[[], None] | None = run.keep_settings
        """Writes the settings of the job into `config.yaml`, once they have worked."""
        self._keep_due_s = 0.0
        self._order_ids: list[str] = []
        """Orders of a new trainer since the last outcome."""
        self._drain_code = run.config.daemon.exit_code_on_drain
        self._operator = Operator(run.config.security, run.paths.endpoints)
        self._observer = Observer(run.paths, operator=self._operator)
        self._processes = ProcessTable(run.paths, lock_fd=run.lock_fd)
        self._lifecycle = JobLifecycle(
            run.config,
            specs=specs or JobSpecs(run.config, config_path=run.config_file),
            last_words=self._processes.last_words,
            now_s=time.monotonic(),
        )

    @property
    def failure(self) -> list[str]:
        """The reason for a failure, in lines for the user; empty when the run did not fail."""
        return self._lifecycle.outcome.failure

    @property
    def is_finished(self) -> bool:
        """True when all steps of the run are done."""
        return self._lifecycle.outcome.is_finished

    @property
    def has_begun(self) -> bool:
        """True once all daemons have been ready at the same time."""
        return self._lifecycle.has_begun

    def run(self) -> int:
        """Runs the job; returns its exit code.

        0: finished; `daemon.exit_code_on_drain`: drained; 1: failed; 2: user error.
        """
        self._observer.start()
        try:
            self._carry_out(self._lifecycle.start(has_model=is_built(self._run.config)))
            while not self._lifecycle.is_over:
                self._advance()
                time.sleep(TICK_S)
        finally:
            self._processes.kill_everything()
            self._observer.close()
            for left in self._paths.endpoints.glob("*.json"):  # left by daemons that were killed
                left.unlink(missing_ok=True)  # a server that joined removes its own
        outcome = self._lifecycle.outcome
        if outcome.exit_code:
            return outcome.exit_code
        # A short run may train, and even end, before a poll sees that it is ready.
        if outcome.is_finished or max(checkpoints(self._paths), default=0) > self._run.first_step:
            self._keep_settings()
        log.info("the run is %s", "finished" if outcome.is_finished else "drained")
        return 0 if outcome.is_finished else self._drain_code

    def _advance(self) -> None:
        lifecycle = self._lifecycle
        self._carry_out(lifecycle.stop_requested(self._num_stops(), now_s=time.monotonic()))
        for name in lifecycle.by_exit_priority(self._processes.names):
            # None: the process runs, or an earlier exit in this loop caused it to be killed.
            if (ended := self._processes.reap(name)) is not None:
                self._carry_out(lifecycle.exited(ended, now_s=time.monotonic()))
        seen = self._observer.newest
        if lifecycle.phase is Phase.RUNNING and (order := take_restart_order(self._paths)) is not None:
            if order.role == "trainer":
                self._order_ids.append(order.order_id)
                self._carry_out(lifecycle.replace_trainer(order.settings, seen=seen))
            else:
                self._carry_out(lifecycle.replace(order.role, now_s=time.monotonic()))
        self._carry_out(lifecycle.tick(seen, now_s=time.monotonic(), now_unix_s=time.time()))
        if lifecycle.has_begun:
            self._keep_settings()
        if lifecycle.phase is Phase.RUNNING:
            self._observer.slow_down()
        self._view.update(seen, phase=lifecycle.phase, detail=self._detail())

    def _keep_settings(self) -> None:
        """Writes the settings of the job into config.yaml; if the disk is full, tries again later."""
        if self._unkept is None or time.monotonic() < self._keep_due_s:
            return
        try:
            self._unkept()
        except OSError as error:
            self._keep_due_s = time.monotonic() + _KEEP_AGAIN_S
            log.warning("%s does not have the settings of this job yet: %s", self._paths.config, error)
        else:
            self._unkept = None

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Start():
                    self._start(action)
                case Terminate(name):
                    self._processes.terminate(name)
                case Kill(name):
                    self._processes.kill(name)
                case KillEverything():
                    self._processes.kill_everything()
                case HandOver(address):
                    self._hand_over(address)
                case Tried():
                    self._end_trial(action)
                case Notice(text):
                    log.info("%s", text)
                    self._view.notice(text)

    def _start(self, action: Start) -> None:
        spec = action.spec
        if action.from_newest_checkpoint:
            # Without a checkpoint the trainer starts at step 0, with the groups in the ledger.
            resume = "resume=latest" if checkpoints(self._paths) else "resume=''"
            spec = spec.with_settings([resume])
        self._processes.start(spec)

    def _hand_over(self, address: str | None) -> None:
        try:
            if address is None:
                raise ConnectionError("the trainer is still starting")
            post_json(address, "/control/hand_over", {}, operator=self._operator)
        except (OSError, HTTPException, ConfigError) as error:
            log.warning("no response to the hand-over request (%s): sending the stop signal", error)
            self._processes.terminate("trainer")

    def _end_trial(self, tried: Tried) -> None:
        """Writes the outcome for the command that ordered the restart; settings that worked are kept."""
        refusal = tried.refusal
        if refusal is None:
            settings = load_config(["--config", str(self._run.config_file), *tried.settings])
            settings = settings.with_resolved_objective()

            def write() -> None:
                keep(settings, self._paths, by="restart")
                save_config(settings, self._run.config_file)  # daemons that are started again read it

            self._unkept, self._keep_due_s = write, 0.0
            self._keep_settings()
        reason = "" if refusal is None else refusal.complaint or " | ".join(refusal.last_words[-3:])
        outcome = {
            "order_ids": self._order_ids,
            "exit_code": 0 if refusal is None else 2 if refusal.code == 2 else 1,
            "reason": "" if refusal is None else f"{refusal.description}: {reason}",
        }
        try:
            write_json(restart_outcome_file(self._paths), outcome)
        except OSError as error:
            log.warning("the outcome of the restart was not written: %s", error)
        self._order_ids = []

    def _detail(self) -> str:
        """A short text about what the current phase waits for."""
        if self._lifecycle.phase is not Phase.PREPARING:
            return self._lifecycle.waiting_for(self._observer.newest)
        # Removes the time and the logger's name from a log line.
        return re.sub(r"^\S+ [\d:,]+ [\w.]+: ", "", self._processes.last_line("prepare_model"))
