"""What the launcher does when daemons misbehave: real processes that follow a script (scripted_daemon.py), no model."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.paths import RunPaths, write_json
from launch.local_job.rundir import restart_order_file
from tests.support.launching import ROOT, launcher, num_steps_done, processes_of, wait_until
from tests.support.scripted_daemon import write_packages

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A working directory with scripted daemons; nothing may be left running in it."""
    write_packages(tmp_path)
    yield tmp_path
    left = processes_of(tmp_path / "runs" / "x")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "orphans"


def run(workplace: Path, *settings: str, script: dict[str, str] | None = None) -> tuple[int, str, str]:
    """A whole job under the name x; returns exit code, stdout and stderr."""
    with launcher(
        "name=x", *settings, cwd=workplace, environment={"SCRIPT": json.dumps(script or {})}
    ) as process:
        out, err = process.communicate(timeout=50)
    return process.returncode, out, err


def test_a_run_ends_with_a_summary_and_without_processes(workplace: Path) -> None:
    code, out, err = run(workplace, "trainer.num_steps=10")
    assert (code, err) == (0, "")
    assert "optimizer steps" in out and "10" in out and "go on with" not in out
    assert processes_of(workplace / "runs" / "x") == {}
    assert not list((workplace / "runs" / "x" / "endpoints").iterdir())
    code, _, err = run(workplace)
    assert code == 2 and "already holds a finished run" in err


def test_a_dead_server_is_started_again(workplace: Path) -> None:
    code, out, _ = run(
        workplace, "trainer.num_steps=60", "rollout.num_servers=2", script={"rollout-1": "crash once"}
    )
    assert code == 0
    assert out.count("rollout-1 ended (exit code 3): starting it again") == 1


def test_servers_that_keep_dying_end_the_run(workplace: Path) -> None:
    code, _, err = run(workplace, "trainer.num_steps=100000", script={"rollout-0": "crash"})
    assert code == 1
    assert "no rollout server is left" in err and "the dog ate my weights" in err


def test_a_server_whose_settings_worked_once_is_started_again_though_they_do_not_now(workplace: Path) -> None:
    code, out, _ = run(
        workplace, "trainer.num_steps=160", "rollout.num_servers=2", script={"rollout-1": "loses its device"}
    )
    assert code == 0
    assert out.count("rollout-1 ended (exit code 3): starting it again") == 1
    assert out.count("rollout-1 ended (exit code 2): starting it again") == 1


def test_a_failed_run_gives_its_trainer_time_for_a_checkpoint_however_long_a_drain_may_take(
    workplace: Path,
) -> None:
    script = {"rollout-0": "crash", "trainer-0": "drain slowly"}
    code, out, err = run(workplace, "trainer.num_steps=100000", "daemon.drain_timeout_s=120", script=script)
    assert code == 1 and "no rollout server is left" in err and "did not end in time" not in out
    assert list((workplace / "runs" / "x" / "checkpoints").iterdir())


