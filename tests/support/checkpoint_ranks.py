"""Ranks that write and read checkpoints, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR ...`."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_like.errors import CheckpointError, ConfigError, DiskFullError
from tests.support.memory import peak, release_freed_memory, reset_peak
from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import main, make_runner
from trainer.checkpoints import directory
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import MODEL_PREFIX, local, row_range
from trainer.models.policy import Policy
from trainer.optimizer import MOMENTS, ShardedAdamW


def peak_growth(action: Callable[[], Any]) -> int:
    """Bytes by which the resident memory grew during `action`, at its peak."""
    before = reset_peak()
    action()
    return peak() - before


def pattern(name: str, shape: torch.Size, *, first: int, end: int) -> Tensor:
    """Rows [first, end) of a float32 tensor whose every element depends on its place and the name."""
    row = torch.arange(first, end, dtype=torch.float32).view(-1, *[1] * (len(shape) - 1))
    rest = torch.arange(shape[1:].numel(), dtype=torch.float32).view(1, *shape[1:])
    return (row * 7 + rest * 3 + sum(name.encode())) % 1009 / 8


def fill_or_check(policy: Policy, optimizer: ShardedAdamW, ranks: Ranks, *, fill: bool) -> None:
    """Sets every value of weights and moments to its pattern, or asserts that it has it."""
    moments = optimizer.new_moments(num_updates=3) if fill else None
    for own, param in policy.named_parameters():
        first, end = row_range(param.shape, rank=ranks.rank, world_size=ranks.world_size)
        values = {"": local(param.detach())} | (moments[own] if moments else optimizer.moments(own))
        for kind in ("", *MOMENTS):
            want = pattern(f"{kind}{own.removeprefix(MODEL_PREFIX)}", param.shape, first=first, end=end)
            if fill:
                values[kind].copy_(want)
            else:
                assert torch.equal(values[kind], want), (kind, own)


def rows(ranks: Ranks, out_dir: Path, path: str, wide: str, disk: str) -> None:
    """Four ranks save and load: `memory` with a model of 10M parameters, then `failures` with a small one."""
    memory(ranks, out_dir, wide)
    failures(ranks, out_dir, path, Path(disk))


def memory(ranks: Ranks, out_dir: Path, path: str) -> None:
    """A rank's memory may grow by what it holds of the state, and one tensor."""
    release_freed_memory()

    def build() -> tuple[Policy, ShardedAdamW]:
        policy = Policy.build(path).shard(ranks)
        return policy, ShardedAdamW(policy, ranks, lr=1e-3)

    policy, optimizer = build()
    num_owned = sum(shard.numel() for shard in optimizer.shards.values())
    largest = 4 * max(param.numel() for param in policy.parameters())
    fill_or_check(policy, optimizer, ranks, fill=True)
    checkpoints = Checkpoints(
        out_dir / "c", keep=9, tokenizer_path=path, dtype="bfloat16", max_file_bytes=16_000_000
    )

    def save(step: int) -> None:
        checkpoints.save(step, policy, optimizer, ranks, extra={})
        checkpoints.wait()

    # Before this the first use of threads, groups and the tokenizer has taken its memory.
    small = Checkpoints(out_dir / "small", keep=9, tokenizer_path=path)
    small.open(ranks)
    first, again = peak_growth(lambda: save(1)), peak_growth(lambda: save(2))
    assert first < 12 * num_owned + largest, (first, num_owned, largest)
    assert again < largest, f"the second copy took {again} bytes"
    checkpoints.close()
    del optimizer, policy

    policy, optimizer = build()
    checkpoints = Checkpoints(out_dir / "c", keep=9, tokenizer_path=path)
    loading = peak_growth(lambda: checkpoints.load(2, policy, optimizer, ranks))
    # The reader maps up to 32 MiB of a file.
    assert loading < 12 * num_owned + largest + (16 << 20), (loading, num_owned, largest)
    fill_or_check(policy, optimizer, ranks, fill=False)
    ranks.meet()


def failures(ranks: Ranks, out_dir: Path, path: str, disk: Path) -> None:
    """All is well; one rank cannot write; the disk is full; one hangs and then dies."""
    runner = make_runner(path, ranks, dtype=torch.float32)
    runner.run(random_groups(4)[ranks.rank :: 4], step=0)
    root = disk / "c"
    checkpoints = Checkpoints(root, keep=9, tokenizer_path=path, dtype="bfloat16")
    committed: list[int] = []

    def save(step: int) -> None:
        checkpoints.save(
            step, runner.policy, runner.optimizer, ranks, extra={}, on_saved=lambda _: committed.append(step)
        )

    with pytest.raises(ConfigError, match=r"trainer ranks 2 do not see .* share"):
        elsewhere = out_dir / "another_host" if ranks.rank == 2 else root
        directory.check_shared(elsewhere, ranks, visible_s=0.2)
    save(1)
    checkpoints.wait()

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    save(2)
    with pytest.raises(OSError if ranks.rank == 2 else CheckpointError) as caught:
        checkpoints.wait()
    assert ranks.rank == 2 or "rank 2: OSError" in str(caught.value), caught.value
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    ranks.meet()
    assert checkpoints.steps() == [1] and not list(root.glob(".*"))
    ranks.meet()

    filler = disk / "filler"
    if ranks.rank == 0:
        facts = os.statvfs(disk)
        filler.write_bytes(bytes(facts.f_bavail * facts.f_frsize - 24 * 1024))
    ranks.meet()
    save(3)
    save(3)  # a full disk ends no training
    with pytest.raises(DiskFullError, match="step_000003 was not written"):
        checkpoints.wait()
    ranks.meet()
    assert not list(root.glob(".*")), "the space must be free at once"
    ranks.meet()
    if ranks.rank == 0:
        filler.unlink()
    save(4)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4] and committed == ([1, 4] if ranks.rank == 0 else [])
    _lose_a_rank(checkpoints, save, ranks, end=out_dir / "end")


def _lose_a_rank(checkpoints: Checkpoints, save: Callable[[int], None], ranks: Ranks, *, end: Path) -> None:
    """Rank 3 hangs while it writes; rank 0 gives up; then rank 3 dies, and the others notice at once."""
    directory._HURRIED_S = 0.5
    if ranks.rank == 3:

        def hang_and_die(_: int) -> None:
            while not end.exists():
                time.sleep(0.05)
            os._exit(0)

        os.fsync = hang_and_die
        save(5)
        checkpoints.wait()
    save(5)
    time.sleep(1.0)
    if ranks.rank == 0:  # fails for a reason of its own
        with pytest.raises(CheckpointError, match="have not written their parts"):
            checkpoints.close()
        assert not list(checkpoints.path(5).parent.glob(".*"))
    else:
        with pytest.raises(CheckpointError, match="lost during a checkpoint"):
            checkpoints.wait()
    if ranks.rank == 0:
        end.touch()
        time.sleep(1.0)  # it is rank 3 that the others lose
    assert checkpoints.steps() == [1, 4]


if __name__ == "__main__":
    main(rows=rows)
