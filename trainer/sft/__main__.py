"""Starts supervised training: `python -m trainer.sft --config FILE key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks, like `python -m trainer`.
`areal-like sft` prepares the model and the run's directory first.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from areal_like.config import Config
from areal_like.runtime.daemon import DrainSignals
from areal_like.runtime.imports import uncollected
from trainer.start import start


def main(argv: Sequence[str]) -> int:
    return start(argv, text=__doc__, name="sft", module="trainer.sft", run_rank=_run)


def _run(config: Config) -> bool:
    """Returns True if the run is finished, False after a drain."""
    started_s = time.monotonic()
    with uncollected():
        import torch

        from areal_like.automatic_settings import resolved
        from trainer.distributed.process_group import device_of, joined_ranks
        from trainer.sft.run import SupervisedRun
        from trainer.trackers import build_trackers

    config = resolved(config)
    build_trackers(config.trackers)  # reports a missing package
    torch.set_num_threads(config.trainer.num_threads)
    stopping = threading.Event()
    DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=stopping.set)
    with joined_ranks(config, device_of(config)) as ranks:
        run = SupervisedRun(config, ranks, stopping=stopping, started_s=started_s)
        run.run()
        return run.is_finished


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
