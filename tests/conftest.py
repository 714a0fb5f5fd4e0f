"""What files of tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which a model is built once for all jobs of all tests, whichever process runs them."""
    base = tmp_path_factory.getbasetemp()
    return {"XDG_CACHE_HOME": str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")}
