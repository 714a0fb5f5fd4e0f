"""Trains the recorded steps of a run again, with the groups at their recorded positions."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from areal_like.automatic_settings import resolved
from areal_like.config import Config
from areal_like.paths import RunPaths, model_path, write_json
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.process_group import device_of, joined_ranks
from trainer.distributed.ranks import Ranks
from trainer.metrics.run_files import MetricsFile, step_row
from trainer.models.policy import build_policy
from trainer.replay.recording import Recording
from trainer.step.build import build_step_runner
from trainer.step.recipe import StepRecipe
from trainer.step.runner import StepRunner


def replay(
    config: Config,
    recording: Recording,
    ranks: Ranks,
    *,
    stopping: threading.Event,
    follows_changes: bool = True,
) -> StepRunner:
    """Trains every recorded step up to `trainer.num_steps` on one rank, or until `stopping`. Collective.

    `follows_changes`: each step has the learning rate that it had, not the configured one.
    """
    trainer, paths, source = config.trainer, RunPaths.of(config), model_path(config)
    started_s = time.monotonic()
    learning_rates = recording.learning_rates() if follows_changes else []
    policy = build_policy(config, source, ranks)
    runner = build_step_runner(config, policy, ranks, initial=source)
    checkpoints = Checkpoints.of(config)
    checkpoints.open(ranks)
    metrics = MetricsFile(paths.metrics, start_step=0) if ranks.rank == 0 else None
    num_steps = min(trainer.num_steps, recording.num_whole_steps(groups_per_step=trainer.groups_per_step))

    def save(step: int) -> None:
        checkpoints.save(step, ranks=ranks, extra={**runner.state(), "stream": {}}, **runner.saved)

    step = 0
    with contextlib.closing(checkpoints):
        while step < num_steps and not ranks.any(stopping.is_set()):
            row = train_recorded_step(
                config, recording, runner, ranks, step=step, learning_rates=learning_rates
            )
            if metrics is not None:
                metrics.append(step_row(step, row))
            step += 1
            if step % trainer.checkpoint_interval == 0:
                save(step)
        if checkpoints.saved_step < step:
            save(step)
        checkpoints.wait()
    if metrics is not None:
        totals = metrics.totals()
        summary = {
            "finished": step == num_steps,
            "steps": totals.num_steps,
            "reward_first": totals.reward_first,
            "reward_last": totals.reward_last,
            "loss_last": totals.loss_last,
            "tokens_trained": totals.tokens_trained,
            "wall_seconds": round(time.monotonic() - started_s, 3),
        }
        write_json(paths.summary, summary)
        metrics.close()
    return runner


def train_recorded_step(
    config: Config,
    recording: Recording,
    runner: StepRunner,
    ranks: Ranks,
    *,
    step: int,
    learning_rates: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    """Trains one recorded step; returns its metrics. Collective.

    `learning_rates`: (first step, rate), as `Recording.learning_rates`; earlier steps have the configured
    rate.
    """
    changed = [lr for first_step, lr in learning_rates if first_step <= step]
    runner.optimizer.lr = changed[-1] if changed else config.trainer.lr
    num_groups = config.trainer.groups_per_step
    groups = recording.groups(step, ranks.share_of(num_groups))
    return runner.run_served(groups, step=step, num_groups=num_groups, max_staleness=config.staleness_cap)


def run(config: Config, root: Path, *, follows_changes: bool) -> None:
    """Runs this process's rank of a replay of the run in `root`; SIGTERM and SIGINT end it after a step."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    config = resolved(config)
    StepRecipe.of(config)  # reports a mistake in the settings before the model is loaded
    torch.set_num_threads(config.trainer.least_threads)
    device = device_of(config)
    with joined_ranks(config, device) as ranks, contextlib.closing(Recording(root)) as recording:
        replay(config, recording, ranks, stopping=stopping, follows_changes=follows_changes)
