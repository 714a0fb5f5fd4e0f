"""Ranks of a real trainer with methods that remember earlier steps, run by `run_ranks`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.support.part_groups import example_step
from tests.support.trainer_helpers import flattened, mixed_groups, random_groups, without_measured
from tests.support.trainer_ranks import main, make_runner
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import gather, shards_of


def baselines(ranks: Ranks, out_dir: Path, path: str, settings: str) -> None:
    """Runs two steps of single samples; every rank writes what its advantage estimator remembers."""
    runner = make_runner(path, ranks, settings=json.loads(settings))
    for step in range(2):
        groups = random_groups(4, group_size=1, seed=step)
        runner.run(groups[ranks.rank :: ranks.world_size], step=step)
    (out_dir / f"baseline-{ranks.rank}.json").write_text(json.dumps(runner.advantages.state))


def lagging(ranks: Ranks, out_dir: Path, path: str, settings: str) -> None:
    """Trains three steps; writes the gathered weights of the proximal policy and the losses."""
    runner = make_runner(path, ranks, settings=json.loads(settings))
    losses = []
    for step in range(3):
        groups = random_groups(4, seed=step)
        losses.append(runner.run(groups[ranks.rank :: ranks.world_size], step=step)["loss"])
    assert runner.proximal is not None
    weights = {name: tensor.clone() for name, tensor in gather(shards_of(runner.proximal.model))}
    if ranks.rank == 0:
        save_file(weights, out_dir / "proximal.safetensors")
        (out_dir / "losses.json").write_text(json.dumps(losses))


def references(ranks: Ranks, out_dir: Path, path: str, settings: str) -> None:
    """Runs two steps of fresh and older samples; every rank writes its state."""
    runner = make_runner(path, ranks, settings=json.loads(settings))
    for step in (1, 2):
        runner.run(mixed_groups(step)[ranks.rank :: ranks.world_size], step=step)
    (out_dir / f"reference-{ranks.rank}.json").write_text(json.dumps(runner.state()))


def parts(ranks: Ranks, out_dir: Path, path: str, settings: str, beyond: str) -> None:
    """Trains two steps of whole groups and parts, streamed and balanced; every rank writes its state and the
    last metrics of both."""
    results = []
    for balances in (False, True):
        runner = make_runner(
            path, ranks, settings=json.loads(settings), beyond=beyond, balances=balances, budget_tokens=30
        )
        for step in (4, 5):
            mine = example_step(step)[ranks.rank :: ranks.world_size]
            metrics = runner.run_served(mine, step=step, num_groups=4, max_staleness=2)
        results.append([runner.state(), flattened(without_measured(metrics))])
    (out_dir / f"parts-{ranks.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(baselines=baselines, lagging=lagging, parts=parts, references=references)
