"""Trains again on the recorded data of a run.

    python -m trainer.replay --recording RUN --config FILE key=value ...

    read the recording -> { recorded groups -> step -> checkpoint now and then } * -> summary

The steps are run by the trainer's `StepRunner`, with the recorded groups at their positions. With the run's
own settings every parameter ends up bitwise equal (on a CPU, with the same number of ranks). With another
objective the same data become more and more off-policy: such a replay is a study of an estimator, not a run
that could have happened.

SIGTERM and SIGINT end the replay after the current step, with a checkpoint. Left out: resuming a stopped
replay, which would take as long as reading the recording up to that step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from areal_like.automatic_settings import compute_dtype, resolved
from areal_like.config import Config
from areal_like.errors import ConfigError, UserError
from areal_like.paths import RunPaths, model_path, write_json
from areal_like.runtime.command_line import load_config
from areal_like.runtime.daemon import exit_code_of
from areal_like.runtime.logs import configure_logging
from areal_like.runtime.process import die_with_launcher, die_with_parent, keep_files_private
from areal_like.runtime.signals import handle_log_signals
from trainer.checkpoint import Checkpoints
from trainer.distributed.process_group import device_of, joined_ranks
from trainer.distributed.ranks import Ranks
from trainer.distributed.spawn import start_ranks
from trainer.metrics.lag import LagTally
from trainer.metrics.run_files import MetricsFile, step_row
from trainer.models.policy import build_policy
from trainer.replay.recording import Recording
from trainer.step.build import build_step_runner
from trainer.step.recipe import StepRecipe

log = logging.getLogger(__name__)


class Replay:
    """One rank of a replay. `run` returns when every recorded step is trained, or after a signal."""

    def __init__(
        self, config: Config, recording: Recording, ranks: Ranks, *, stopping: threading.Event
    ) -> None:
        self._config = config
        self._recording = recording
        self._ranks = ranks
        self._stopping = stopping
        self._started_s = time.monotonic()
        self._paths = RunPaths.of(config)
        source = model_path(config)
        self._policy = build_policy(config, source, ranks)
        self._runner = build_step_runner(config, self._policy, ranks, initial=source)
        self._checkpoints = Checkpoints(
            self._paths.checkpoints,
            keep=config.trainer.keep_checkpoints,
            tokenizer_path=source,
            dtype=compute_dtype(config),
        )
        self._checkpoints.open(ranks)
        self._metrics = MetricsFile(self._paths.metrics, start_step=0) if ranks.rank == 0 else None

    def run(self) -> None:
        """Trains every recorded step up to `trainer.num_steps`."""
        trainer = self._config.trainer
        num_steps = min(
            trainer.num_steps, self._recording.num_whole_steps(groups_per_step=trainer.groups_per_step)
        )
        step = saved_step = 0
        with contextlib.closing(self._checkpoints):
            while step < num_steps and not self._ranks.any(self._stopping.is_set()):
                self._train(step)
                step += 1
                if step % trainer.checkpoint_interval == 0:
                    self._save(step)
                    saved_step = step
            if saved_step < step:
                self._save(step)
            self._checkpoints.wait()
        if self._metrics is not None:
            self._write_summary(finished=step == num_steps)
            self._metrics.close()

    def _train(self, step: int) -> None:
        trainer = self._config.trainer
        lags = LagTally(self._config.staleness_cap)
        positions = range(self._ranks.rank, trainer.groups_per_step, self._ranks.world_size)
        groups = (lags.counted(group) for group in self._recording.groups(step, positions))
        metrics: dict[str, Any] = dict(
            self._runner.run(groups, step=step, num_groups=trainer.groups_per_step, lags=lags.of_tokens)
        )
        lag_metrics = lags.reduced(self._ranks)
        if self._metrics is not None:
            self._metrics.append(step_row(step, metrics | lag_metrics))

    def _save(self, step: int) -> None:
        extra = {"shaping_duals": self._runner.rewards.duals, "stream": {}}
        self._checkpoints.save(step, self._policy, self._runner.optimizer, self._ranks, extra=extra)

    def _write_summary(self, *, finished: bool) -> None:
        assert self._metrics is not None
        totals = self._metrics.totals()
        summary = {
            "finished": finished,
            "steps": totals.num_steps,
            "reward_first": totals.reward_first,
            "reward_last": totals.reward_last,
            "loss_last": totals.loss_last,
            "tokens_trained": totals.tokens_trained,
            "wall_seconds": round(time.monotonic() - self._started_s, 3),
        }
        write_json(self._paths.summary, summary)


def _run(config: Config, root: Path) -> None:
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    config = resolved(config)
    StepRecipe.of(config)  # reports a mistake in the settings before anything is loaded
    torch.set_num_threads(config.trainer.num_threads)
    device = device_of(config)
    with joined_ranks(config, device) as ranks, contextlib.closing(Recording(root)) as recording:
        Replay(config, recording, ranks, stopping=stopping).run()


def main(argv: Sequence[str]) -> int:
    """Runs one rank (under torchrun), or starts all; returns the exit code."""
    args = list(argv)
    try:
        if "--recording" not in args[:-1]:
            raise ConfigError("--recording: name the directory of the run to replay")
        at = args.index("--recording")
        root = Path(args[at + 1])
        config = load_config(args[:at] + args[at + 2 :])
    except UserError as error:
        sys.stderr.write(f"replay: {error}\n")
        return 2
    if "RANK" in os.environ:
        die_with_parent()
    else:
        die_with_launcher()
        if config.trainer.world_size > 1:
            return start_ranks(argv, world_size=config.trainer.world_size, module="trainer.replay")
    name = f"replay-{os.environ['RANK']}" if "RANK" in os.environ else "replay"
    keep_files_private()
    configure_logging(config, name)
    handle_log_signals()
    return exit_code_of(name, lambda: _run(config, root))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
