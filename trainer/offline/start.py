"""Starts a kind of offline training: `python -m trainer.sft --config FILE key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks, like `python -m trainer`.
The verb of `areal-like` prepares the model and the run's directory first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from areal_like.config import Config
from areal_like.runtime.daemon import DrainSignals
from areal_like.runtime.freed_memory import keep_freed_memory
from areal_like.runtime.imports import uncollected
from trainer.start import start

if TYPE_CHECKING:
    from trainer.offline.kind import OfflineTraining


def start_offline(
    argv: Sequence[str], *, text: str | None, name: str, module: str, kind: Callable[[], OfflineTraining]
) -> int:
    """Runs one rank, or starts all ranks of this machine; returns the exit code.

    `text`: the text of --help. `name`: the name of the daemon. `module`: started as each rank. `kind`:
    imports torch and returns the kind of training.
    """

    def run_rank(config: Config) -> bool:
        """Returns True if the run is finished, False after a drain."""
        started_s = time.monotonic()
        with uncollected():
            import torch

            from areal_like.automatic_settings import resolved, threads_alone
            from trainer.distributed.process_group import device_of, joined_ranks
            from trainer.offline.run import OfflineRun
            from trainer.trackers import build_trackers

            training = kind()
        config = resolved(config)
        build_trackers(config.trackers)  # reports a missing package
        torch.set_num_threads(threads_alone(config))
        stopping = threading.Event()
        DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=stopping.set)
        device = device_of(config)
        if device.type == "cpu":
            keep_freed_memory()  # `StepSpeed` returns it
        with joined_ranks(config, device) as ranks:
            run = OfflineRun(training, config, ranks, stopping=stopping, started_s=started_s)
            run.run()
            return run.is_finished

    return start(argv, text=text, name=name, module=module, run_rank=run_rank)
