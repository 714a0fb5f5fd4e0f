"""Starts supervised training: `python -m trainer.sft --config FILE key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks, as `python -m trainer`
does. `areal-like sft` prepares the model and the run's directory before.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence

from areal_like.config import Config
from areal_like.errors import UserError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config, shows_help
from areal_like.runtime.daemon import DrainSignals, exit_code_of
from areal_like.runtime.imports import uncollected
from areal_like.runtime.logs import configure_logging
from areal_like.runtime.process import (
    die_with_launcher,
    die_with_parent,
    early_signals,
    exit_at_once,
    keep_files_private,
)
from areal_like.runtime.signals import handle_log_signals
from trainer.distributed.spawn import start_ranks_of
from trainer.distributed.variables import set_torch_variables


def main(argv: Sequence[str]) -> int:
    """Runs one rank, or starts all of this machine; returns the exit code."""
    if shows_help(argv, __doc__):
        return 0
    early_signals()
    try:
        config = load_config(argv)
        early_signals(config.daemon.exit_code_on_drain)
    except UserError as error:
        sys.stderr.write(f"sft: {error}\n")
        return 2
    set_torch_variables(config)
    if "RANK" in os.environ:
        die_with_parent()
    else:
        die_with_launcher()
        os.environ.setdefault("OMP_NUM_THREADS", str(config.trainer.num_threads))
        if config.trainer.world_size > 1:
            return start_ranks_of(config, argv, module="trainer.sft")
    code = _run_rank(config)
    if code == 1 and "RANK" in os.environ:
        exit_at_once(code)  # after a broken collective torch may abort the process as it ends
    return code


def _run_rank(config: Config) -> int:
    name = f"sft-{os.environ.get('RANK', '0')}"
    is_finished = False

    def body() -> None:
        nonlocal is_finished
        is_finished = _run(config)

    keep_files_private(RunPaths.of(config).root)
    configure_logging(config, name)
    handle_log_signals()
    code = exit_code_of(name, body)
    return code if code or is_finished else config.daemon.exit_code_on_drain


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
    build_trackers(config.trackers)  # reports a package that is missing
    torch.set_num_threads(config.trainer.num_threads)
    stopping = threading.Event()
    DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=stopping.set)
    with joined_ranks(config, device_of(config)) as ranks:
        run = SupervisedRun(config, ranks, stopping=stopping, started_s=started_s)
        run.run()
        return run.is_finished


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
