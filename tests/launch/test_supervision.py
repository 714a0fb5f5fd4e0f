"""The launcher with misbehaving daemons: real processes that follow a script (scripted_daemon.py), no
model."""

from __future__ import annotations

import contextlib
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
from areal_like.runtime.command_line import load_config
from launch.cli import main
from launch.run_directory.kept_settings import read_changes
from launch.run_directory.rundir import restart_order_file, restart_outcome_file
from launch.run_files import read_object
from tests.support.launching import (
    ROOT,
    TEST_LIMIT_S,
    finish,
    launcher,
    launcher_log,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)
from tests.support.scripted_daemon import write_packages

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)
ENDLESS = "trainer.num_steps=100000"


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A working directory with scripted daemons; nothing may be left running in it."""
    yield from scripted_workplace(tmp_path)


def scripted_workplace(folder: Path) -> Iterator[Path]:
    write_packages(folder)
    yield folder
    left = processes_of(folder / "runs" / "x")
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "processes of the run are left"


def run(workplace: Path, *settings: str, script: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Runs a whole job under the name x; returns exit code, stdout and stderr."""
    with launcher("name=x", *settings, cwd=workplace, environment=scripted(script or {})) as process:
        return finish(process, workplace / "runs" / "x")


def scripted(script: dict[str, str]) -> dict[str, str]:
    """The environment in which daemons follow this script."""
    return {"SCRIPT": json.dumps(script)}


def wait_for_notice(text: str, root: Path, process: subprocess.Popen[str]) -> None:
    """Waits for a message in the launcher's log."""
    wait_until(
        lambda: any(text in message for message in launcher_log(root)),
        what=text,
        run_root=root,
        process=process,
    )


def drain(process: subprocess.Popen[str], root: Path) -> tuple[int, str, str]:
    """Sends SIGTERM to the launcher; returns exit code, stdout and stderr."""
    process.terminate()
    return finish(process, root)


def pid_of(root: Path, part: str) -> int:
    """The process whose command line contains this."""
    return next(pid for pid, command in processes_of(root).items() if part in command)


def is_back(root: Path, part: str, *, after: int) -> bool:
    """True when a new such process runs and the killed one, which may end a little later, does not."""
    commands = processes_of(root)
    return after not in commands and any(part in command for command in commands.values())


def test_a_run_ends_with_a_summary_and_without_processes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workplace / "runs" / "x"
    code, out, err = run(workplace, "trainer.num_steps=10")
    assert (code, err) == (0, "")
    assert out.startswith(f"new run in {root}\n")
    assert "optimizer steps" in out and "10" in out and "continue with" not in out
    assert processes_of(root) == {}
    assert not list((root / "endpoints").iterdir())
    monkeypatch.chdir(workplace)
    assert main(["run", "name=x"]) == 2
    assert "already holds a finished run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_without_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, str, str]]:
    """(run directory, exit code, stdout, stderr) of a run whose server keeps dying and whose trainer drains
    slowly, though within a drain's long time limit."""
    for workplace in scripted_workplace(tmp_path_factory.mktemp("servers")):
        script = {"rollout-0": "crash", "trainer-0": "drain slowly"}
        yield workplace / "runs" / "x", *run(workplace, ENDLESS, "daemon.drain_timeout_s=120", script=script)


def test_servers_that_keep_dying_end_the_run(run_without_servers: tuple[Path, int, str, str]) -> None:
    _, code, _, err = run_without_servers
    assert code == 1
    assert "no rollout server is left" in err and "cannot load the weights" in err


def test_a_failed_run_leaves_its_trainer_time_to_drain(
    run_without_servers: tuple[Path, int, str, str],
) -> None:
    root, code, out, _ = run_without_servers
    assert code == 1 and "did not end in time" not in out
    assert list((root / "checkpoints").iterdir())


