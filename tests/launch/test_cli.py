"""The command line: one message and exit code 2 for a mistake, and a quick start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from areal_like.config import Config
from areal_like.runtime.command_line import load_config, save_config
from launch.cli import COMMANDS, main
from launch.settings_help import all_keys

ROOT = Path(__file__).resolve().parents[2]


def areal_like(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command as a process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "launch", *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "unknown command 'rnu': did you mean `run`?"),
        (
            ["run", "trainer.num_stpes=3"],
            "unknown key `trainer.num_stpes`: did you mean `trainer.num_steps`?",
        ),
        (["run", "trainer.num_steps=0"], "trainer.num_steps must be at least 1"),
        (["run", "max_staleness=soon"], "max_staleness"),
        (["run", "objective=magic"], "known choices are"),
        (["run", "fast"], "key=value"),
        (["run", "--config", "nowhere.yaml"], "no such file"),
        (["run", "--config"], "--config: name a resolved configuration file"),
        (["run", "--config", "a.yaml", "seed=1", "--config", "b.yaml"], "--config is given more than once"),
        (["run", "resume=latest"], "there is no run in"),
        (["run", "runs_dir=/proc/1/nowhere"], "cannot create the run directory"),
        (["status", "nowhere"], "no run 'nowhere'"),
        (["audit", "nowhere"], "no run 'nowhere'"),
        (["audit"], "audit: the following arguments are required: RUN"),
        (["drop", "nowhere"], "drop: the following arguments are required: TICKET"),
        (["drop", "nowhere", "x"], "'x' is not a ticket number"),
        (["replay", "objective=ppo"], "replay: put the run before the settings"),
        (["status"], "status: the following arguments are required: RUN"),
        (["version", "--foo"], "version: unrecognized arguments: --foo"),
        (["rollout", "nowhere"], "rollout: the following arguments are required: --join"),
        (["rollout", "--join", "name=x"], "rollout --join: there is no buffer to join"),
        (
            ["rollout", "nowhere", "--join", "--config", "job.yaml"],
            "rollout: --config is for the form without RUN: the settings of nowhere are in its directory",
        ),
        (["rollout", "--join", "--buffer", "a:1", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["replay"], "replay: the following arguments are required: RUN (usage"),
        (["restart", "nowhere"], "restart: the following arguments are required: ROLE (usage"),
        (["restart", "nowhere", "trainer"], "no run 'nowhere'"),
        (["restart", "nowhere", "trainer.lr=1"], "areal-like restart RUN trainer trainer.KEY=VALUE"),
        (["run", "model=/models/X"], "is model.path=/models/X"),
        (["run", "objective=tsi"], "did you mean tis?"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(args: list[str], message: str, tmp_path: Path) -> None:
    done = areal_like(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
    assert not list(tmp_path.iterdir()), "a mistake has left files behind"


def test_help_names_the_keys_with_their_defaults(tmp_path: Path) -> None:
    done = areal_like("run", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert (
        "model.path=tiny" in done.stdout
        and "rollout.engine=" in done.stdout
        and "--config FILE" in done.stdout
    )
    assert (
        "trainer.num_steps=" in done.stdout
        and "max_staleness=4" in done.stdout
        and "model=smollm2|tiny" in done.stdout
    )
    assert len(done.stdout.splitlines()) < 80


def test_every_command_has_help(tmp_path: Path) -> None:
    everything = areal_like("--help", cwd=tmp_path).stdout
    for verb, command in COMMANDS.items():
        assert f"areal-like {command.usage.splitlines()[0]}" in everything and command.summary in everything
        assert verb == command.usage.split()[0]
    for verb in ("audit", "rollout"):
        done = areal_like(verb, "default", "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: areal-like {verb} ")


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["rollout", "x", "--help"], ["drop", "-h"]])
def test_help_returns_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "areal-like" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["buffer", "rollout_server", "trainer", "trainer.prepare_model"])
def test_roles_have_help(module: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m {module}" in done.stdout and "--config FILE" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_printed_defaults_are_valid_settings(tmp_path: Path) -> None:
    defaults = [f"{setting.key}={setting.default}" for setting in all_keys()]
    assert load_config(defaults) == Config()
    save_config(Config(), tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml"), *defaults]) == Config()


def test_no_command_imports_torch_or_a_daemon() -> None:
    code = (
        "import sys, launch.cli, importlib\n"
        "for command in launch.cli.COMMANDS.values():\n"
        "    importlib.import_module(f'launch.commands.{command.module}')\n"
        "daemons = ('torch', 'transformers', 'buffer', 'trainer', 'rollout_server')\n"
        "print([name for name in daemons if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
