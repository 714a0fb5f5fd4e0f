"""Ranks of a real trainer with methods that remember earlier steps, run by `run_ranks`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import main, make_runner
from trainer.distributed.ranks import Ranks


def baselines(ranks: Ranks, out_dir: Path, path: str, settings: str) -> None:
    """Runs two steps of single samples; every rank writes what its advantage estimator remembers."""
    runner = make_runner(path, ranks, settings=json.loads(settings))
    for step in range(2):
        groups = random_groups(4, group_size=1, seed=step)
        runner.run(groups[ranks.rank :: ranks.world_size], step=step)
    (out_dir / f"baseline-{ranks.rank}.json").write_text(json.dumps(runner.advantages.state))


if __name__ == "__main__":
    main(baselines=baselines)
