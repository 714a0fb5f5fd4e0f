"""Ranks of a trainer with a critic (`critic`) or a reward model of tokens (`prm`) beside its policy, run by
`run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR MODEL SECOND`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import SHARES, last_gradient, main, make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks

CRITIC = {
    "advantage": {"name": "gae", "critic_updates": 2},
    "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"},
}
"""Two critic updates, so that the second starts with a head that is not zero."""
PRIME = {"advantage": {"name": "prime", "beta": 0.5}}
_SETTINGS = {"critic": CRITIC, "prm": PRIME}


def gradients(ranks: Ranks, out_dir: Path, path: str, second: str) -> None:
    """Runs two steps per split of eight groups; writes the last gradients of both models and the metrics."""
    for share, owners in SHARES.items():
        runner = make_runner(
            path, ranks, beta1=0.0, settings=_SETTINGS[second], checkpointing=share == "uneven"
        )
        model = getattr(runner, second)
        assert model is not None
        for step in range(2):
            groups = random_groups(8, seed=step)
            metrics = runner.run(
                [group for group, owner in zip(groups, owners, strict=True) if owner == ranks.rank], step=step
            )
        found = last_gradient(runner), last_gradient(model)
        if ranks.rank == 0:
            for name, gradient in zip(("policy", second), found, strict=True):
                save_file(
                    {k: v.contiguous() for k, v in gradient.items()}, out_dir / f"{share}-{name}.safetensors"
                )
            (out_dir / f"{share}.json").write_text(json.dumps(metrics))


def resume(ranks: Ranks, out_dir: Path, path: str, second: str) -> None:
    """Loads the checkpoint of step 2, runs step 3 with an even split, saves it."""
    runner = make_runner(path, ranks, settings=_SETTINGS[second])
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=path)
    models = {second: getattr(runner, second)}
    checkpoints.load(2, runner.policy, runner.optimizer, ranks, **models)
    runner.run(random_groups(4, seed=2)[ranks.rank :: ranks.world_size], step=2)
    checkpoints.save(3, runner.policy, runner.optimizer, ranks, **models, extra={})
    checkpoints.close()
    ranks.any(True)  # a barrier: rank 0 has written the checkpoint


if __name__ == "__main__":
    main(gradients=gradients, resume=resume)