def test_a_run_goes_on_when_nobody_reads_what_it_prints(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", "trainer.num_steps=160", cwd=workplace) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=40) == 0
    assert num_steps_done(root) == 160


def test_a_run_whose_terminal_goes_away_drains(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "launch", "run", "name=x", "trainer.num_steps=100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SCRIPT": "{}"}
    process = subprocess.Popen(
        command,
        cwd=workplace,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        wait_until(
            lambda: (
                select.select([ours], [], [], 0)[0] and os.read(ours, 1 << 16) and num_steps_done(root) > 3
            ),
            timeout_s=20,
            what="steps",
        )
    finally:
        os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0
    assert list((root / "checkpoints").iterdir())


def pid_of(root: Path, package: str) -> int:
    """The daemon that was started as `python -m PACKAGE`."""
    return next(pid for pid, command in processes_of(root).items() if f"-m {package} " in command)


def is_back(root: Path, package: str, *, after: int) -> bool:
    """Whether another process of this package runs and the killed one, which may take a moment to go, does not."""
    commands = processes_of(root)
    return after not in commands and any(f"-m {package} " in command for command in commands.values())


def test_a_run_without_a_durable_ledger_ends_with_its_buffer(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", "trainer.num_steps=100000", "buffer.durability=none", cwd=workplace) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        os.kill(pid_of(root, "buffer"), signal.SIGKILL)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 1
        assert err.startswith("buffer failed (killed by SIGKILL)")


def test_a_killed_buffer_and_trainer_are_started_again_and_nobody_else(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", "trainer.num_steps=100000", cwd=workplace) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        before = {name: pid_of(root, name) for name in ("buffer", "trainer", "rollout_server")}
        for name in ("buffer", "trainer"):
            os.kill(before[name], signal.SIGKILL)
            wait_until(
                lambda name=name: is_back(root, name, after=before[name]),
                timeout_s=20,
                what=f"{name} is back",
            )
        commands = processes_of(root)
        assert before["rollout_server"] in commands and not {before["buffer"], before["trainer"]} & set(
            commands
        )
        assert "buffer.ports=[12345]" in commands[pid_of(root, "buffer")], "where everybody knows it"
        assert commands[pid_of(root, "trainer")].rstrip().endswith("resume=''"), "there is no checkpoint yet"
        (root / "checkpoints" / "step_000003").mkdir(parents=True)
        os.kill(pid_of(root, "trainer"), signal.SIGKILL)
        wait_until(
            lambda: any("resume=latest" in c for c in processes_of(root).values()),
            timeout_s=20,
            what="trainer is back",
        )
        os.kill(pid_of(root, "trainer"), signal.SIGKILL)
        write_json(
            restart_order_file(RunPaths(root)), {"role": "trainer", "settings": ["trainer.lr=3e-5"]}
        )  # there is nobody to hand over
        wait_until(
            lambda: any("trainer.lr=3e-5" in c for c in processes_of(root).values()),
            timeout_s=20,
            what="trainer is back",
        )
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.count("ended (killed by SIGKILL): starting it again") == 4


def test_a_trainer_that_never_gets_further_is_given_up_with_its_own_words(workplace: Path) -> None:
    code, out, err = run(workplace, script={"trainer": "fail", "trainer-0": "fail"})
    assert code == 1
    assert (
        out.count("trainer ended (exit code 1): starting it again") == 3
        and "trainer died 4 times in a row" in err
    )
    assert "trainer failed (exit code 1)" in err and "no group for step 5 within 300 s" in err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            {"buffer": "user error"},
            "buffer: cannot bind 127.0.0.1:1 (in use): set buffer.port to a free port",
        ),
        ({"prepare_model": "user error"}, "model.path=/nowhere: no config.json there"),
    ],
)
def test_the_users_mistake_is_one_message(workplace: Path, script: dict[str, str], message: str) -> None:
    code, _, err = run(workplace, script=script)
    assert (code, err.strip()) == (2, message)


def test_a_daemon_that_never_gets_ready_is_named(workplace: Path) -> None:
    code, _, err = run(workplace, "rollout.start_timeout_s=1", script={"rollout-0": "never ready"})
    assert code == 1
    assert "rollout-0 was not ready after" in err and "waiting for Godot" in err


def test_sigterm_drains_and_resume_is_offered(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", cwd=workplace) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        process.terminate()
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
        assert "go on with: areal-like run name=x resume=latest" in out
        code, _, err = run(workplace)
        assert code == 2 and "resume=latest" in err


def test_a_deaf_daemon_is_killed_in_time(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    script = {"SCRIPT": json.dumps({"rollout-0": "deaf"})}
    with launcher("name=x", "daemon.drain_timeout_s=4", cwd=workplace, environment=script) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        started_s = time.monotonic()
        process.terminate()
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 1 and time.monotonic() - started_s < 6
        assert "rollout-0 did not end in time" in out


def test_a_second_signal_ends_everything_at_once(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher(
        "name=x", cwd=workplace, environment={"SCRIPT": json.dumps({"rollout-0": "deaf"})}
    ) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        process.send_signal(signal.SIGINT)
        time.sleep(1.3)
        process.send_signal(signal.SIGINT)
        started_s = time.monotonic()
        process.communicate(timeout=20)
        assert process.returncode == 1 and time.monotonic() - started_s < 3


def test_a_killed_launcher_leaves_no_orphan_and_its_lock_until_then(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", cwd=workplace) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        code, _, err = run(workplace)
        assert code == 2 and "in use" in err
        process.kill()
        process.communicate(timeout=20)
        wait_until(lambda: not processes_of(root), timeout_s=20, what="the daemons end with their launcher")
        code, _, err = run(workplace, "resume=latest", "trainer.num_steps=3")
        assert code == 0


def test_a_server_that_was_asked_to_stop_is_not_missed(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", "rollout.num_servers=2", "trainer.num_steps=100000", cwd=workplace) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=20, what="training")
        # Of a guest that was killed: it is no server that is left.
        write_json(
            root / "endpoints" / "rollout-7.json", {"role": "rollout", "pid": 999_999, "http": "127.0.0.1:1"}
        )
        for name in ("rollout-0", "rollout-1"):
            before = num_steps_done(root)
            pid = next(pid for pid, command in processes_of(root).items() if f"--name {name}" in command)
            os.kill(pid, signal.SIGTERM)
            if name == "rollout-0":
                wait_until(
                    lambda before=before: num_steps_done(root) > before + 10,
                    timeout_s=20,
                    what="training goes on with one server",
                )
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "rollout-0 was asked to stop" in out and "go on with" in out
