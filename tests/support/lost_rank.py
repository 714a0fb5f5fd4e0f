"""Ranks of `joined_ranks`, run by `python -m tests.support.lost_rank FOLDER WORLD_SIZE HOW`.

In the third micro-batch of step 7 the last rank is killed (HOW=kill), stopped (stop) or raises (raise). Ranks
are forks, so that torch is imported only once. Each writes `FOLDER/rank-N.log` and exits with 1 if it fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from areal_like.config import Config, TrainerConfig
from areal_like.runtime.process import die_with_parent
from trainer.batching.packing import in_lockstep
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.process_group import joined_ranks
from trainer.distributed.spawn import STORE_FD
from trainer.metrics.speed import PhaseTimer


def main(folder: Path, world_size: int, how: str) -> int:
    """Returns 0 when all ranks have ended."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pids = []
        for rank in range(world_size):
            pids.append(os.fork())
            if not pids[-1]:
                die_with_parent(signum=signal.SIGKILL)
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(listening.getsockname()[1]),
                    STORE_FD: str(listening.fileno() if rank == 0 else -1),
                }
                logging.basicConfig(filename=folder / f"rank-{rank}.log", level=logging.INFO, force=True)
                code = 1
                with contextlib.suppress(RuntimeError):
                    _run_rank(folder, is_last=rank == world_size - 1, how=how)
                    code = 0
                logging.shutdown()
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids[:-1]]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[-1], signal.SIGKILL)
    (folder / "codes").write_text(" ".join(map(str, codes)))
    return 0


def _run_rank(folder: Path, *, is_last: bool, how: str) -> None:
    torch.set_num_threads(1)
    # Only a stopped rank is noticed by a time limit. In the other cases no limit may elapse.
    limit_s = 10.0 if how == "stop" else 60.0
    trainer = TrainerConfig(collective_timeout_s=limit_s, groups_per_step=8)
    config = Config(name="x", runs_dir=str(folder), trainer=trainer)
    with joined_ranks(config, torch.device("cpu"), control_timeout_s=limit_s) as ranks:
        timer = PhaseTimer(("compute_s",), place=ranks.place)
        ranks.place.enter("lockstep", step=7)
        num_microbatches = 0
        for _ in in_lockstep(_endless(), ranks):
            with timer.span("compute_s"):
                num_microbatches += 1
                if is_last and num_microbatches == 3:
                    if how == "raise":
                        raise RuntimeError("CUDA out of memory. Tried to allocate 4 GiB")
                    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                ranks.sum(torch.ones(3))


def _endless():  # type: ignore[no-untyped-def]
    from trainer.batching import packing

    sample: TrainingSample = packing.DUMMY
    while True:
        yield [sample]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
