"""docs/reference/metrics.md lists all columns of a metrics row and all Prometheus series, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry

from areal_like.runtime.metrics import PREFIX, Metrics
from buffer.diagnosis.facts import WaitLimits
from buffer.diagnosis.life_times import LifeTimes
from buffer.diagnosis.watchdog import Watchdog
from buffer.service.prometheus import BufferSeries
from rollout_server.metrics import ServerStats
from rollout_server.router.metrics import RouterSeries
from rollout_server.scoring.metrics import ScorerSeries
from tests.support.launching import ROOT
from tests.support.part_groups import example_step
from tests.support.trainer_helpers import random_groups, write_model
from tests.support.trainer_ranks import make_runner
from trainer.distributed.ranks import Ranks
from trainer.metrics.lag import LagTally
from trainer.metrics.prometheus import GpuMemory, TrainerSeries
from trainer.metrics.run_files import step_row
from trainer.objectives import OBJECTIVES

PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
LEADER_COLUMNS = {
    "max_staleness",
    "freeze_s",
    "push_s",
    "weights_version",
    "weights_step",
    "weight_check_abs",
    "eval_reward",
    "tokens_generated",
    "generation_busy_s",
    "generation_idle_s",
}
"""Columns that rank 0 adds in a running job (tests/launch/test_run.py checks them)."""

GOLD_COLUMNS = {"reward_gold_mean"}
"""Columns of runs with `task.gold_reward` (tests/jobs/test_scorer_job.py checks them)."""

STEP_COLUMNS = {"steps_per_sample", "step_reward_mean"}
"""Columns of samples with rewards of steps (tests/jobs/test_process_rewards_job.py checks them)."""

LORA_COLUMNS = {"lora_lost_updates"}
"""Columns of runs with `model.lora` (tests/jobs/test_lora_job.py checks them)."""

ROUTE_COLUMNS = {"router_disagreement", "unrouted_share", "routes_missing", "routes_malformed"}
"""Columns of runs with `model.router_replay` (tests/trainer/test_router_replay.py checks them)."""

DEVICE_COLUMNS = {"mfu", "mfu_compute", "memory_reserved_peak_gb"}
"""Columns of ranks whose device has a known peak, or is a GPU (tests/trainer/test_speed.py checks them)."""


def named_columns() -> set[str]:
    """Every column: the first cells of the first table's rows."""
    table = PAGE.partition("## Prometheus")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield Ranks.alone()
    dist.destroy_process_group()


def test_every_column_is_on_the_page(tmp_path: Path, ranks: Ranks) -> None:
    path, groups = write_model(tmp_path / "model", "gpt2"), random_groups(3)
    jobs: list[dict[str, Any]] = [{"objective": {"name": name}} for name in OBJECTIVES.names()]
    jobs += [
        {"objective": {"name": "vcpo", "rho_ref": "measured"}},
        {"advantage": {"name": "gae"}, "kl": {"coef": 0.1}},
        {"advantage": {"name": "prime"}},
        {"advantage": {"name": "grpo", "shaping": [{"name": "laconic", "budget_tokens": 2}]}},
    ]
    rows: list[dict[str, Any]] = []
    for step, settings in enumerate(jobs):
        # The samples have version 5, so the first step is on-policy.
        runner = make_runner(path, ranks, settings=settings, balances=step == 0)
        metrics = runner.run(groups, step=5 + step)
        rows.append(step_row(step, metrics | LagTally(4).reduced(ranks)))
    for beyond in ("mask", "ratio"):
        metrics = make_runner(path, ranks, beyond=beyond).run_served(
            example_step(4), step=4, num_groups=4, max_staleness=2
        )
        rows.append(step_row(4, metrics))
    seen = {re.sub(r"_\d+$", "_I", name) for row in rows for name in row}
    others = (
        LEADER_COLUMNS
        | DEVICE_COLUMNS
        | LORA_COLUMNS
        | ROUTE_COLUMNS
        | GOLD_COLUMNS
        | STEP_COLUMNS
        | {"greedy_reward", "reward_baseline"}
    )
    assert seen | others == named_columns()


def series_of(registry: CollectorRegistry) -> set[str]:
    """Names of the series as in a query."""
    families = [family for family in registry.collect() if family.name.startswith(PREFIX)]
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


def test_every_series_is_on_the_page() -> None:
    buffer, server, trainer = Metrics(), Metrics(), Metrics()
    BufferSeries(buffer, max_staleness=4)
    Watchdog(buffer, limits=WaitLimits.of(heartbeat_s=1))
    LifeTimes(buffer, clock=lambda: 0.0)
    nothing = cast(Any, None)  # registering the series does not use the parts
    parts = (
        "buffers",
        "runner",
        "rewards",
        "environments",
        "receiver",
        "engine",
        "gate",
        "supervisor",
        "starvation",
        "book",
    )
    ServerStats(server, **dict.fromkeys(parts, nothing))
    TrainerSeries(trainer)
    trainer.registry.register(GpuMemory(torch.device("cpu")))
    *_, router_text, scorer_text, buffer_text, server_text, trainer_text = re.split(
        r"^\*\*", PAGE, flags=re.M
    )
    scorer, router = Metrics(), Metrics()
    RouterSeries(router)
    ScorerSeries(scorer, num_waiting=lambda: 0, identity="")
    for metrics, text in (
        (router, router_text),
        (scorer, scorer_text),
        (buffer, buffer_text),
        (server, server_text),
    ):
        assert set(re.findall(r"`(areal_\w+)(?:\{[\w,]+\})?`", text)) == series_of(metrics.registry)
    listed = set(re.findall(r"`(areal_trainer_[a-z_]+)(?:\{\w+\})?`", trainer_text))
    gauges = trainer_text.partition("there): ")[2]
    assert listed | {f"areal_trainer_{name}" for name in re.findall(r"`(\w+)`", gauges)} == series_of(
        trainer.registry
    )
