"""Fixtures shared by all tests, and the order in which test files run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.runtime.imports import uncollected

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: its threads would compete with the other workers'

LONGEST_FIRST = (
    "rollout_server/test_server.py",
    "launch/test_scale.py",
    "launch/test_run.py",
    "jobs/test_interval.py",
    "jobs/test_resumption.py",
    "jobs/test_sharded_run.py",
    "trainer/objectives/test_step.py",
    "jobs/test_roles.py",
    "trainer/test_gae.py",
    "launch/test_supervision.py",
    "rollout_server/engine/test_http.py",
    "trainer/test_broadcaster.py",
    "areal_like/test_collective.py",
    "trainer/test_snapshot.py",
    "benchmarks/test_staleness.py",
    "chaos/test_weights.py",
    "jobs/test_rollout_with_buffer.py",
    "trainer/test_checkpoint.py",
    "jobs/test_network.py",
    "chaos/test_kills.py",
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
