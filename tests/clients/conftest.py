"""A job for the clients, and the environments that have them; every test here is marked `clients`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.table import PAGE, Row, rows_of, write
from tests.support.agent_job import AgentJob, running_agent_job

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test-clients ARGS=--write-table` puts what it measures into the page."""
    parser.addoption("--write-table", action="store_true", help=f"write the rows of {PAGE.name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this directory."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def place_of() -> Callable[[str], Path]:
    """Gives the directory of an environment that `make clients` builds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

    def path(environment: str) -> Path:
        place = cache / "areal_like" / environment
        if not place.exists():
            pytest.skip(f"no environment {environment}: make clients")
        if (reason := place / "skipped").exists():
            pytest.skip(reason.read_text().strip())
        return place

    return path


class _Jobs:
    """One job at a time: the tests share it until one of them fails."""

    def __init__(self, paths: pytest.TempPathFactory) -> None:
        self._paths = paths
        self._stack = contextlib.ExitStack()
        self._job: AgentJob | None = None

    def running(self) -> AgentJob:
        if self._job is None:
            self._job = self._stack.enter_context(
                running_agent_job(self._paths.mktemp("job"), has_router=True)
            )
        return self._job

    def close(self) -> None:
        self._job = None
        self._stack.close()


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Jobs]:
    with contextlib.closing(_Jobs(tmp_path_factory)) as jobs:
        yield jobs


@pytest.fixture
def job(jobs: _Jobs, request: pytest.FixtureRequest) -> Iterator[AgentJob]:
    """A failed test leaves an open session or a sample that nobody fetched: the next test has another job."""
    failed = request.session.testsfailed
    yield jobs.running()
    if request.session.testsfailed > failed:
        jobs.close()


@pytest.fixture(params=["server", "router"])
def url(job: AgentJob, request: pytest.FixtureRequest) -> str:
    """Where a client claims its session."""
    return {"server": job.url, "router": job.router_url}[request.param]


@pytest.fixture(scope="session")
def check_row(pytestconfig: pytest.Config) -> Callable[[Row], None]:
    """Compares a row with the page's, but for the version; with --write-table, writes it."""

    def check(row: Row) -> None:
        if pytestconfig.getoption("--write-table", default=False):
            write(row)
            return
        shown = rows_of().get(row.key)
        assert shown is not None and shown.measured == row.measured, (
            f"{PAGE.name} has not the row {row.line}: make test-clients ARGS=--write-table"
        )

    return check
