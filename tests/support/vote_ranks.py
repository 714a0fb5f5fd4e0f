"""Ranks that train on samples of several segments, run by `run_ranks`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.support import votes
from tests.support.trainer_ranks import last_gradient, main, make_runner
from trainer.distributed.ranks import Ranks


def gradients(ranks: Ranks, out_dir: Path, path: str, objectives: str) -> None:
    """One step for each objective, division of the groups and budget; writes gradient and metrics."""
    groups = votes.branching_groups()
    for number, objective in enumerate(json.loads(objectives)):
        for share in ("even", "one-sided", "balanced"):
            for budget_tokens in (60, 12):
                runner = make_runner(
                    path,
                    ranks,
                    beta1=0.0,
                    settings={"objective": objective, "advantage": {"name": "dr_grpo"}},
                    balances=share == "balanced",
                    budget_tokens=budget_tokens,
                )
                mine = groups[ranks.rank :: 2] if share != "one-sided" else [[], groups][ranks.rank]
                metrics = runner.run(mine, step=7)
                gradient = last_gradient(runner)
                if ranks.rank == 0:
                    out = out_dir / f"{number}-{share}-{budget_tokens}.safetensors"
                    save_file({name: value.contiguous() for name, value in gradient.items()}, out)
                    out.with_suffix(".json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(gradients=gradients)
