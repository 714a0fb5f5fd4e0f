"""One rank of the trainer: the loop around the step.

    load -> (resume) -> evaluate -> { groups -> step -> complete -> offer weights -> checkpoint } * -> evaluate -> books
                                                                                     (written behind it: commit)

Rank 0 alone talks about steps, versions and commits; every rank fetches its own groups. The ranks decide together before each step
whether to go on, because a signal reaches them at different times. A drain finishes the step it is in (or gives it up when no
servers are left to fill it), waits for its checkpoint and the commit, closes admission, and exits 0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from areal_like.config import Config
from areal_like.errors import ConfigError, UserError
from areal_like.paths import RunPaths, model_path
from areal_like.runtime.daemon import DrainSignals, exit_code_of
from areal_like.runtime.logs import configure_logging
from areal_like.weights.snapshots_on_disk import VERSION_KEY
from trainer.buffer_client.client import BufferLink, StopRequestedError
from trainer.checkpoint import Checkpoints, remove_partials
from trainer.distributed.process_group import device_of, join_ranks
from trainer.distributed.ranks import Ranks
from trainer.leader import Leader
from trainer.metrics.lag import LagTally
from trainer.models.policy import build_policy
from trainer.step.recipe import Recipe
from trainer.step.runner import IncompleteStepError, StepRunner
from trainer.weight_sync.snapshot import Snapshot, WeightSnapshotter

log = logging.getLogger(__name__)


class Trainer:
    """One rank. `run` returns when the run is finished or drained, and raises when it cannot go on."""

    def __init__(self, config: Config, link: BufferLink, ranks: Ranks, *, started_s: float) -> None:
        self._config = config
        self._link = link
        self._ranks = ranks
        self._started_s = started_s
        self._paths = RunPaths.of(config)
        self._leads = ranks.rank == 0
        link.state = "loading"
        source = model_path(config)
        self._policy = build_policy(config, source, ranks)
        self._runner = StepRunner.of(config, self._policy, ranks, initial=source)
        self._freezer = WeightSnapshotter(
            self._policy, ranks, bucket_bytes=config.weights.bucket_bytes, dtype=config.model.dtype
        )
        self._freeze_s = 0.0
        self._checkpoints = Checkpoints(
            self._paths.checkpoints, keep=config.trainer.keep_checkpoints, tokenizer_path=source
        )
        self._step, self._stream = self._resume()
        self._saved_step = self._step
        link.step = self._step
        self._leader = Leader(config, link, step=self._step, started_s=started_s) if self._leads else None
        link.runtime.status = self._status
        self._hands_over = False
        link.runtime.verbs["hand_over"] = self._hand_over

    def run(self) -> None:
        """The whole run."""
        with contextlib.closing(self._checkpoints):
            self._begin()
            while self._step < self._config.trainer.num_steps and not self._ranks.any(
                self._link.stop_requested.is_set()
            ):
                try:
                    self._train_step()
                except IncompleteStepError as error:
                    log.warning("draining: %s", error)
                    break
            self._end()

    def _resume(self) -> tuple[int, dict[str, Any]]:
        """(completed steps, state of the prompt stream) of the checkpoint that `resume` names; (0, {}) for a new run."""
        resume = self._config.resume
        if not resume:
            return 0, {}
        step = (
            self._checkpoints.latest(self._ranks) if resume == "latest" else int(resume.removeprefix("step:"))
        )
        if step is None:
            raise ConfigError(f"resume=latest: there is no checkpoint in {self._paths.checkpoints}")
        extra = self._checkpoints.load(
            step, self._policy, self._runner.optimizer, self._ranks, critic=self._runner.critic
        )
        self._runner.rewards.restore(extra["shaping_duals"])
        return step, extra["stream"]

    def _begin(self) -> None:
        snapshot = self._snapshot()
        if self._leader is not None:
            assert snapshot is not None
            is_new = self._leader.claim(self._stream)
            # Not earlier, the buffer may refuse; not later, whoever is started after a death while servers start takes the latest.
            self._checkpoints.set_aside_after(self._step)
            oldest_kept_step = min(self._checkpoints.steps(), default=0)
            self._leader.begin(
                snapshot, is_new=is_new, stream=self._stream, oldest_kept_step=oldest_kept_step
            )
        # No rank may fetch before rank 0 has said where training starts.
        self._ranks.meet()
        self._link.runtime.ready()

    def _train_step(self) -> None:
        step, link, config = self._step, self._link, self._config
        link.state = "training"
        lags = LagTally(config.staleness_cap)
        groups = (lags.counted(group) for group in link.groups(step))
        metrics = self._runner.run(
            groups, step=step, num_groups=config.trainer.groups_per_step, lags=lags.of_tokens
        )
        self._step = link.step = step + 1
        lag_metrics = lags.reduced(self._ranks)
        is_sync = self._step % config.weights.sync_interval == 0 or self._step == config.trainer.num_steps
        snapshot = self._snapshot() if is_sync else None
        if self._leader is not None:
            self._leader.stepped(
                step, metrics | lag_metrics | {"freeze_s": self._freeze_s * is_sync}, snapshot
            )
        if self._step % config.trainer.checkpoint_interval == 0 or self._step == config.trainer.num_steps:
            self._save()

    def _end(self) -> None:
        self._link.state = "draining"
        if self._saved_step < self._step:
            self._save()
        self._checkpoints.wait()  # the last one has no next that would make up for it: here a full disk is an error
        if self._leader is not None:
            finished = self._step == self._config.trainer.num_steps
            self._leader.end(finished=finished, hands_over=self._hands_over and not finished)
        # The other ranks keep their place in the process group until rank 0 is done.
        self._ranks.meet()
        self._freezer.close()

    def _snapshot(self) -> Snapshot | None:
        """The weights of now for the publisher. Collective; only rank 0 gets one."""
        started_s = time.monotonic()
        snapshot = self._freezer.freeze()
        self._freeze_s = time.monotonic() - started_s
        return snapshot

    def _save(self) -> None:
        """A checkpoint of now; when it is on disk its steps are committed: what the ledger calls trained will not be lost.

        One that a full disk prevents commits nothing: its steps stay in the ledger, and the next checkpoint commits them too.
        """
        step, leader = self._step, self._leader
        # The version first: the state of the stream says which is the next.
        version = leader.alloc_version() if leader is not None else 0
        stream = leader.stream_state(step - 1) if leader is not None else {}
        extra = {"stream": stream, "shaping_duals": self._runner.rewards.duals, VERSION_KEY: version}

        def commit(oldest_kept_step: int) -> None:
            assert leader is not None
            leader.commit(step - 1, oldest_kept_step=oldest_kept_step)

        runner = self._runner
        self._checkpoints.save(
            step, self._policy, runner.optimizer, self._ranks, critic=runner.critic, extra=extra, then=commit
        )
        self._saved_step = step

    async def _hand_over(self, _: dict[str, Any]) -> dict[str, Any]:
        """Control verb of rank 0: drains, but leaves the stream open for the trainer that comes next."""
        if self._leader is None:
            raise UserError("rank 0 hands over for all")
        if not self._hands_over:  # a second signal would end us at once
            self._hands_over = True
            os.kill(os.getpid(), signal.SIGTERM)
        return {"handing_over": True}

    def _status(self) -> dict[str, Any]:
        base: dict[str, Any] = {
            "state": self._link.state,
            "step": self._step,
            "num_steps": self._config.trainer.num_steps,
        }
        return base | (self._leader.status() if self._leader is not None else {})


def run_rank(config: Config) -> int:
    """One rank, from start to exit code."""
    name = f"trainer-{os.environ.get('RANK', '0')}"
    configure_logging(config, name)
    return exit_code_of(name, lambda: _run(config))


def _patience_s(config: Config) -> float:
    """Longest that one rank may rightly keep the others: rank 0 for servers and evaluations, any for its groups and a buffer that is
    started again."""
    trainer, num_groups = config.trainer, -(-config.trainer.groups_per_step // config.trainer.world_size)
    leading_s = 2 * (config.rollout.start_timeout_s + config.weights.push_deadline_s + config.eval.timeout_s)
    return (
        leading_s
        + num_groups * trainer.fetch_timeout_s
        + trainer.buffer_timeout_s
        + trainer.collective_timeout_s
    )


def _run(config: Config) -> None:
    started_s = time.monotonic()
    Recipe.of(config).check_stream(config)  # a mistake in the settings is said before anything is loaded
    torch.set_num_threads(config.trainer.num_threads)
    device = device_of(config)
    join_ranks(config, device)
    try:
        ranks = Ranks(device=device, patience_s=_patience_s(config))
        incarnation = torch.tensor([time.time_ns()], dtype=torch.int64)
        dist.broadcast(incarnation, src=0)
        if (
            ranks.rank == 0
        ):  # before the buffer is asked anything: on a full disk it answers when there is space
            remove_partials(RunPaths.of(config).checkpoints)
        link = BufferLink(
            config,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=str(device),
            incarnation=int(incarnation),
        )

        def on_drain() -> None:
            link.stop_requested.set()
            patience = threading.Timer(config.daemon.drain_timeout_s / 3, link.give_up.set)
            patience.daemon = True
            patience.start()

        DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=on_drain)
        with link:
            Trainer(config, link, ranks, started_s=started_s).run()
    except StopRequestedError as stop:
        log.info("%s", stop)
    finally:
        dist.destroy_process_group()
