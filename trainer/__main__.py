"""Starts the trainer: `python -m trainer key=value ...`.

On several machines it is started by torchrun: `torchrun ... -m trainer key=value ...`.

Without torchrun's environment this process is the only rank, or with `trainer.world_size` > 1 it starts the
ranks (`distributed/spawn.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from areal_like.errors import UserError
from areal_like.runtime.command_line import load_config, shows_help
from areal_like.runtime.imports import uncollected
from areal_like.runtime.process import die_with_launcher, die_with_parent, early_signals
from trainer.distributed.spawn import start_ranks


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
    if "RANK" in os.environ:
        die_with_parent()
    else:
        die_with_launcher()
        os.environ.setdefault("OMP_NUM_THREADS", str(config.trainer.num_threads))
        if config.trainer.world_size > 1:
            drain_code = config.daemon.exit_code_on_drain
            return start_ranks(argv, world_size=config.trainer.world_size, drain_code=drain_code)
    with uncollected():
        from trainer.daemon import run_rank

    return run_rank(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
