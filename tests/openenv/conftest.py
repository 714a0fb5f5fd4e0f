"""The interpreter that has OpenEnv; every test of this directory is marked `openenv`."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until_ready

HERE = Path(__file__).parent
Serve = Callable[..., str]
"""`serve("guess", max_sessions=2)` starts a server and returns its address."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this directory."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.openenv)


@pytest.fixture(scope="session")
def interpreter() -> str:
    """Python of the environment that `make openenv` builds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = cache / "areal_like" / "openenv" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with OpenEnv: make openenv")
    return str(python)


@pytest.fixture
def serve(interpreter: str, tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(name: str, *, max_sessions: int = 4) -> str:
            port_file, logs = tmp_path / f"{name}.port", tmp_path / f"{name}.log"
            command = [interpreter, str(HERE / "serve.py"), name, str(port_file), str(max_sessions)]
            log = stack.enter_context(logs.open("w"))
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
            stack.callback(process.wait)
            stack.callback(process.kill)
            wait_until_ready(process, logs=logs, probe=port_file.exists, what=f"the server of {name}")
            return f"http://127.0.0.1:{port_file.read_text()}"

        yield start
