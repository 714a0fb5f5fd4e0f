"""One rank of the trainer: its process, and the loop around the optimizer step.

    log -> settings checked -> process group joined -> buffers registered with -> `Trainer.run` -> exit code

    load -> (resume) -> evaluate
         -> { groups -> step -> complete -> offer weights -> checkpoint (in a thread: write -> commit) } *
         -> evaluate -> summary

Every rank fetches its own groups; everything else that goes to the buffer is sent by rank 0 (`leader.py`).
Before each step the ranks agree on whether to continue, because a signal reaches them at different times. A
drain finishes the current step, or abandons it: after a third of `daemon.drain_timeout_s`, or at once if a
group is missing and no rollout server is left. It waits for the checkpoint and the commit, closes admission,
and exits with `daemon.exit_code_on_drain`. The ledger serves the groups of an abandoned step again. After the
last step the buffers are told that the run is finished, and the exit code is 0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from areal_like.automatic_settings import compute_dtype, recomputation, resolved
from areal_like.config import Config
from areal_like.config.default_objective import as_setting
from areal_like.errors import ConfigError, RunFinishedError, UserError
from areal_like.paths import RunPaths, model_path
from areal_like.runtime.daemon import DrainSignals
from areal_like.runtime.freed_memory import keep_freed_memory
from areal_like.runtime.process import parent_is_gone
from areal_like.security.binding import require_loopback_or_keys
from areal_like.spans.recorder import record, record_phase
from areal_like.weights.snapshots_on_disk import VERSION_KEY
from trainer.buffer_client.client import StopRequestedError, TrainerBufferClient
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.checkpoints.directory import remove_partials
from trainer.distributed.process_group import device_of, joined_ranks
from trainer.distributed.ranks import IncompleteStepError, Ranks
from trainer.leader import Leader, received, shared
from trainer.metrics.prometheus import GpuMemory
from trainer.models.policy import build_policy
from trainer.profiling.ranges import named_range
from trainer.profiling.recorder import StepRecorder
from trainer.step.build import build_step_runner
from trainer.step.recipe import StepRecipe
from trainer.step.staleness_bounds import staleness_warning
from trainer.trackers import build_trackers
from trainer.weights.backend import check_nccl
from trainer.weights.senders import Senders
from trainer.weights.snapshot import BackgroundGather, BoundaryGather, Snapshot, WeightSnapshotter

log = logging.getLogger(__name__)


class Trainer:
    """One rank of the trainer. `run` returns when the run is finished or drained; on failure it raises."""

    def __init__(
        self, config: Config, buffer: TrainerBufferClient, ranks: Ranks, *, started_s: float
    ) -> None:
        self._config = config
        self._buffer = buffer
        self._ranks = ranks
        buffer.state = "loading"
        source = model_path(config)
        self._checkpoints = Checkpoints.of(config)
        resume_step = self._checkpoints.resume_step(config.resume, ranks)
        is_new = resume_step is None  # else a checkpoint has the weights: reading the initial ones is wasted
        self._policy = build_policy(config, source, ranks, with_weights=is_new)
        self._runner = build_step_runner(config, self._policy, ranks, initial=source, with_weights=is_new)
        gather = BoundaryGather if ranks.device.type == "cuda" else BackgroundGather
        self._snapshotter: WeightSnapshotter = gather(
            self._policy,
            ranks,
            bucket_bytes=config.weights.bucket_bytes_on(ranks.device.type),
            dtype=compute_dtype(config),
            lora=config.weights.lora,
            senders=config.weights.senders,
            delta=config.weights.delta_with(config.rollout.engine),
        )
        if ranks.rank == 0 and config.weights.delta != config.weights.delta_with(config.rollout.engine):
            log.warning(
                "weights.delta=%s has no effect: pushes to %s send all bytes",
                config.weights.delta,
                config.rollout.engine,
            )
        self._snapshotter.num_snapshots = config.weights.snapshots_on(
            ranks.device.type,
            num_bytes=sum(bucket.num_bytes for bucket in self._snapshotter.buckets)
            / len(self._snapshotter.sender_ranks),
        )
        self._senders = Senders(self._snapshotter, ranks, ports=config.weights.ports)
        self._snapshot_s = 0.0
        """Seconds that the last snapshot took."""
        self._checkpoints.open(ranks)
        self._step, self._stream = self._resume(resume_step)
        buffer.step = self._step
        self._started_s = started_s
        self._leader: Leader | None = None
        """On rank 0, from `_begin` on."""
        buffer.runtime.status = self._status
        self._hands_over = False
        buffer.runtime.verbs["hand_over"] = self._hand_over
        self._recorder = StepRecorder.of(buffer.runtime, ranks)
        ranks.place.on_leave = record_phase

    @property
    def is_finished(self) -> bool:
        return self._step >= self._config.trainer.num_steps

    def run(self) -> None:
        """Trains until `trainer.num_steps` or a drain."""
        with contextlib.ExitStack() as closed_at_end:
            closed_at_end.callback(lambda: self._leader.close() if self._leader is not None else None)
            closed_at_end.callback(self._checkpoints.close)
            closed_at_end.callback(self._recorder.close)
            if not self._begin():
                self._close_pushes()
                return
            while self._should_continue():
                try:
                    with self._recorder.step(self._step):
                        self._train_step()
                except IncompleteStepError as error:
                    log.warning("draining: %s", error)
                    break
            self._end()

    def _should_continue(self) -> bool:
        """Collective, called once per step: a drain of one rank ends the loop on all ranks.

        All ranks get an operator's changes of settings.
        """
        if self.is_finished:
            return False
        is_asked = self._buffer.stop_requested.is_set()
        if is_asked and parent_is_gone():
            log.warning("draining: the process that started this rank is gone (torchrun's agent?)")
        is_stopping, numbers = self._recorder.meet(
            self._ranks, stop=is_asked, shared=shared(self._leader.settings if self._leader else None)
        )
        if is_stopping:
            return False
        self._runner.optimizer.lr, is_save_asked = received(numbers)
        if is_save_asked and self._checkpoints.saved_step < self._step:
            self._save()
        return True

    def _resume(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """Loads a checkpoint; returns (completed steps, state of the prompt stream), (0, {}) for a new
        run."""
        if step is None:
            return 0, {}
        extra = self._checkpoints.load(step, ranks=self._ranks, **self._runner.saved)
        if "stream" not in extra:
            raise ConfigError(
                f"{self._checkpoints.path(step)} is a checkpoint of training on rows (such as `sft`): "
                "continue it with the command that started it, or start a new run from it with model.path"
            )
        self._runner.restore(extra)
        return step, extra["stream"]

    def _begin(self) -> bool:
        """Returns False if the run was finished before this trainer started."""
        snapshot = self._take_snapshot()
        if snapshot is not None:  # rank 0
            try:
                self._leader = Leader(
                    self._config,
                    self._buffer,
                    step=self._step,
                    stream=self._stream,
                    push_bytes=sum(bucket.num_bytes for bucket in snapshot.buckets),
                    links=self._senders.links,
                    routes_shape=() if (replay := self._policy.replay) is None else replay.shape,
                    started_s=self._started_s,
                )
            except RunFinishedError as error:
                log.info("%s", error)
                return not self._ranks.any(True)
            self._runner.on_first_forward = self._leader.check_weights
            # Not before the buffer has accepted the start. Not after `begin`, which waits for servers: a
            # trainer that replaces this one in the meantime resumes from the latest checkpoint, which must
            # not be later than this step.
            self._checkpoints.set_aside_after(self._step)
            self._leader.begin(snapshot, oldest_kept_step=min(self._checkpoints.steps(), default=0))
        # No rank may fetch groups before the buffer has received StartTraining, so all ranks meet here.
        if self._ranks.any(False):
            return False
        self._buffer.runtime.ready()
        return True

    def _train_step(self) -> None:
        step, trainer = self._step, self._config.trainer
        self._buffer.state = "training"
        metrics = self._runner.run_served(
            self._buffer.groups(step),
            step=step,
            num_groups=trainer.groups_per_step,
            max_staleness=self._config.staleness_cap,
            is_abandoned=self._buffer.abandon_step.is_set,
        )
        self._step = self._buffer.step = step + 1
        is_last = self._step == trainer.num_steps
        is_sync = is_last or self._step % self._config.weights.sync_interval == 0
        snapshot = self._take_snapshot() if is_sync else None
        metrics["freeze_s"] = self._snapshot_s if is_sync else 0.0
        if is_sync:
            metrics |= self._snapshotter.metrics
        if self._leader is not None:
            self._leader.finish_step(step, metrics, snapshot)
        if is_last or self._checkpoints.is_due(self._step, trainer, self._ranks):
            self._save()

    def _end(self) -> None:
        self._buffer.state = "draining"
        if self._checkpoints.saved_step < self._step:
            self._save()
        self._checkpoints.wait()  # the last one cannot be replaced: a full disk is an error here
        if self._leader is not None:
            finished = self.is_finished
            self._leader.end(finished=finished, hands_over=self._hands_over and not finished)
        # The other ranks stay in the process group until rank 0 is done.
        self._ranks.meet()
        self._close_pushes()

    def _close_pushes(self) -> None:
        """Ends the threads for pushes on all ranks. Collective."""
        self._senders.close()
        self._snapshotter.close()

    def _take_snapshot(self) -> Snapshot | None:
        """The current weights for the publisher; None on ranks other than 0. Collective."""
        started_s = time.monotonic()
        self._ranks.place.enter("snapshot of the weights", step=self._step)
        with named_range("snapshot"):
            snapshot = self._snapshotter.take_snapshot()
        self._ranks.place.enter("between steps")
        self._snapshot_s = time.monotonic() - started_s
        return snapshot

    def _save(self) -> None:
        """Saves a checkpoint. Once it is on disk its steps are committed: they will not be rolled back.

        If a full disk prevents the checkpoint, nothing is committed: its steps stay in the ledger, and the
        next checkpoint commits them too.
        """
        step, leader = self._step, self._leader
        self._ranks.place.enter("checkpoint", step=step)
        started_s = time.monotonic()
        # Allocate the version before reading the stream's state, which contains the number of the next
        # version.
        version = leader.alloc_version() if leader is not None else 0
        stream = leader.stream_state(step - 1) if leader is not None else {}
        extra = {"stream": stream, **self._runner.state(), VERSION_KEY: version}

        def commit(oldest_kept_step: int) -> None:
            assert leader is not None
            leader.commit(step - 1, oldest_kept_step=oldest_kept_step)
            record("checkpoints", f"checkpoint {step}", start_s=started_s)
            took_s, drain_s = time.monotonic() - started_s, self._config.daemon.drain_timeout_s
            if took_s > drain_s / 3:
                log.warning(
                    "the checkpoint of step %d took %.0f s: a drain may be killed before its checkpoint is "
                    "written, and the run then resumes from an older one: raise daemon.drain_timeout_s=%g",
                    step,
                    took_s,
                    drain_s,
                )

        self._checkpoints.save(step, ranks=self._ranks, extra=extra, on_saved=commit, **self._runner.saved)

    async def _hand_over(self, _: dict[str, Any]) -> dict[str, Any]:
        """Control verb of rank 0: drains, but leaves the stream open for the next trainer."""
        if self._ranks.rank > 0:
            raise UserError("hand_over: send this to rank 0, which drains all ranks")
        if not self._hands_over:  # a second signal would end the process at once
            self._hands_over = True
            os.kill(os.getpid(), signal.SIGTERM)
        return {"handing_over": True}

    def _status(self) -> dict[str, Any]:
        base: dict[str, Any] = {
            "state": self._buffer.state,
            "place": str(self._ranks.place),
            "step": self._step,
            "num_steps": self._config.trainer.num_steps,
            "profile": self._recorder.status(),
        }
        return base | (self._leader.status() if self._leader is not None else {})


_CONTROL_TIMEOUT_S = 24 * 3600.0
"""Longest time that a rank lets the others wait in a control message: for groups and evaluations, while the
rollout servers make progress. A rank that stalls raises its own error, and a rank that dies closes its
connections: both end this wait at once."""


def run_rank(config: Config) -> bool:
    """Runs one rank from start to end. Returns True if the run is finished, False after a drain."""
    started_s = time.monotonic()
    config = resolved(config)
    require_loopback_or_keys(config.security, config.weights.host, setting="weights.host")
    recipe = StepRecipe.of(config)
    recipe.check_stream(config)  # reports a mistake in the settings before the model is loaded
    build_trackers(config.trackers)  # reports a missing package
    torch.set_num_threads(config.trainer.least_threads)
    device = device_of(config)
    if device.type == "cpu":
        keep_freed_memory()  # `StepSpeed` returns it
    activations = {True: "recomputed", False: "kept", "selective": "recomputed in part"}[
        recomputation(config)
    ]
    if config.trainer.offload_activations and device.type == "cpu":
        log.warning("trainer.offload_activations has no effect: the trainer is on a CPU")
    log.info("the forward is in %s, activations are %s", config.model.dtype, activations)
    log.info("the objective is %s", as_setting(config.objective))
    if os.environ.get("RANK", "0") == "0":
        check_nccl(config, device)
        if text := staleness_warning(config, recipe.objective):
            log.warning("%s", text)
    with joined_ranks(
        config, device, control_timeout_s=_CONTROL_TIMEOUT_S, quiet=(UserError, StopRequestedError)
    ) as ranks:
        process = torch.tensor(list(secrets.token_bytes(16)), dtype=torch.int64)
        dist.broadcast(process, src=0)
        # Before the first request to the buffer: on a full disk the buffer replies only when there is space
        # again.
        if ranks.rank == 0:
            remove_partials(RunPaths.of(config).checkpoints)
        buffer = TrainerBufferClient(
            config,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=str(device),
            process=bytes(process.tolist()).hex(),
        )

        def on_drain() -> None:
            buffer.stop_requested.set()
            timer = threading.Timer(config.daemon.drain_timeout_s / 3, buffer.abandon_step.set)
            timer.daemon = True
            timer.start()

        DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=on_drain)
        try:
            with buffer:
                buffer.runtime.metrics.registry.register(GpuMemory(device))
                trainer = Trainer(config, buffer, ranks, started_s=started_s)
                trainer.run()
            return trainer.is_finished
        except StopRequestedError as stop:
            log.info("%s", stop)
            return False
