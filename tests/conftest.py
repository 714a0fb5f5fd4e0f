"""Fixtures shared by all tests, how they are collected, and the order in which test files run."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from areal_like.runtime.imports import uncollected
from tests.support.selection import ProcessRefusal, is_fast, largest_first

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: its threads would compete with the other workers'

# The first draw of a process takes seconds on a loaded machine, and an example may take any time there.
# `make test` draws the same examples each time, so that it fails only after a change; `make chaos` draws
# new ones.
for name, draws_the_same in (("any machine", True), ("random", False)):
    hypothesis.settings.register_profile(
        name,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        derandomize=draws_the_same,
    )
hypothesis.settings.load_profile("any machine")

# Where the tests run in the background of a script, SIGINT is ignored, and programs that they start would
# ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fast`, see `make test-fast`."""
    parser.addoption("--fast", action="store_true", help="leave out tests that use processes or take long")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """The imports of the test files, as fast as those of a daemon.

    After a change the first worker compiles what has changed, for a dozen seconds, while the others wait for
    its bytecode.
    """
    with (Path(__file__).parent / "__init__.py").open() as lock, uncollected():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the files (selection.py); with --fast, leaves out what is not fast."""
    if config.getoption("--fast"):
        slow = [item for item in items if not is_fast(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if is_fast(item)]
        config.pluginmanager.register(ProcessRefusal())
    items[:] = largest_first(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests of GPUs on a machine that has none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")


@pytest.fixture(scope="module", autouse=True)
def process_group_of_module() -> Iterator[None]:
    """Ends the process group that `Ranks.alone` has left, because files of one process come in any order."""
    yield
    # Most files do not import torch, and would wait for it.
    if (distributed := sys.modules.get("torch.distributed")) is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def processes_of_module() -> Iterator[None]:
    """Ends what a failed test of a file has left, which would slow the others down for as long as it runs."""
    yield
    # By its name: what a fixture names is what every test uses (selection.py).
    if (starter := sys.modules.get("tests.support.warm_start")) is not None:
        starter.end_started()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with one cache directory for all xdist workers, so that jobs build the tiny model once."""
    base = tmp_path_factory.getbasetemp()
    return {"XDG_CACHE_HOME": str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")}
