"""`python -m trainer key=value ...` on one machine, `torchrun ... -m trainer key=value ...` anywhere.

Without torchrun's environment this process becomes torchrun for `trainer.world_size` ranks, and turns its outcome into our exit codes:
a rank's own code when one failed, 0 after a drain that every rank finished.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from areal_like.cli import load_config
from areal_like.config import Config
from areal_like.errors import UserError
from areal_like.paths import RunPaths
from areal_like.process import die_with_launcher, die_with_parent


def main(argv: Sequence[str]) -> int:
    """Runs the trainer; returns the exit code."""
    try:
        config = load_config(argv)
    except UserError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return 2
    if "RANK" in os.environ:
        die_with_parent()
        from trainer.daemon import run_rank

        return run_rank(config)
    die_with_launcher()
    return _torchrun(config, argv)


def _torchrun(config: Config, argv: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    endpoints = RunPaths.of(config).endpoints
    for left in endpoints.glob("trainer-*"):  # of ranks that were killed
        left.unlink()
    os.environ.setdefault("OMP_NUM_THREADS", str(config.trainer.num_threads))
    ranks = ["--standalone", f"--nproc-per-node={config.trainer.world_size}", "--local-addr=127.0.0.1"]
    try:
        torchrun([*ranks, "-m", "trainer", *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        # Torchrun does not say how its ranks ended: one that was killed has left its endpoint file, one that failed a mark.
        return 1 if list(endpoints.glob("trainer-*")) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
