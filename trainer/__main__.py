"""Starts the trainer: `python -m trainer key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks (`distributed/spawn.py`),
on several machines those of this one (`trainer.num_hosts`). torchrun can start them instead: `torchrun ... -m
trainer key=value ...`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from areal_like.errors import UserError
from areal_like.runtime.command_line import load_config, shows_help
from areal_like.runtime.imports import uncollected
from areal_like.runtime.process import die_with_launcher, die_with_parent, early_signals, exit_at_once
from trainer.distributed.spawn import start_ranks_of
from trainer.distributed.variables import set_torch_variables


def main(argv: Sequence[str]) -> int:
    """Runs the trainer; returns the exit code."""
    if shows_help(argv, __doc__):
        return 0
    early_signals()
    try:
        config = load_config(argv)
        early_signals(config.daemon.exit_code_on_drain)
    except UserError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return 2
    set_torch_variables(config)
    if "RANK" in os.environ:
        die_with_parent()
    else:
        die_with_launcher()
        os.environ.setdefault("OMP_NUM_THREADS", str(config.trainer.num_threads))
        if config.trainer.world_size > 1:
            return start_ranks_of(config, argv)
    with uncollected():
        from trainer.rank_process import run_rank

    code = run_rank(config)
    if code == 1 and "RANK" in os.environ:
        exit_at_once(code)  # after a broken collective torch may abort the process as it ends
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
