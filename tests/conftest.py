"""Fixtures shared by all tests, and the order in which test files run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.runtime.imports import uncollected

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: its threads would compete with the other workers'

# Where the tests run in the background of a script, SIGINT is ignored, and programs that they start would
# ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = (
    "jobs/test_resumption.py",
    "launch/test_supervision.py",
    "launch/test_scale.py",
    "rollout_server/test_server.py",
    "chaos/test_stops.py",
    "trainer/test_broadcaster.py",
    "launch/test_run.py",
    "jobs/test_roles.py",
    "jobs/test_interval.py",
    "attacks/test_keyed.py",
    "areal_like/test_collective.py",
    "jobs/test_keyed_job.py",
    "jobs/test_evaluation_sets.py",
    "jobs/test_sharded_run.py",
    "chaos/test_kills.py",
    "rollout_server/engine/test_weight_intruder.py",
    "launch/test_eval.py",
    "buffer/test_keyed_buffer.py",
    "jobs/test_tool_job.py",
    "jobs/test_curriculum_job.py",
    "launch/test_cli.py",
    "buffer/test_daemon.py",
    "jobs/test_failed_samples.py",
    "benchmarks/test_staleness.py",
    "jobs/test_rollout_with_buffer.py",
    "rollout_server/engine/test_http.py",
    "trainer/planning/test_plan.py",
    "buffer/test_registration.py",
    "trainer/test_gae.py",
    "trainer/test_step.py",
    "trainer/test_daemon.py",
    "trainer/test_snapshot.py",
    "attacks/test_unkeyed.py",
    "trainer/objectives/test_vcpo_gradients.py",
    "jobs/test_network.py",
    "chaos/test_weights.py",
)
"""Slowest first: a slow file that starts last leaves all other workers without work."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """The imports of the test files, as fast as those of a daemon."""
    with uncollected():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs LONGEST_FIRST first and the other files in the order of collection."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with one cache directory for all xdist workers, so that jobs build the tiny model once."""
    base = tmp_path_factory.getbasetemp()
    return {"XDG_CACHE_HOME": str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")}
