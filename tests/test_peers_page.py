"""docs/reference/peers.md: sources are at the commits of its first table, and every claim has its command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.cli import COMMANDS
from tests.support.launching import ROOT

PAGE = (ROOT / "docs" / "reference" / "peers.md").read_text()
CLAIMS = PAGE.split("## This project's claims")[1]
CHECKS = [row.split("|")[2] for row in CLAIMS.splitlines() if row.startswith("| ") and "| check |" not in row]


def test_every_source_is_a_file_at_the_commit_of_its_system() -> None:
    dated = dict(re.findall(r"^\| ([\w-]+) \| ([0-9a-f]{7}) \| 2026-\d\d-\d\d \|", PAGE, re.M))
    links = re.findall(r"\]\(https://github\.com/[\w-]+/([\w-]+)/blob/([0-9a-f]{40})/[^)\s]+\)", PAGE)
    assert len(links) == PAGE.count("](https://")
    names = {"RL": "NeMo-RL", "trl": "TRL"}
    assert {(names.get(repository, repository), commit[:7]) for repository, commit in links} == set(
        dated.items()
    )


@pytest.mark.parametrize("check", CHECKS)
def test_the_check_of_a_claim_exists(check: str) -> None:
    commands = [command for command in re.findall(r"`([^`]+)`", check) if " " in command]
    assert commands
    for command in commands:
        if command.startswith("areal-like "):
            assert command.split()[1] in COMMANDS
        elif module := re.fullmatch(r"python -m (benchmarks\.\w+)", command):
            assert (ROOT / f"{module[1].replace('.', '/')}.py").is_file()
        else:
            assert command.startswith("python -m pytest ")
            files = [Path(word) for word in command.split() if word.endswith(".py")]
            assert files and all((ROOT / file).is_file() for file in files)
