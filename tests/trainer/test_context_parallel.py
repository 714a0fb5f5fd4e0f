"""Context groups: the ranks of one compute a micro-batch together, and the result is that of one rank."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.support.context_ranks import NUM_STEPS, case_runner, run_steps, weights_of
from tests.support.trainer_helpers import run_ranks
from trainer.distributed.ranks import Ranks

TOKEN: dict[str, Any] = {"settings": {"objective": {"name": "ppo"}}, "entropy_coef": 0.1}
SEQUENCE: dict[str, Any] = {"settings": {"objective": {"name": "tis", "level": "sequence", "cap": 2.0}}}
GEOMETRIC: dict[str, Any] = {"settings": {"objective": {"name": "gspo"}}, "checkpointing": True}
WHOLE_GROUP: dict[str, Any] = {
    "settings": {"objective": {"name": "vcpo", "norms": "proxy"}},
    "budget_tokens": 200,
}
CRITIC: dict[str, Any] = {"settings": {"objective": {"name": "ppo"}, "advantage": {"name": "gae"}}}
KINDS = {"token": TOKEN, "sequence": SEQUENCE, "geometric": GEOMETRIC, "group": WHOLE_GROUP, "critic": CRITIC}
BY_CUT = {"balance", "num_microbatches", "shared_share"}
"""Metrics that depend on the cuts into micro-batches."""


def compare(
    weights: Mapping[str, Tensor],
    metrics: list[dict[str, float]],
    want: Mapping[str, Tensor],
    want_metrics: list[dict[str, float]],
    *,
    error: float = 1e-9,
) -> None:
    assert weights.keys() == want.keys()
    for name, tensor in want.items():
        assert float((weights[name] - tensor).norm()) <= error * float(tensor.norm()), name
    for got_of_step, want_of_step in zip(metrics, want_metrics, strict=True):
        for name in (got_of_step.keys() | want_of_step.keys()) - BY_CUT:
            got, value = got_of_step[name], want_of_step[name]
            both_undefined = math.isnan(got) and math.isnan(value)
            assert both_undefined or math.isclose(got, value, rel_tol=error, abs_tol=error), name


def check_cases(
    folder: Path, ranks: Ranks, path: str, cases: list[dict[str, Any]], *, world_size: int, size: int
) -> None:
    """The cases on ranks in context groups of `size` give what one rank gives."""
    run_ranks(
        "cases",
        str(folder),
        str(size),
        path,
        json.dumps(cases),
        world_size=world_size,
        module="tests.support.context_ranks",
    )
    for index, case in enumerate(cases):
        runner = case_runner(path, ranks, {**case, "balances": False})
        want_metrics = run_steps(runner, ranks, range(NUM_STEPS))
        got = json.loads((folder / f"{index}.json").read_text())
        compare(load_file(folder / f"{index}.safetensors"), got, weights_of(runner), want_metrics)


def test_two_ranks_of_a_context_are_one(tmp_path: Path, ranks: Ranks, path: str) -> None:
    check_cases(tmp_path, ranks, path, list(KINDS.values()), world_size=2, size=2)
