"""What files of tests share, and the order in which they are run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LONGEST_FIRST = (
    *("test_rollout_server.py", "test_scale.py", "test_launch_run.py", "test_interval.py", "test_resumption.py", "test_replay.py"),
    *("test_sharded_run.py", "test_objectives_step.py", "test_roles.py", "test_gae.py", "test_launch_supervision.py"),
    *("test_engine_http.py", "test_broadcaster.py", "test_collective.py", "test_snapshot.py", "test_staleness_benchmark.py"),
    *("chaos/test_weights.py", "test_rollout_with_buffer.py", "test_trainer_checkpoint.py", "test_network.py", "chaos/test_kills.py"),
)
"""By what they took on two cores: started last, one of them would be run by one process while the other has nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, the others as they were found."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which a model is built once for all jobs of all tests, whichever process runs them."""
    base = tmp_path_factory.getbasetemp()
    return {"XDG_CACHE_HOME": str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")}
