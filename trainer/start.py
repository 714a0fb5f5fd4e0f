"""Starts and ends a process of the trainer or of supervised training.

    command line -> settings -> one rank, or the parent of all ranks of this machine -> exit code

With `trainer.world_size` > 1 the process starts the ranks (`distributed/spawn.py`); with several machines
(`trainer.num_hosts`) the ranks of this machine. torchrun can start them instead. This module does not import
torch: the ranks do, after the variables that torch reads are set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from areal_like.config import Config
from areal_like.errors import UserError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_role_config, shows_help
from areal_like.runtime.daemon import exit_code_of
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


def start(
    argv: Sequence[str], *, text: str | None, name: str, module: str, run_rank: Callable[[Config], bool]
) -> int:
    """Runs one rank, or starts all ranks of this machine; returns the exit code.

    `text`: the text of --help. `name`: the name of the daemon. `module`: started as each rank. `run_rank`:
    returns True if the run is finished, False after a drain.
    """
    if shows_help(argv, text):
        return 0
    early_signals()
    try:
        config = load_role_config(argv)
        early_signals(config.daemon.exit_code_on_drain)
    except UserError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 2
    set_torch_variables(config)
    if "RANK" in os.environ:
        die_with_parent()
    else:
        die_with_launcher()
        os.environ.setdefault("OMP_NUM_THREADS", str(config.trainer.least_threads))
        if config.trainer.world_size > 1:
            return start_ranks_of(config, argv, module=module)
    code = run_to_end(config, f"{name}-{os.environ.get('RANK', '0')}", run_rank)
    if code in (1, 2) and "RANK" in os.environ:
        exit_at_once(code)  # after a broken collective torch may abort the process at its exit, or wait
    return code


def run_to_end(config: Config, name: str, run: Callable[[Config], bool]) -> int:
    """Runs a daemon's work with its log and signals; returns the exit code.

    `run`: returns True if the run is finished, False after a drain.
    """
    is_finished = False

    def body() -> None:
        nonlocal is_finished
        configure_logging(config, name)
        handle_log_signals()
        is_finished = run(config)

    keep_files_private(RunPaths.of(config).root)
    code = exit_code_of(name, body)
    return code if code or is_finished else config.daemon.exit_code_on_drain
