"""Jobs with a reward model or a teacher: each of their processes is killed once, and the launcher at the end.

Each kill waits until samples wait at the second model, which is stopped meanwhile. So a buffer, a server, an
engine, a trainer and the second model itself die when requests to the latter are under way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from areal_like.paths import RunPaths, read_endpoint
from launch.audit.run import audit_run
from tests.jobs.test_distill_job import embedded_teacher, rows_of
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    launcher_log,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)
from tests.support.ports import free_port
from tests.support.reward_models import write_reward_model
from trainer.models.tiny import build_tiny_model

NUM_STEPS, GROUPS = 40, 4
SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "sampling.max_new_tokens=4",
    "sampling.group_size=4",
    f"trainer.num_steps={NUM_STEPS}",
    f"trainer.groups_per_step={GROUPS}",
    "trainer.checkpoint_interval=5",
    "eval.num_prompts=0",
    "max_staleness=2",
    "buffer.lease_timeout_s=5",
    "buffer.retain_trajectories=true",
)
SCORED = (
    "rollout.reward_concurrency=16",
    "rollout.reward_timeout_s=200",
)
REWARD = "{name: model, transform: sigmoid}"
TASK = "task={name: data, train: rows.jsonl, eval: rows.jsonl, gold_reward: exact, reward: %s}"
TAUGHT = ("task._target_=tests.support.rollout_tasks.Checksum", "objective=distill", "trainer.lr=1e-3")
ROLES = ("engine", "rollout-0", "buffer", "trainer")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kind of job."""

    settings: tuple[str, ...]
    """`PORT` is replaced by that of the second model's server."""
    waiting: str = ""
    """The series of a rollout server that counts the samples at the second model; empty: it is in the
    trainer."""
    own: str = ""
    """The second model's role, if the launcher starts it."""
    start: Callable[[Path, int], contextlib.AbstractContextManager[subprocess.Popen[Any]]] | None = None
    """Starts the server of the second model, which is not of the job, in a directory, at a port."""


@contextlib.contextmanager
def score_server(folder: Path, port: int) -> Iterator[subprocess.Popen[Any]]:
    """`areal-like score-server`, once it serves."""
    with launcher("rm", f"scorer.port={port}", cwd=folder, verb="score-server") as process:
        file = RunPaths(folder / "runs" / "scorer").endpoints / "scorer-0.json"

        def serves() -> bool:
            endpoint = read_endpoint(file) or {}
            return endpoint.get("pid") == process.pid and "scores" in endpoint

        wait_until(serves, what="the score server", process=process)
        yield process


def teacher(folder: Path, port: int) -> contextlib.AbstractContextManager[subprocess.Popen[Any]]:
    (folder / "key").write_text("a key\n")
    (folder / "key").chmod(0o600)
    return embedded_teacher(folder / "teacher", folder / "key", port=port)


JOBS = {
    "scored by the job's server": Job(
        settings=(TASK % REWARD, "scorer.path=rm", *SCORED),
        waiting="areal_rewards_waiting",
        own="scorer-0",
    ),
    "scored at a URL": Job(
        settings=(TASK % REWARD.replace("{", "{url: 'http://127.0.0.1:PORT', "), *SCORED),
        waiting="areal_rewards_waiting",
        start=score_server,
    ),
    "taught at a URL": Job(
        settings=(
            *TAUGHT,
            "distill.teachers.default=http://127.0.0.1:PORT",
            "distill.api_key_file=key",
            "distill.retry_s=200",
            "eval.timeout_s=600",
            "rollout.max_context=64",
        ),
        waiting="areal_teachers_waiting",
        start=teacher,
    ),
    "taught in the trainer": Job(settings=(*TAUGHT, "distill.teachers.default=teacher")),
}


class SecondModel:
    """The server of the second model."""

    def __init__(self, job: Job, folder: Path, stack: contextlib.ExitStack) -> None:
        self._job, self._folder, self._stack = job, folder, stack
        self.port = free_port()
        self._process: subprocess.Popen[Any] | None = None
        if job.start is not None:
            self._process = stack.enter_context(job.start(folder, self.port))

    @contextlib.contextmanager
    def holding_samples(self, root: Path, process: subprocess.Popen[str]) -> Iterator[None]:
        """It is stopped, and samples wait at it, until the end of the block."""
        if not self._job.waiting:
            yield
            return
        pid = self._process.pid if self._process is not None else pid_of(root, self._job.own)
        os.kill(pid, signal.SIGSTOP)
        wait_until(
            lambda: reading(root, self._job.waiting) > 0,
            what=self._job.waiting,
            run_root=root,
            process=process,
        )
        yield
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kills the server that was started by hand."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def start_again(self) -> None:
        """Starts a server at the same port."""
        assert self._job.start is not None
        self._process = self._stack.enter_context(self._job.start(self._folder, self.port))


