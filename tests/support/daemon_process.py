"""A daemon of the real runtime as a process, whose body does what a test asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from areal_like.runtime.process import PARENT_PID

BODY = """
import asyncio, sys, time
from areal_like.runtime.command_line import load_config
from areal_like.runtime.daemon import run_daemon
from areal_like.errors import ArealError, ConfigError

async def main(runtime):
    mode = sys.argv[1]
    if mode == "user error":
        raise ConfigError("x is wrong: use y")
    if mode == "failure":
        raise ArealError("the disk is on fire")
    if mode == "bug":
        raise KeyError("surprise")
    async def double(body):
        if "n" not in body:
            raise ConfigError("give n")
        return {"n": 2 * body["n"]}
    runtime.verbs["double"] = double
    runtime.status = lambda: {"answer": 42}
    runtime.ready()
    with runtime.waits("a signal"):
        await runtime.stopping.wait()
    if mode == "stuck":
        time.sleep(3600)
    while mode == "slow" and not runtime.paths.root.joinpath("may end").exists():
        await asyncio.sleep(0.05)

sys.exit(run_daemon(load_config(sys.argv[2:]), role="rollout", name="test-0", main=main))
"""


class DaemonProcess:
    """One daemon; `mode` chooses its behavior."""

    def __init__(self, directory: Path, mode: str, *settings: str, tied: bool = False) -> None:
        environment = dict(os.environ) | ({PARENT_PID: str(os.getpid())} if tied else {})
        self.run = directory / "runs" / "test"
        command = [sys.executable, "-c", BODY, mode, "name=test", f"runs_dir={directory}/runs", *settings]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def endpoint(self) -> dict[str, Any]:
        """The content of its endpoint file, once it is there."""
        path = self.run / "endpoints" / "test-0.json"
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)
        return dict(json.loads(path.read_text()))

    @property
    def port(self) -> int:
        """Of its HTTP server."""
        return int(str(self.endpoint()["http"]).rpartition(":")[2])

    def get(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Status and text of a GET, or of a POST if there is a body. `_` in a header's name means `-`."""
        request = urllib.request.Request(f"http://{self.endpoint()['http']}{path}", data=body)
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_ready(self) -> None:
        """Waits until /readyz answers 200."""
        while self.get("/readyz")[0] != 200:
            time.sleep(0.05)

    def close(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
