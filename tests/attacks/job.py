"""A small real job of the launcher, which goes on while it is attacked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

from areal_like.runtime.command_line import load_config
from areal_like.security.keys import Identity, KeyDirectory
from launch.audit.run import audit_run
from tests.attacks.attacker import Attacker, request
from tests.support.growing_files import sizes_of
from tests.support.launching import finish, launcher, num_steps_done, processes_of, wait_until

PLANES = ("buffer", "rollout-0", "trainer-0")
_DAEMON = re.compile(r"-m (buffer|trainer|rollout_server(?:\.engine)?) ")
_SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.SlowChecksum",  # a job at full speed would use most of a core
    "rollout.reward_workers=2",
    "sampling.max_new_tokens=8",
    "buffer.max_consecutive_failures=10",
    "sampling.group_size=4",
    "trainer.groups_per_step=2",
    "trainer.num_steps=100000",
    "trainer.checkpoint_interval=50",
    "eval.num_prompts=4",
    "weights.push_deadline_s=15",
)


class AttackedJob:
    """The running job, and what its operator sees of it."""

    def __init__(self, run: Path, process: Popen[str], *, keys: Path | None) -> None:
        self.run = run
        self.keys = KeyDirectory(keys) if keys is not None else None
        self._process = process
        wait_until(lambda: num_steps_done(run) > 1, what="the first steps", run_root=run, process=process)
        self.config = load_config(["--config", str(run / "config.yaml")])
        self.buffer = str(self.endpoint("buffer")["stream"])
        """Address of the buffer's socket."""
        self.weights = str(self.endpoint("rollout-0")["weights"])
        """Address of the rollout server's control socket of weight pushes."""
        self.planes = {name: str(self.endpoint(name)["http"]) for name in PLANES}
        """Addresses of the HTTP servers."""
        self.engine = f"127.0.0.1:{(run / 'endpoints' / 'rollout-0-engine.port').read_text().strip()}"
        """Address of the engine's HTTP server."""
        self.daemons = self._daemons()

    def addresses(self) -> dict[str, str]:
        """Address of every socket that this project binds -> `zmq`, `http` or `engine`."""
        sockets = dict.fromkeys((self.buffer, self.weights), "zmq")
        return sockets | dict.fromkeys(self.planes.values(), "http") | {self.engine: "engine"}

    def endpoint(self, name: str) -> dict[str, Any]:
        """The endpoint file of a daemon."""
        return dict(json.loads((self.run / "endpoints" / f"{name}.json").read_text()))

    def identity(self, name: str) -> Identity:
        """A key of the job, which an attacker has stolen."""
        assert self.keys is not None
        return self.keys.identity(name)

    def thief(self, name: str, address: str = "", **options: Any) -> Attacker:
        """A connection to the buffer, or to `address` of it, with a stolen key."""
        return Attacker(
            address or self.buffer,
            identity=self.identity(name),
            server_key=self.identity("buffer").public,
            **options,
        )

    def operator(self) -> dict[str, str]:
        """Headers of the operator's requests."""
        return {"Authorization": f"Bearer {self.identity('operator').token}"} if self.keys else {}

    def status(self, name: str = "buffer") -> dict[str, Any]:
        """/status of a daemon."""
        status, body = request(self.planes[name], "GET", "/status", headers=self.operator())
        assert status == 200, body
        return dict(json.loads(body))

    def wait_status(self, accept: Any, *, what: str) -> dict[str, Any]:
        """Waits until `accept` is true for the buffer's /status."""
        wait_until(lambda: accept(self.status()), what=what, run_root=self.run, process=self._process)
        return self.status()

    def goes_on(self, *, num_steps: int = 2) -> None:
        """Waits for more optimizer steps; no daemon may have been restarted."""
        goal = num_steps_done(self.run) + num_steps
        wait_until(
            lambda: num_steps_done(self.run) >= goal,
            what=f"step {goal}",
            run_root=self.run,
            process=self._process,
        )
        # Others may be seen: a process that a daemon starts has the daemon's command line until its exec.
        assert self.daemons.items() <= self._daemons().items(), "an attack has ended a daemon"

    def pid(self, name: str) -> int:
        """Process id of a daemon, or of `engine`."""
        if name != "engine":
            return int(self.endpoint(name)["pid"])
        (pid,) = (pid for pid, module in self.daemons.items() if module == "rollout_server.engine")
        return pid

    def peak_bytes(self, name: str) -> int:
        """Largest resident memory of a daemon so far."""
        text = Path(f"/proc/{self.pid(name)}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", text)[0]) * 1024

    def log_bytes(self) -> int:
        """Size of all logs."""
        return sum(sizes_of(self.run / "logs").values())

    def _daemons(self) -> dict[int, str]:
        """Process id -> module."""
        found = {pid: _DAEMON.search(command) for pid, command in processes_of(self.run).items()}
        return {pid: match[1] for pid, match in found.items() if match}


@contextmanager
def attacked_job(
    directory: Path, *settings: str, cache: dict[str, str], keys: Path | None = None
) -> Iterator[AttackedJob]:
    """Starts a job. At the end it must drain, and its books must be whole."""
    run = directory / "runs" / "x"
    with launcher(
        *_SETTINGS, f"runs_dir={directory}/runs", *settings, cwd=directory, environment=cache
    ) as process:
        job = AttackedJob(run, process, keys=keys)
        yield job
        job.goes_on(num_steps=5)
        process.terminate()
        code, _, stderr = finish(process, run)
    assert code == 0, stderr
    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())
