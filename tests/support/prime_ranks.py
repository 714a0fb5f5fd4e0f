"""Ranks of a trainer with `advantage=prime`, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR MODEL`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import SHARES, last_gradient, main, make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks

SETTINGS = {"advantage": {"name": "prime", "beta": 0.5}}


def gradients(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Runs two steps per split of eight groups; writes the last gradients of both models and the metrics."""
    for share, owners in SHARES.items():
        runner = make_runner(path, ranks, beta1=0.0, settings=SETTINGS, checkpointing=share == "uneven")
        assert runner.prm is not None
        for step in range(2):
            groups = random_groups(8, seed=step)
            metrics = runner.run(
                [group for group, owner in zip(groups, owners, strict=True) if owner == ranks.rank], step=step
            )
        found = last_gradient(runner), last_gradient(runner.prm)
        if ranks.rank == 0:
            for name, gradient in zip(("policy", "prm"), found, strict=True):
                save_file(
                    {k: v.contiguous() for k, v in gradient.items()}, out_dir / f"{share}-{name}.safetensors"
                )
            (out_dir / f"{share}.json").write_text(json.dumps(metrics))


def resume(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Loads the checkpoint of step 2, runs step 3 with an even split, saves it."""
    runner = make_runner(path, ranks, settings=SETTINGS)
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=path)
    checkpoints.load(2, runner.policy, runner.optimizer, ranks, prm=runner.prm)
    runner.run(random_groups(4, seed=2)[ranks.rank :: ranks.world_size], step=2)
    checkpoints.save(3, runner.policy, runner.optimizer, ranks, prm=runner.prm, extra={})
    checkpoints.close()
    ranks.any(True)  # a barrier: rank 0 has written the checkpoint


if __name__ == "__main__":
    main(gradients=gradients, resume=resume)
