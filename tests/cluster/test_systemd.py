"""The systemd units: systemd accepts every line; their commands run a job whose buffer is started again."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from areal_like.paths import read_endpoint
from tests.cluster.test_kubernetes import SMALL
from tests.support.launching import areal_like, num_steps_done
from tests.support.ports import free_port
from tests.support.reward_models import write_reward_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
UNITS = Path(__file__).parents[2] / "launch" / "deploy" / "systemd"
COMMON = Path("areal-.service.d") / "common.conf"
"""systemd reads it for each unit whose name begins with `areal-`."""
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with this machine's paths."""
    out = tmp_path / "units"
    out.mkdir()
    for file in (path for path in UNITS.rglob("*") if path.is_file()):
        text = file.read_text().replace("/opt/areal-like/.venv/bin/python", sys.executable)
        text = text.replace("/etc/areal-like", str(out)).replace("/var/lib/areal-like", str(tmp_path))
        (out / file.relative_to(UNITS)).parent.mkdir(exist_ok=True)
        (out / file.relative_to(UNITS)).write_text(text)
    return out


def test_systemd_accepts_every_line(units: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    _make_instances(units)
    found = (path for path in units.iterdir() if path.suffix in (".service", ".target"))
    names = sorted(str(path) for path in found if not path.stem.endswith("@"))
    # It ends with 0 also for lines that systemd ignores; its messages tell.
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *names],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_reads_the_common_settings_of_each_unit(units: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    _make_instances(units)
    with (units / COMMON).open("a") as file:
        file.write("NoSuchSetting=1\n")
    for name in ("areal-buffer", "areal-trainer", "areal-rollout@0", "areal-scorer@0", "areal-router@0"):
        command = ["systemd-analyze", "verify", "--man=no", str(units / f"{name}.service")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "NoSuchSetting" in done.stderr, name


def _make_instances(units: Path) -> None:
    for template in list(units.glob("*@.service")):
        (units / template.name.replace("@.", "@0.")).symlink_to(template)


class Service:
    """What systemd does for one unit, as far as a command and its restarts go."""

    def __init__(self, units: Path, name: str) -> None:
        template, _, instance = name.partition("@")
        file = units / f"{template}{'@' if instance else ''}.service"
        text = (units / COMMON).read_text() + file.read_text()
        lines = [line.partition("=") for line in text.splitlines() if "=" in line]
        self.fields = {key: value for key, _, value in lines if not key.startswith("#")}
        pairs = (line.partition("=") for line in (units / "areal.env").read_text().splitlines())
        self._environment = {key: value for key, _, value in pairs if value and not key.startswith("#")}
        self._words = [
            word.replace("%i", instance)
            for word in shlex.split(self.fields["ExecStart"])
            if not word.startswith("$")  # an empty variable is no word
        ]
        self.log = units.parent / f"{name}.log"
        self.start()

    def start(self) -> None:
        environment = os.environ | self._environment | {"PYTHONPATH": str(PROJECT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._words, cwd=self.fields["WorkingDirectory"], env=environment, stdout=log, stderr=log
            )

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=float(self.fields["TimeoutStopSec"]))


def test_the_units_commands_run_a_job(units: Path, tmp_path: Path) -> None:
    job = yaml.safe_load((units / "job.yaml").read_text())
    for section, values in SMALL.items():
        job[section] = job.get(section, {}) | values
    job["buffer"]["port"] = free_port()
    job["model"]["path"] = str(tmp_path / "model")
    (units / "job.yaml").write_text(yaml.safe_dump(job))
    made = [sys.executable, "-m", "trainer.prepare_model", "--config", str(units / "job.yaml"), "--out"]
    subprocess.run([*made, str(tmp_path / "model"), "model.path=tiny"], cwd=PROJECT, check=True, timeout=60)
    names = ("areal-buffer", "areal-rollout@0", "areal-rollout@1", "areal-trainer")
    root = tmp_path / "runs" / "first"
    with contextlib.ExitStack() as stack:
        services = [Service(units, name) for name in names]
        for service in services:
            stack.callback(service.process.kill)
        buffer, server, _, trainer = services

        def wait_for_steps(number: int) -> None:
            end_s = time.monotonic() + 90
            while num_steps_done(root) < number:
                assert time.monotonic() < end_s, "\n".join(one.log.read_text()[-1500:] for one in services)
                time.sleep(0.2)

        wait_for_steps(3)
        buffer.process.kill()
        buffer.process.wait()
        buffer.start()
        stack.callback(buffer.process.kill)
        wait_for_steps(num_steps_done(root) + 3)
        assert server.stop() == 0 and trainer.stop() == 0, "a drain is no failure, so nothing restarts them"
        server.start()
        trainer.start()
        stack.callback(server.process.kill)
        stack.callback(trainer.process.kill)
        for service in services:
            assert service.process.wait(timeout=90) == 0, service.log.read_text()[-2000:]
    assert json.loads((root / "summary.json").read_text())["finished"]
    assert areal_like("audit", str(root), cwd=tmp_path).returncode == 0


def test_the_units_of_a_reward_model_and_a_router(units: Path, tmp_path: Path) -> None:
    """Their commands read the same settings as the others, and serve."""
    job = yaml.safe_load((units / "job.yaml").read_text())
    job |= {"scorer": {"path": write_reward_model(tmp_path / "rm")}}
    (units / "job.yaml").write_text(yaml.safe_dump(job))
    endpoints = tmp_path / "runs" / "first" / "endpoints"
    with contextlib.ExitStack() as stack:
        for name, url in (("areal-scorer@0", "scores"), ("areal-router@0", "sessions")):
            service = Service(units, name)
            stack.callback(service.process.kill)
            file = endpoints / f"{name.removeprefix('areal-').replace('@', '-')}.json"
            end_s = time.monotonic() + 90
            while url not in (read_endpoint(file) or {}):
                assert time.monotonic() < end_s and service.process.poll() is None, service.log.read_text()
                time.sleep(0.2)
            assert service.stop() == 0


def test_a_wrong_setting_is_not_started_again(units: Path) -> None:
    (units / "job.yaml").write_text("name: first\nbuffer: {lease_timeout_s: -1}\n")
    service = Service(units, "areal-buffer")
    assert str(service.process.wait(timeout=30)) == service.fields["RestartPreventExitStatus"]
