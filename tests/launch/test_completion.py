"""Completion: the words that may follow, and a real bash in a terminal."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from areal_like.paths import write_json
from launch.cli import COMMANDS, main
from launch.commands.completion import candidates
from tests.support.launching import ROOT


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with two runs, of which one has daemons."""
    for name in ("sort", "sums"):
        (tmp_path / "runs" / name / "logs").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    for name, role in (("buffer", "buffer"), ("rollout-0", "rollout"), ("rollout-1", "rollout")):
        write_json(tmp_path / "runs" / "sort" / "endpoints" / f"{name}.json", {"role": role})
        (tmp_path / "runs" / "sort" / "logs" / f"{name}.log").touch()
    (tmp_path / "runs" / "sort" / "endpoints" / "broken.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stat", ["status"]),
        ("unf", ["unfence"]),
        ("nonsense ", []),
        ("status s", ["sort", "sums"]),
        ("status sort s", []),
        ("status --w", ["--watch"]),
        ("drain sort ", ["rollout-0", "rollout-1"]),
        ("drain --buffer h:1 ", []),
        ("restart sort ", ["buffer", "rollout-0", "rollout-1", "trainer"]),
        ("restart sort trainer trainer.lr_", ["trainer.lr_schedule="]),
        ("logs sort rollout-0 b", ["buffer"]),
        ("logs sort --level W", ["WARNING"]),
        ("audit --json s", ["sort", "sums"]),
        ("run trainer.lr_schedule=", ["trainer.lr_schedule=constant", "trainer.lr_schedule=linear"]),
        ("run name=x model=", ["model=smollm2", "model=tiny"]),
        ("run buffer.retain_trajectories=", ["buffer.retain_trajectories=" + x for x in ("false", "true")]),
        ("keys ro", ["rotate"]),
        ("keys init ", []),
        ("data s", ["stats"]),
        ("fetch ", ["smollm2"]),
        ("completion ", ["bash", "fish", "zsh"]),
        ("run --config ", []),
        ("version ", []),
    ],
)
def test_words_that_may_follow(line: str, expected: list[str], place: Path) -> None:
    assert candidates(line.split(" "), directory=place) == expected


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_can_be_completed(verb: str, place: Path) -> None:
    options = candidates([verb, "-"], directory=place)
    assert "--help" in options
    candidates([verb, ""], directory=place)
    candidates([verb, "sort", ""], directory=place)


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert main(["completion"]) == 2
    assert "name a shell (bash, zsh, fish)" in capsys.readouterr().err


@pytest.mark.chaos
@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_completion_in_a_real_bash(place: Path) -> None:
    command = place / "bin" / "areal-like"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch "$@"\n')
    command.chmod(0o755)
    with Terminal(place) as terminal:
        terminal.type("source <(areal-like completion bash)\n")
        terminal.expect("\n> ")
        for typed, shown in (
            ("areal-like sta\t", "areal-like status "),
            ("\x15areal-like drain so\t", "areal-like drain sort "),  # \x15 removes the line
            ("\x15areal-like run trainer.lr_s\t", "areal-like run trainer.lr_schedule="),
            ("c\t", "constant "),
            ("\x15areal-like run --config ru\t", "areal-like run --config runs/"),
        ):
            terminal.type(typed)
            terminal.expect(shown)


class Terminal:
    """An interactive bash in a pseudo terminal."""

    def __init__(self, directory: Path) -> None:
        self._terminal, other = pty.openpty()
        environment = {
            "PATH": f"{directory}/bin:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "TERM": "dumb",
            "PS1": "> ",
            "HOME": str(directory),
            "INPUTRC": "/dev/null",
        }
        command = ["bash", "--norc", "--noprofile", "-i"]
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self._seen = ""

    def __enter__(self) -> Terminal:
        self.expect("> ")
        return self

    def __exit__(self, *exc: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._terminal)

    def type(self, text: str) -> None:
        """Types the text."""
        os.write(self._terminal, text.encode())

    def expect(self, text: str) -> None:
        """Waits until the text is shown."""
        while text not in self._seen:
            if select.select([self._terminal], [], [], 1.0)[0]:
                self._seen += os.read(self._terminal, 4096).decode(errors="replace").replace("\r", "")
        self._seen = ""