def pid_of(root: Path, role: str) -> int:
    """Of a process of the job; 0 if it does not run."""
    if role == "engine":
        engines = [pid for pid, words in processes_of(root).items() if "-m rollout_server.engine" in words]
        return engines[0] if engines else 0
    name = "trainer-0" if role == "trainer" else role
    return int((read_endpoint(root / "endpoints" / f"{name}.json") or {}).get("pid", 0))


def reading(root: Path, series: str) -> float:
    """A number of the rollout server; 0 while it does not respond."""
    endpoint = read_endpoint(root / "endpoints" / "rollout-0.json") or {}
    with contextlib.suppress(OSError, KeyError):
        with urllib.request.urlopen(f"http://{endpoint['http']}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith((f"{series} ", f"{series}{{"))
        )
    return 0.0


def write_files(folder: Path) -> None:
    write_reward_model(folder / "rm")
    build_tiny_model(folder / "teacher", seed=1, warm_start_steps=0, swap_prob=0.0)
    rows = [{"question": f"{row:03}=", "answer": f"{row:03}"} for row in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("kind", JOBS)
def test_each_role_is_killed_once(kind: str, tmp_path: Path, cache: dict[str, str]) -> None:
    write_files(tmp_path)
    job, root = JOBS[kind], tmp_path / "runs" / "x"
    with contextlib.ExitStack() as stack:
        second = SecondModel(job, tmp_path, stack)
        settings = [word.replace("PORT", str(second.port)) for word in job.settings]
        with launcher(*SETTINGS, *settings, cwd=tmp_path, environment=cache) as process:
            kill_each(job, second, root, process)
            process.kill()
            wait_until(lambda: not processes_of(root), what="the end of all daemons", run_root=root)
        assert 0 < num_steps_done(root) < NUM_STEPS, "the job was over too early: raise NUM_STEPS"
        with launcher("name=x", "resume=auto", cwd=tmp_path, environment=cache) as process:
            code, out, err = finish(process, root)
        assert (code, err) == (0, ""), out + err
    check(job, root)
    for words in (("replay", "x"), ("replay", "x", "--against", "x-replay")):
        replayed = areal_like(*words, cwd=tmp_path, environment=cache)
        assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "no difference" in replayed.stdout
    assert not list((tmp_path / "runs" / "x-replay" / "logs").glob("scorer*"))


def kill_each(job: Job, second: SecondModel, root: Path, process: subprocess.Popen[str]) -> None:
    """Kills the roles in turn, each after steps of the job that it was whole in."""
    for role in (*ROLES, *filter(None, [job.own])):
        wait_for_steps(num_steps_done(root) + 1, root, process=process)
        with second.holding_samples(root, process):
            before = pid_of(root, role)
            os.kill(before, signal.SIGKILL)
        wait_until(
            lambda role=role, before=before: pid_of(root, role) not in (0, before),
            what=f"another {role}",
            run_root=root,
            process=process,
        )
    if job.start is not None:
        wait_for_steps(num_steps_done(root) + 1, root, process=process)
        with second.holding_samples(root, process):
            second.kill()
        second.start_again()
    wait_for_steps(num_steps_done(root) + 1, root, process=process)


def check(job: Job, root: Path) -> None:
    """All groups were trained once, no sample failed, and the second model has seen each of them."""
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["trained"] == NUM_STEPS * GROUPS and not audit.failures, "\n".join(audit.lines())
    log = launcher_log(root)
    for role in ("rollout-0", "buffer", "trainer", *filter(None, [job.own])):
        notices = [line for line in log if line.startswith(f"{role} ended (killed by SIGKILL): starting")]
        assert len(notices) == 1, (role, log)
    rows = rows_of(root)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    for row in rows:
        if "objective=distill" in job.settings:
            assert row["teacher_share"] == 1
        else:
            metrics = row["sample_metrics"]
            (identity,) = (name for name in metrics if name.startswith("model/scorer/"))
            assert metrics[identity] == 1 and 0 < row["reward_mean"] < 1
    if job.waiting == "areal_rewards_waiting":
        assert max(row["sample_metrics"]["model/retries"] for row in rows) > 0, "no request met a dead server"
