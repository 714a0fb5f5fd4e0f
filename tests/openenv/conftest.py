"""The interpreter that has OpenEnv; every test of this directory is marked `openenv`."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.separate_interpreters import interpreter_with, mark_below
from tests.support.waiting import wait_until_ready

HERE = Path(__file__).parent
Serve = Callable[..., str]
"""`serve("guess", max_sessions=2)` starts a server and returns its address."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this directory."""
    mark_below(HERE, items, pytest.mark.openenv)


@pytest.fixture(scope="session")
def interpreter() -> str:
    return interpreter_with("openenv")


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
