"""docs/guides/distill.md: its commands run; a student approaches its teacher; a dead teacher delays a job."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from areal_like.trajectory import TEACHER_LOGPROBS
from launch.audit.run import audit_run
from tests.support import warm_start
from tests.support.launching import (
    ROOT,
    TEST_LIMIT_S,
    areal_like,
    finish,
    free_port,
    launcher,
    num_steps_done,
    wait_for_steps,
    wait_until,
)
from trainer.models.tiny import build_tiny_model

PAGE = (ROOT / "docs" / "guides" / "distill.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^areal-like (.*)$", PAGE.replace("\\\n", ""), re.M)
]
SMALL = (
    "trainer.groups_per_step=4",
    "sampling.group_size=4",
    "trainer.num_steps=4",
    "trainer.checkpoint_interval=2",
    "trainer.keep_checkpoints=9",
    "eval.num_prompts=0",
    "weights.check_interval_s=0",
    "buffer.retain_trajectories=true",
)


def rows_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def words_of(command: list[str]) -> list[str]:
    """The command, with the last checkpoint of a small run."""
    return [word.replace("step_000600", "step_000004") for word in command]


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_commands_of_the_guide_run(tmp_path: Path, cache: dict[str, str]) -> None:
    teacher, student, both, served = COMMANDS
    assert "distill.api_key_file=key" in served, "test_a_dead_teacher_delays_the_job"
    for words in (teacher, student, both):
        done = areal_like(*words_of(words), *SMALL, cwd=tmp_path, environment=cache)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in ("student", "both"):
        rows = rows_of(tmp_path / "runs" / name)
        assert len(rows) == 4 and all(row["teacher_share"] == 1 for row in rows)
        assert all(row["reverse_kl"] != 0 for row in rows[1:])
        assert audit_run(tmp_path / "runs" / name).is_clean
    assert "reverse_kl" not in rows_of(tmp_path / "runs" / "teacher")[0]


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize(("loss", "most"), [("full", 0.6), ("sampled", 0.8)])
def test_a_student_approaches_its_teacher(
    tmp_path: Path, cache: dict[str, str], loss: str, most: float
) -> None:
    """The default job's model, warm-started on wrong answers, and a teacher that knows only right ones."""
    build_tiny_model(tmp_path / "teacher", seed=1, warm_start_steps=150, swap_prob=0.0)
    settings = [
        "name=x",
        "objective=distill",
        f"distill.teachers.default={tmp_path / 'teacher'}",
        f"distill.loss={loss}",
        "trainer.num_steps=30",
        "trainer.groups_per_step=8",
        "trainer.lr=2e-4",
        "eval.num_prompts=0",
    ]
    done = areal_like("run", *settings, cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    kl = [row["reverse_kl"] for row in rows_of(tmp_path / "runs" / "x")]
    first, last = sum(kl[:5]) / 5, sum(kl[-5:]) / 5
    print(f"reverse KL {first:.2f} -> {last:.2f}")
    assert 0 < last < most * first


@contextmanager
def embedded_teacher(path: Path, key: Path, *, port: int) -> Iterator[Any]:
    """The command of the guide for the embedded engine, at this port."""
    (words,) = re.findall(r"`python (-m rollout_server\.engine [^`]*)`", PAGE)
    words = words.replace("DIR", str(path)).replace("-file key", f"-file {key}").replace("2048", "64")
    port_file = path.with_name("port")
    port_file.unlink(missing_ok=True)
    process = warm_start.Popen(
        [sys.executable, *shlex.split(words), "--port", str(port), "--port-file", str(port_file)], cwd=ROOT
    )
    try:
        wait_until(port_file.exists, what="the teacher's server", process=process)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_dead_teacher_delays_the_job(tmp_path: Path, cache: dict[str, str]) -> None:
    """Its server is killed: the job names it and waits. With the server it goes on; a replay needs none."""
    teacher, key, port = tmp_path / "teacher", tmp_path / "key", free_port()
    build_tiny_model(teacher, seed=1, warm_start_steps=20, swap_prob=0.0)
    key.write_text("a key\n")
    key.chmod(0o600)
    root = tmp_path / "runs" / "student"
    verb, *words = [word.replace("30000", str(port)) for word in COMMANDS[-1]]
    assert verb == "run"
    settings = [*words, *SMALL, "trainer.num_steps=12", "distill.retry_s=30", "model.warm_start_steps=20"]
    with ExitStack() as servers:

        def start() -> Any:
            return servers.enter_context(embedded_teacher(teacher, key, port=port))

        server = start()
        with launcher(*settings, cwd=tmp_path, environment=cache) as process:
            wait_for_steps(3, root, process=process)
            server.send_signal(signal.SIGKILL)
            server.wait()

            def is_named() -> bool:
                why = areal_like("why", "student", cwd=tmp_path)
                return "distill.teachers.default" in why.stdout

            wait_until(is_named, what="areal-like why names the teacher", process=process)
            done = num_steps_done(root)
            assert done < 12
            start()
            code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    rows = rows_of(root)
    assert len(rows) == 12 and all(row["teacher_share"] == 1 for row in rows)
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    for command in (("replay", "student"), ("replay", "student", "--against", "student-replay")):
        replayed = areal_like(*command, cwd=tmp_path)
        assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "no difference" in replayed.stdout
    assert TEACHER_LOGPROBS.encode() in b"".join(
        segment.read_bytes() for segment in root.glob("**/segments/*.seg")
    )
