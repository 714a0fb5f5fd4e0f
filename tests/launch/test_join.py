"""`areal-like rollout --join` on a machine that cannot see the run's directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_like.config import from_mapping
from areal_like.runtime.command_line import role_arguments, save_config
from areal_like.wire.addresses import buffer_addresses
from launch.cli import main
from launch.commands import join


class FinishedServer:
    """Stands for a rollout server that ends at once; records its command."""

    commands: list[list[str]]

    def __init__(self, command: list[str], **options: object) -> None:
        self.commands.append(command)

    def poll(self) -> int:
        return 0


class NoSignals:
    """Stands for StopSignals, which would replace pytest's handlers."""

    count = 0


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of the servers that were started."""
    monkeypatch.setattr(FinishedServer, "commands", [], raising=False)
    monkeypatch.setattr(join.subprocess, "Popen", FinishedServer)
    monkeypatch.setattr(join, "StopSignals", NoSignals)
    return FinishedServer.commands


def test_join_reads_the_jobs_settings_from_a_file(tmp_path: Path, commands: list[list[str]]) -> None:
    file = tmp_path / "job.yaml"
    runs_dir = str(tmp_path / "elsewhere")
    save_config(from_mapping({"name": "x", "seed": 7, "max_staleness": 2, "runs_dir": runs_dir}), file)
    where = ["--buffer", "10.0.0.1:5555", "--name", "l"]
    assert main(["rollout", "--join", *where, "--config", str(file), "max_staleness=3"]) == 0
    (command,) = commands
    assert command[1:3] == ["-m", "rollout_server"]
    config, name = role_arguments(command[3:], default_name="")
    assert (name, config.name, config.seed, config.max_staleness) == ("l", "x", 7, 3)
    assert buffer_addresses(config) == ["tcp://10.0.0.1:5555"]