@pytest.mark.chaos
def test_settings_that_worked_once_do_not_end_the_run(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    environment = scripted({"rollout-1": "loses its device"})
    with launcher(
        "name=x", ENDLESS, "rollout.num_servers=2", cwd=workplace, environment=environment
    ) as process:
        wait_for_notice("running", root, process)
        (root / "rollout-1.dies").touch()
        wait_for_notice("rollout-1 ended (exit code 2): starting it again", root, process)
        wait_until(
            lambda: any("--name rollout-1" in c for c in processes_of(root).values()),
            what="the third life of rollout-1",
            run_root=root,
            process=process,
        )
        code, out, _ = drain(process, root)
    assert code == 0
    assert out.count("rollout-1 ended (exit code 3): starting it again") == 1
    assert out.count("rollout-1 ended (exit code 2): starting it again") == 1


@pytest.mark.chaos
def test_a_run_continues_when_its_output_pipe_is_closed(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", ENDLESS, cwd=workplace) as process:
        wait_for_notice("running", root, process)
        assert process.stdout is not None
        process.stdout.close()
        os.kill(pid_of(root, "-m rollout_server "), signal.SIGKILL)  # the launcher prints that it has died
        wait_for_notice("the terminal or pipe is gone", root, process)
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        process.terminate()
        wait_until(lambda: process.poll() is not None, what="the end", run_root=root)
        assert process.returncode == 0
    assert list((root / "checkpoints").iterdir())


@pytest.mark.chaos
def test_the_launcher_reopens_its_log_and_shows_its_stacks(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    log = root / "logs" / "launcher.log"
    with launcher("name=x", ENDLESS, "daemon.exit_code_on_drain=77", cwd=workplace) as process:
        wait_for_notice("running", root, process)
        log.rename(root / "logs" / "launcher.log.1")
        process.send_signal(signal.SIGHUP)
        wait_for_notice("SIGHUP", root, process)
        process.send_signal(signal.SIGUSR1)
        wait_for_notice("SIGUSR1", root, process)
        code, out, err = drain(process, root)
    assert (code, err) == (77, "") and "the run was drained" in out
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("thread MainThread" in entry.get("stacks", "") for entry in entries)
    assert entries[-1]["message"] == "the run is drained"
    assert "was stopped by a user" not in out and (root / "logs").stat().st_mode & 0o777 == 0o700


@pytest.mark.long
def test_a_run_whose_terminal_goes_away_drains(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "run", "name=x", ENDLESS],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | scripted({}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)

    def has_drawn_and_trained() -> bool:
        has_output = bool(select.select([ours], [], [], 0)[0]) and bool(os.read(ours, 1 << 16))
        return has_output and num_steps_done(root) > 3

    try:
        wait_until(has_drawn_and_trained, what="steps", run_root=root, process=process)
    finally:
        os.close(ours)
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: process.poll() is not None, what="the end of the launcher", run_root=root)
    assert process.returncode == 0
    assert list((root / "checkpoints").iterdir())


def test_a_killed_buffer_and_trainer_are_started_again(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", ENDLESS, cwd=workplace) as process:
        wait_for_steps(3, root, process=process)
        before = {name: pid_of(root, f"-m {name} ") for name in ("buffer", "trainer", "rollout_server")}
        for name in ("buffer", "trainer"):
            os.kill(before[name], signal.SIGKILL)
            wait_until(
                lambda name=name: is_back(root, f"-m {name} ", after=before[name]),
                what=f"{name} is back",
                run_root=root,
                process=process,
            )
        commands = processes_of(root)
        assert before["rollout_server"] in commands, "a healthy daemon was restarted"
        assert not {before["buffer"], before["trainer"]} & set(commands)
        assert "buffer.ports=[12345]" in commands[pid_of(root, "-m buffer ")], "at its old port"
        assert commands[pid_of(root, "-m trainer ")].rstrip().endswith("resume=''"), (
            "there is no checkpoint yet"
        )
        (root / "checkpoints" / "step_000003").mkdir(parents=True)
        for words in ("resume=latest", "trainer.lr=3e-5"):
            os.kill(pid_of(root, "-m trainer "), signal.SIGKILL)
            if words == "trainer.lr=3e-5":  # orders while no trainer runs
                for order_id, rate in (("a", "2e-5"), ("b", "3e-5")):
                    _order_rate(rate, order_id, root, process)
            wait_until(
                lambda words=words: any(words in command for command in processes_of(root).values()),
                what=f"a trainer with {words}",
                run_root=root,
                process=process,
            )
        outcome = restart_outcome_file(RunPaths(root))
        wait_until(
            lambda: "b" in read_object(outcome).get("order_ids", []),
            what="the outcome of the orders",
            run_root=root,
            process=process,
        )
        assert read_object(outcome)["order_ids"] == ["a", "b"]
        code, out, _ = drain(process, root)
    assert code == 0
    assert out.count("ended (killed by SIGKILL): starting it again") == 4


def _order_rate(rate: str, order_id: str, root: Path, process: subprocess.Popen[str]) -> None:
    """Orders a trainer with this learning rate, and waits until the launcher has taken the order."""
    file = restart_order_file(RunPaths(root), order_id)
    write_json(file, {"role": "trainer", "settings": [f"trainer.lr={rate}"], "order_id": order_id})
    wait_until(lambda: not file.exists(), what="the order is taken", run_root=root, process=process)


@pytest.mark.chaos
def test_any_role_is_restarted_on_request(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workplace / "runs" / "x"
    monkeypatch.chdir(workplace)
    with launcher("name=x", ENDLESS, cwd=workplace) as process:
        wait_for_steps(1, root, process=process)
        wait_for_notice("running", root, process)
        for role, part, words in (
            ("rollout-0", "-m rollout_server ", []),
            ("buffer", "-m buffer ", []),
            ("trainer", "-m trainer ", ["trainer.lr=3e-5"]),
        ):
            before = pid_of(root, part)
            assert main(["restart", "x", role, *words]) == 0
            wait_until(
                lambda part=part, before=before: is_back(root, part, after=before),
                what=f"{role} is back",
                run_root=root,
                process=process,
            )
        assert "the trainer is ready with trainer.lr=3e-5" in capsys.readouterr().out
        assert load_config(["--config", str(root / "config.yaml")]).trainer.lr == 3e-5
        assert [change.by for change in read_changes(RunPaths(root))] == ["restart"]
        settings = (root / "config.yaml").read_bytes()
        assert main(["restart", "x", "trainer", "trainer.device=cuda:0"]) == 2
        assert (
            "refused trainer.device=cuda:0 (exit code 2: trainer-0: trainer.device" in capsys.readouterr().err
        )
        assert (root / "config.yaml").read_bytes() == settings
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        for words, message in (
            (["rollout-7"], "there is no 'rollout-7' (roles: trainer, rollout-0, buffer)"),
            (["rollout-0", "rollout.num_threads=2"], "rollout-0 keeps its settings"),
            (["trainer", "trainer.num_steps=5"], "the buffer uses trainer.num_steps too"),
        ):
            assert main(["restart", "x", *words]) == 2
            assert message in capsys.readouterr().err
        assert drain(process, root)[0] == 0
    assert main(["restart", "x", "trainer"]) == 2
    assert "continue the run with resume=latest" in capsys.readouterr().err
    log = "\n".join(launcher_log(root))
    assert "restarting rollout-0" in log and "rollout-0 has left: starting it again" in log
    assert load_config(["--config", str(root / "config.yaml")]).trainer.lr == 3e-5, "a resume has it too"


@pytest.mark.chaos
def test_a_trainer_without_progress_is_not_restarted_for_ever(workplace: Path) -> None:
    code, out, err = run(workplace, script={"trainer": "fail", "trainer-0": "fail"})
    assert code == 1
    assert out.count("trainer ended (exit code 1): starting it again") == 3
    assert "trainer died 4 times in a row" in err
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
    assert not (workplace / "runs" / "x").exists()


def test_a_directory_that_existed_before_stays(workplace: Path) -> None:
    notes = workplace / "runs" / "x" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("not by the launcher")
    assert run(workplace, script={"prepare_model": "user error"})[0] == 2
    assert notes.exists() and (notes.parent / "logs").exists()


@pytest.mark.chaos
def test_a_daemon_that_never_gets_ready_is_named(workplace: Path) -> None:
    code, _, err = run(workplace, "rollout.start_timeout_s=6", script={"rollout-0": "never ready"})
    assert code == 1
    assert "rollout-0 was not ready after" in err and "waiting for a peer" in err


def test_sigterm_drains_and_the_run_can_be_resumed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", ENDLESS, cwd=workplace) as process:
        wait_for_steps(3, root, process=process)
        code, out, err = drain(process, root)
    assert (code, err) == (0, "")
    assert "continue with: areal-like run name=x resume=latest" in out
    monkeypatch.chdir(workplace)
    assert main(["run", "name=x"]) == 2
    assert "resume=latest" in capsys.readouterr().err
    settings = (root / "config.yaml").read_bytes()
    code, out, err = run(workplace, "resume=latest", "trainer.lr=3e-5", script={"buffer": "user error"})
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "config.yaml stays as it was, without trainer.lr: 8e-05 -> 3e-05" in out
    assert (root / "config.yaml").read_bytes() == settings


@pytest.mark.chaos
def test_a_stop_while_the_model_is_prepared_is_a_drain(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    settings = ("name=x", "sft.train=rows.jsonl", "daemon.exit_code_on_drain=75")
    script = scripted({"prepare_model": "takes long"})
    with launcher(*settings, cwd=workplace, environment=script, verb="sft", is_forked=False) as process:
        wait_until(
            lambda: any("prepare_model" in command for command in processes_of(root).values()),
            what="the process that prepares the model",
            run_root=root,
            process=process,
        )
        code, _, err = drain(process, root)
    assert (code, err) == (75, "")


def test_a_daemon_that_ignores_sigterm_is_killed(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    settings = ("name=x", ENDLESS, "daemon.drain_timeout_s=4")
    with launcher(*settings, cwd=workplace, environment=scripted({"rollout-0": "ignore signals"})) as process:
        wait_for_notice("running", root, process)  # from then on it ignores them
        code, out, _ = drain(process, root)
    # test_lifecycle.py checks that the others have time left, with simulated time.
    assert code == 1 and "rollout-0 did not end in time" in out


@pytest.mark.chaos
def test_a_second_signal_ends_everything_at_once(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    # A drain would take longer than the test may.
    settings = ("name=x", ENDLESS, f"daemon.drain_timeout_s={2 * TEST_LIMIT_S}")
    with launcher(*settings, cwd=workplace, environment=scripted({"rollout-0": "ignore signals"})) as process:
        wait_for_notice("running", root, process)  # from then on it ignores them
        process.send_signal(signal.SIGINT)
        wait_for_notice("trainer ended: exit code 75", root, process)
        time.sleep(1.3)  # two signals within a second count as one
        process.send_signal(signal.SIGINT)
        code, out, _ = finish(process, root)
    assert code == 1 and "stopped at once" in out


@pytest.mark.long
def test_a_killed_launcher_leaves_its_lock_to_its_daemons(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", ENDLESS, cwd=workplace) as process:
        wait_for_steps(3, root, process=process)
        monkeypatch.chdir(workplace)
        assert main(["run", "name=x"]) == 2
        assert "in use" in capsys.readouterr().err
        process.kill()
        process.communicate()
        wait_until(lambda: not processes_of(root), what="the daemons end with their launcher", run_root=root)
    num_done = num_steps_done(root)
    code, out, _ = run(workplace, "resume=latest", "trainer.num_steps=3")
    assert code == 0
    assert out.startswith(f"resume of step {num_done} from {root}, its newest checkpoint\n")
    (change,) = read_changes(RunPaths(root))
    assert change.step == num_done and change.text.startswith("trainer.num_steps: ")
    prepared = [message for message in launcher_log(root) if message.startswith("prepare_model started")]
    assert len(prepared) == 1, "the resumed run had its model"
    assert load_config(["--config", str(root / "config.yaml")]).trainer.num_steps == 3


@pytest.mark.chaos
def test_a_server_that_a_user_stopped_is_not_replaced(workplace: Path) -> None:
    root = workplace / "runs" / "x"
    with launcher("name=x", "rollout.num_servers=2", ENDLESS, cwd=workplace) as process:
        wait_for_steps(3, root, process=process)
        for name in ("rollout-0", "rollout-1"):  # one of them is enough for these steps
            endpoint = root / "endpoints" / f"{name}.json"
            wait_until(endpoint.exists, what=f"{name} is ready", run_root=root, process=process)
        # A joined server that was killed has left this file; it does not count as a server.
        write_json(
            root / "endpoints" / "rollout-7.json", {"role": "rollout", "pid": 999_999, "http": "127.0.0.1:1"}
        )
        os.kill(pid_of(root, "--name rollout-0"), signal.SIGTERM)
        wait_for_notice("rollout-0 was stopped by a user", root, process)
        wait_for_steps(num_steps_done(root) + 10, root, process=process)
        os.kill(pid_of(root, "--name rollout-1"), signal.SIGTERM)
        code, out, _ = finish(process, root)
    assert code == 0
    assert "rollout-0 was stopped by a user" in out and "continue with" in out
