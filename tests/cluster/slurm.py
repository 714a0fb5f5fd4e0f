"""A real Slurm for tests, and what happens to its nodes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.nodes.start import ALL_ROLES
from tests.support.launching import areal_like

_LAB = Path(__file__).parent / "slurm_lab.sh"
MISSING = next(
    (program for program in ("slurmctld", "slurmd", "munged") if shutil.which(program) is None), ""
)
"""A program of Slurm that is not installed; empty if all are."""


class Lab:
    """A running Slurm with nodes n1, n2, ... on this machine. `directory`: where runs are, too."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._home = directory / "slurm"
        self.environment = {"SLURM_CONF": str(self._home / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def areal_like(self, *words: str, code: int = 0) -> str:
        """The output of `areal-like WORDS`, which has to end with this exit code."""
        done = areal_like(*words, cwd=self.directory, environment=self.environment)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def jobs(self, name: str) -> dict[str, list[dict[str, str]]]:
        """Role -> jobs of the run in the queue, each with `id`, `state`, `node` and `restarts`."""
        found: dict[str, list[dict[str, str]]] = {role: [] for role in ALL_ROLES}
        for line in self.command("scontrol", "show", "job", "-o").splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            role = fields.get("JobName", "").removeprefix(f"areal-{name}-")
            if role in found and fields["JobState"] in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
                job = {"id": fields["JobId"], "state": fields["JobState"], "restarts": fields["Restarts"]}
                found[role].append(job | {"node": fields["NodeList"]})
        return found

    def lose(self, node: str, *, with_processes: bool) -> list[int]:
        """Slurm loses a node. With its processes: killed, and Slurm has to notice. Without: Slurm declares it
        down, and what runs there goes on. Returns the processes of jobs that were there."""
        there = self.processes_on(node)
        os.kill(self._slurmd(node), signal.SIGKILL)
        if with_processes:
            # slurmstepd first, which would report the end of the job.
            for pid in [*{_parent_of_batch(pid) for pid in there} - {0}, *there]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
        return there

    def processes_on(self, node: str) -> list[int]:
        """The living processes of jobs on a node."""
        markers = {
            f"SLURMD_NODENAME={node}".encode(),
            f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(),
        }
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if markers <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
        return found

    def bring_back(self, node: str) -> None:
        """Starts the node's slurmd again."""
        subprocess.run([_LAB, "slurmd", self._home, node], check=True, timeout=30)
        self.wait(lambda: self._state(node) in ("idle", "mixed", "allocated"), f"{node} to come back")

    def _state(self, node: str) -> str:
        return self.command("sinfo", "-h", "-n", node, "-o", "%T").strip()

    def _slurmd(self, node: str) -> int:
        return int((self._home / "run" / f"c-slurmd-{node}.pid").read_text())

    @property
    def is_free(self) -> bool:
        """True if no job is in the queue and no node is allocated."""
        # A star: the node does not respond.
        states = [state.rstrip("*") for state in self.command("sinfo", "-h", "-N", "-o", "%T").split()]
        return not self.command("squeue", "-h").strip() and set(states) <= {"idle", "down"}

    def wait(self, condition: Callable[[], object], what: str, *, timeout_s: float = 180) -> None:
        """Polls; fails with the queue in the message."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                queue = self.command("squeue", "-h", "-o", "%i %j %T %N %r")
                outputs = "\n".join(
                    f"{path.name}: {path.read_text()[-600:]}"
                    for path in self.directory.glob("runs/*/logs/slurm-*.out")
                )
                raise AssertionError(f"not within {timeout_s:.0f} s: {what}\n{queue}\n{outputs}")
            time.sleep(0.3)

    def status(self, name: str) -> dict[str, Any]:
        """`areal-like status --json` of a run; empty while its buffer does not answer."""
        done = areal_like("status", name, "--json", cwd=self.directory, environment=self.environment)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


@contextlib.contextmanager
def running_slurm(*, num_nodes: int = 4) -> Iterator[Lab]:
    """A Slurm in a directory of its own, which other users may enter, as munge demands.

    It is stopped at the end, with everything that its jobs have left.
    """
    directory = Path(tempfile.mkdtemp(prefix="areal-slurm-"))
    directory.chmod(0o755)
    lab = Lab(directory)
    environment = os.environ | {"NODES": str(num_nodes)}
    nodes = [f"n{number + 1}" for number in range(num_nodes)]
    try:
        subprocess.run([_LAB, "start", directory / "slurm"], env=environment, check=True, timeout=60)
        try:
            yield lab
        finally:
            with contextlib.suppress(AssertionError):
                lab.command("scancel", "--user=root")
                lab.wait(lambda: not any(map(lab.processes_on, nodes)), "the end", timeout_s=45)
            for pid in (pid for node in nodes for pid in lab.processes_on(node)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    finally:
        subprocess.run([_LAB, "stop", directory / "slurm"], env=environment, check=True, timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


def _parent_of_batch(pid: int) -> int:
    """The slurmstepd that has started this process; 0 if another process has."""
    with contextlib.suppress(OSError, IndexError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent
    return 0
