"""A job's roles started one by one, without a launcher, as on a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.local_job.child import RUN_MARKER
from tests.support import warm_start
from tests.support.launching import ROOT, processes_of, wait_until


class Roles:
    """Starts `python -m ...` with the run's settings. Create it with `started_roles`."""

    def __init__(self, folder: Path, settings: Sequence[str], environment: Mapping[str, str]) -> None:
        self.run = folder / "runs" / "x"
        self.started: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        self._settings = ("name=x", f"runs_dir={folder}/runs", *settings)
        ours = {RUN_MARKER: f"{self.run}:test", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._environment = os.environ | ours | environment

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Starts `python -m COMMAND`; its settings take precedence over the run's."""
        given = {word.partition("=")[0] for word in command}
        others = [setting for setting in self._settings if setting.partition("=")[0] not in given]
        # A forked server would have torch from the process that it is forked from.
        start_process = subprocess.Popen if command[0] == "rollout_server" else warm_start.Popen
        self.started.append(
            start_process([sys.executable, "-m", *command, *others], cwd=self._folder, env=self._environment)
        )
        return self.started[-1]

    def start_buffer(self, *settings: str) -> tuple[subprocess.Popen[bytes], str]:
        """Builds the model and starts the buffer; returns it and the setting with its port."""
        preparing = self.start("trainer.prepare_model", *settings)
        wait_until(lambda: preparing.poll() is not None, what="the model")
        assert preparing.returncode == 0
        buffer = self.start("buffer", *settings)
        endpoint = self.run / "endpoints" / "buffer.json"
        wait_until(
            lambda: endpoint.exists() and "stream" in endpoint.read_text(),
            what="the buffer",
            run_root=self.run,
            process=buffer,
        )
        return buffer, f"buffer.port={json.loads(endpoint.read_text())['stream'].rpartition(':')[2]}"


@contextlib.contextmanager
def started_roles(folder: Path, settings: Sequence[str], environment: Mapping[str, str]) -> Iterator[Roles]:
    """Roles of the run `folder/runs/x`; fails if a process outlives them."""
    roles = Roles(folder, settings, environment)
    try:
        yield roles
        # A role's workers end when they notice that it has ended.
        wait_until(lambda: not processes_of(roles.run), what="the end of all processes", timeout_s=60)
    finally:
        left = processes_of(roles.run)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in roles.started:
            process.wait()
    assert not left, f"orphans: {left}"
