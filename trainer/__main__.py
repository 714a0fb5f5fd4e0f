"""Starts the trainer: `python -m trainer key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks (`distributed/spawn.py`);
with several machines (`trainer.num_hosts`) it starts the ranks of this machine. torchrun can start them
instead: `torchrun ... -m trainer key=value ...`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from areal_like.config import Config
from areal_like.runtime.imports import uncollected
from trainer.start import start


def main(argv: Sequence[str]) -> int:
    return start(argv, text=__doc__, name="trainer", module="trainer", run_rank=_run_rank)


def _run_rank(config: Config) -> bool:
    with uncollected():
        from trainer.daemon import run_rank

    return run_rank(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
