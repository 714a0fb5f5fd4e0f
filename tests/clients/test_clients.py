"""Clients and frameworks as they are by default, each in sessions of a whole job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from areal_like.trajectory import FinishReason
from tests.clients.clients import CLIENTS, NODE, RESULT, Client
from tests.clients.table import Row
from tests.support.agent_job import AgentJob
from tests.support.guide_code import code_of
from tests.support.launching import ROOT
from tests.support.waiting import HANG_LIMIT_S

PROGRAMS = Path(__file__).parent / "programs"
RUNS = [(client, run) for client in CLIENTS for run in client.runs]


@pytest.mark.parametrize(
    ("client", "run"), RUNS, ids=["-".join([client.program, *run]) for client, run in RUNS]
)
def test_a_client_makes_a_sample(
    job: AgentJob,
    url: str,
    place_of: Callable[[str], Path],
    check_row: Callable[[Row], None],
    tmp_path: Path,
    client: Client,
    run: tuple[str, ...],
) -> None:
    refused = job.refusals()
    job.policy.prompts.clear()
    job.policy.texts = list(client.says)
    place = place_of(client.environment)
    start = (started_in_node if client.environment == NODE else started_in_python)(place, tmp_path)
    process = subprocess.run(
        [*start, url, client.program, *run],
        env={
            "HOME": str(tmp_path),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "areal_like" / "client"),
            "no_proxy": "127.0.0.1",
            **client.variables,
        },
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_LIMIT_S,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["answer"] == client.answer and not job.policy.texts
    read = [job.renderer.decode(prompt) for prompt in job.policy.prompts]
    assert read[-1].count(RESULT) == client.results, read[-1]

    trajectory = job.fetch(result["group"])
    assert trajectory.reward == 1.0 and trajectory.finish_reason is FinishReason.STOP
    sampled = trajectory.tokens[trajectory.loss_mask == 1].tolist()
    said = [job.policy.tokens_of(text.removesuffix("\\")) for text in client.says]
    ends = [[] if text.endswith("\\") else job.renderer.stop_token_ids[:1] for text in client.says]
    assert sampled == [token for ids, end in zip(said, ends, strict=True) for token in (*ids, *end)]
    new = {status: count - refused.get(status, 0) for status, count in job.refusals().items()}
    assert {status: count for status, count in new.items() if count} == client.refused
    check_row(
        Row(
            client=client.name,
            mode=client.mode,
            version=", ".join(version_of(package, place) for package in client.packages),
            turns=trajectory.num_turns,
            segments=len(trajectory.segments) or 1,
            note=client.note,
        )
    )
    assert trajectory.num_turns == len(client.says)
    assert (len(trajectory.segments) or 1) == client.segments, "\n\n".join(read)


def started_in_python(place: Path, tmp_path: Path) -> list[str]:
    """The beginning of the command of a program."""
    return [str(place / "bin" / "python"), str(PROGRAMS / "run.py")]


def started_in_node(place: Path, tmp_path: Path) -> list[str]:
    """The beginning of the command of a program. Node finds packages beside the program only."""
    for program in PROGRAMS.glob("*.mjs"):
        shutil.copy(program, tmp_path)
    (tmp_path / "areal_like.mjs").write_text(code_of("agents", "areal_like.mjs"))
    (tmp_path / "node_modules").symlink_to(place / "node_modules")
    return ["node", str(tmp_path / "run.mjs")]


def version_of(package: str, place: Path) -> str:
    """The version of a package in an environment."""
    if (node := place / "node_modules").exists():
        return str(json.loads((node / package / "package.json").read_text())["version"])
    folders = [str(path) for path in place.glob("lib/python*/site-packages")]
    (found,) = Distribution.discover(name=package, path=folders)
    return found.version
