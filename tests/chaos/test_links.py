"""Links that drop, duplicate, reorder, delay and cut messages: no group is lost or trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.chaos.job import check_counters, check_groups, counters_of, running_job, train
from tests.chaos.proxy import Faults

FAULTS = Faults(drop=0.01, duplicate=0.05, reorder=0.05, delay=0.05, cut=0.003)


def run(directory: Path, *, num_steps: int, seed: int) -> None:
    trainer = {"num_steps": num_steps, "groups_per_step": 8, "fetch_timeout_s": 600.0}
    with running_job(directory, faults=FAULTS, seed=seed, trainer=trainer) as job:
        for name in ("rollout-0", "rollout-1"):
            job.produce(name)
        with job.trainer() as client:
            groups = train(client, first=0, last=num_steps)
            job.proxy.faults = Faults()
            counters = counters_of(client)
        check_groups(groups, job.config, first=0, last=num_steps)
        check_counters(counters)
        assert counters.tickets["trained"] == num_steps * 8
        fates = job.proxy.fates
        assert all(fates[fate] for fate in ("dropped", "duplicated", "reordered", "delayed", "cut")), fates
        assert job.buffer.terminate()[0] == 0
        audit = audit_run(job.buffer.paths.root)
        assert audit.is_clean, "\n".join(audit.lines())


def test_faulty_links_lose_and_repeat_nothing(tmp_path: Path) -> None:
    run(tmp_path, num_steps=25, seed=0)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 5))
def test_faulty_links_at_length(tmp_path: Path, seed: int) -> None:
    run(tmp_path, num_steps=1500, seed=seed)
