"""`areal-like submit --slurm` and `scale`, and what a job does on its node, with Slurm's commands played.

The tests with a real Slurm are in tests/cluster.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import Config, from_mapping
from areal_like.config.episode import SessionsConfig
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.cli import main
from launch.nodes.settings import settings_for_nodes
from launch.nodes.start import SIDE_ROLES, RolePlace, role_settings
from launch.slurm import jobs
from launch.slurm.jobs import to_end
from launch.slurm.node import end_others, own_address, place_of
from launch.slurm.options import SlurmOptions
from launch.slurm.scheduler import Job, submit
from launch.slurm.script import BODY, job_script
from tests.support.fake_slurm import calls, install
from tests.support.keys import new_keys


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a played Slurm; the current directory is where runs/ will be."""
    home = tmp_path / "slurm"
    for name, value in install(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return home


def script(role: str, options: SlurmOptions | None = None, **settings: object) -> list[str]:
    config = from_mapping({"name": "job", "runs_dir": "/shared/runs"} | settings)
    text = job_script(
        config,
        role,
        options or SlurmOptions(),
        python="/venv/bin/python",
        python_path="/code",
        directory=Path("/w d"),
    )
    return text.splitlines()


ADDRESS = "10.0.0.5"


def at(environment: dict[str, str]) -> RolePlace:
    return place_of(environment, address=ADDRESS)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (SlurmOptions(partition="p\ntouch /tmp/x"), {}),
        (SlurmOptions(), {"runs_dir": "/shared/a\nrm -rf b"}),
        (SlurmOptions(sbatch_args="'--comment=a\rb'"), {}),
        (SlurmOptions(interface="eth0\x00"), {}),
    ],
)
def test_an_option_is_no_second_line_of_a_script(options: SlurmOptions, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not printable"):
        script("buffer", options, **settings)


def test_options_are_quoted_for_sbatch() -> None:
    lines = script("buffer", SlurmOptions(time="1-00:00:00", partition='a"b #\\c'))
    assert "#SBATCH --time=1-00:00:00" in lines
    assert '#SBATCH "--partition=a\\"b #\\\\c"' in lines


def test_a_script_asks_for_what_its_role_needs() -> None:
    gpus = {"trainer": {"device": "cuda", "world_size": 16}, "rollout": {"engine_device": "cuda"}}
    options = SlurmOptions(
        trainer_nodes=2,
        partition="p",
        sbatch_args="'--account=a b'",
        trainer_args="--exclusive",
    )
    gpus |= {"scorer": {"device": "cuda:{index}", "path": "rm"}}
    trainer, rollout, buffer = (script(role, options, **gpus) for role in ("trainer", "rollout", "buffer"))
    assert "#SBATCH --gpus-per-node=1" in script("scorer", options, **gpus)
    assert not any("gpus" in line for line in script("router", options, **gpus))
    for line in (
        "--nodes=2",
        "--gpus-per-node=8",
        "--exclusive",
        "--partition=p",
        '"--account=a b"',
        "--requeue",
    ):
        assert f"#SBATCH {line}" in trainer
    assert {"#SBATCH --nodes=1", "#SBATCH --gpus-per-node=1"} <= set(rollout)
    assert "#SBATCH --exclusive" not in rollout and not any("gpus" in line for line in buffer)
    assert "#SBATCH --signal=B:USR2@60" in buffer, "the drain's limit of 30 s and a margin"
    assert "#SBATCH --comment=/shared/runs/job" in buffer and "WORKDIR='/w d'" in buffer
    names = [next(line for line in each if "job-name" in line) for each in (trainer, rollout, buffer)]
    assert names == [f"#SBATCH --job-name=areal-job-{role}" for role in ("trainer", "rollout", "buffer")]


def test_each_role_binds_the_address_of_its_node() -> None:
    one = {"SLURM_JOB_ID": "31007", "SLURM_JOB_NUM_NODES": "1"}
    assert 'buffer.host="10.0.0.5"' in role_settings("buffer", at(one), SessionsConfig())
    assert 'rollout.host="10.0.0.5"' in role_settings("rollout", at(one), SessionsConfig())
    sides = [setting for role in SIDE_ROLES for setting in role_settings(role, at(one), SessionsConfig())]
    config = load_config(["scorer.advertise_host=elsewhere", *sides])
    assert (config.scorer.host, config.scorer.advertise_host) == ("10.0.0.5", "")
    assert (config.sessions.router_host, config.daemon.http_host) == ("10.0.0.5", "10.0.0.5")
    assert 'sessions.host="10.0.0.5"' in role_settings("rollout", at(one), SessionsConfig())
    chosen = SessionsConfig(host="0.0.0.0", router_host="0.0.0.0")
    for role in ("rollout", "router"):
        assert not any("sessions." in each for each in role_settings(role, at(one), chosen))
    assert not any("rendezvous" in each for each in role_settings("trainer", at(one), SessionsConfig()))
    two = one | {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "AREAL_LIKE_FIRST_ADDRESS": "10.0.0.4"}
    config = load_config(["trainer.world_size=4", *role_settings("trainer", at(two), SessionsConfig())])
    assert config.weights.host == "10.0.0.4" and config.daemon.http_host == "10.0.0.5"
    assert (config.trainer.num_hosts, config.trainer.host_index) == (2, 1)
    assert config.trainer.rendezvous == "10.0.0.4:21007"


def test_each_start_of_a_server_has_a_name_of_its_own() -> None:
    first = place_of({"SLURM_JOB_ID": "12"}, address="10.0.0.5")
    again = place_of({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}, address="10.0.0.5")
    assert first.name_of("rollout") != again.name_of("rollout")
    assert first.name_of("scorer") == again.name_of("scorer"), "the newest start is the one that is found"
    for role in ("rollout", "scorer", "router"):
        last = again.name_of(role).rpartition("-")[2]
        assert not last.isdigit(), "a number at the end would choose GPUs and ports"
    assert first.name_of("trainer") == ""


def test_the_address_of_a_node_is_one_that_others_reach(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"SLURMD_NODENAME": "n1"}
    monkeypatch.setenv("FAKE_SLURM_ADDRESS", "10.0.0.7")
    assert own_address(node) == "10.0.0.7"
    monkeypatch.setenv("FAKE_SLURM_ADDRESS", "localhost")
    with pytest.raises(ConfigError, match="submit with --interface"):
        own_address(node)
    assert own_address(node | {"AREAL_LIKE_INTERFACE": "lo"}) == "127.0.0.1"
    with pytest.raises(ConfigError, match="--interface none0: no IPv4 address"):
        own_address(node | {"AREAL_LIKE_INTERFACE": "none0"})


@pytest.mark.parametrize("setting", ["scorer.port=7000", "sessions.router_port=7000"])
def test_two_on_one_node_have_no_fixed_port(setting: str) -> None:
    settings = ["name=x", "scorer.path=rm", "security.insecure=true", setting]
    settings_for_nodes([*settings, "sessions.num_routers=1"], trainer_nodes=1)
    with pytest.raises(ConfigError, match=f"submit: {setting}: .* leave"):
        settings_for_nodes([*settings, "scorer.num_servers=2", "sessions.num_routers=2"], trainer_nodes=1)


def test_a_model_as_reward_needs_score_servers() -> None:
    for reward in ("model", "{name: model, chat: true}", "[exact, {name: model, weight: 2}]"):
        tasks = [f"task={{name: data, train: t, reward: {reward}}}"]
        tasks.append(f"task={{name: mixture, tasks: {{a: {{name: data, gold_reward: {reward}}}}}}}")
        for task in tasks if not reward.startswith("[") else tasks[:1]:
            with pytest.raises(ConfigError, match=r"^submit: task: the reward `model` without `url`"):
                settings_for_nodes(["name=x", task, "security.insecure=true"], trainer_nodes=1)
            settings_for_nodes(["name=x", task, "scorer.path=rm", "security.insecure=true"], trainer_nodes=1)
    asks = "task={name: data, train: t, reward: {name: model, url: 'http://a'}}"
    settings_for_nodes(["name=x", asks, "security.insecure=true"], trainer_nodes=1)


def test_waiting_servers_go_first_and_then_the_newest() -> None:
    states = {1: "RUNNING", 2: "PENDING", 3: "RUNNING", 4: "RUNNING"}
    jobs = [Job(job_id=number, name="r", state=state) for number, state in states.items()]
    assert [job.job_id for job in to_end(jobs, 1)] == [2, 4, 3]
    assert to_end(jobs, 4) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["name=x"], "submit: give --slurm or --ray"),
        (["--slurm", "name=x"], "areal-like keys init DIR"),
        (["--slurm", "security.keys=nowhere"], "nowhere"),
        (["--slurm", "security.insecure=true", "buffer.num_shards=2"], "set it to 1"),
        (["--slurm", "security.insecure=true", "--trainer-nodes", "2"], "cannot be divided evenly"),
        (["--slurm", "security.insecure=true", "--rollout-jobs", "0"], "use 1 to 1000"),
        (["--slurm", "security.insecure=true", "--sbatch-args=account"], "not an option of the form"),
        (["--slurm", "security.insecure=true", "buffer.durability=none"], "would have lost its ledger"),
        (["--slurm", "--join", "nothing"], "there is no run"),
    ],
)
def test_a_mistake_submits_nothing(
    slurm: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert main(["submit", *settings]) == 2
    assert message in capsys.readouterr().err
    assert not any(call.startswith("sbatch") for call in calls(slurm)) and not Path("runs").exists()


def test_without_slurm_one_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--slurm", "name=x", "security.insecure=true"]) == 2
    assert "not installed here" in capsys.readouterr().err


def test_a_dry_run_prints_the_scripts_only(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_keys(Path("keys"))
    assert main(["submit", "--slurm", "--dry-run", "name=x", "security.keys=keys"]) == 0
    text = capsys.readouterr().out
    assert text.count("#!/bin/bash") == 3 and "nothing was submitted" in text
    assert not calls(slurm) and not Path("runs").exists()


def test_a_local_run_is_not_scaled(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path("runs/x")
    root.mkdir(parents=True)
    (root / "config.yaml").write_text("name: x\n")
    assert main(["scale", "x", "2"]) == 2
    assert "areal-like rollout x --join" in capsys.readouterr().err and not calls(slurm)


def test_submit_join_and_scale(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_keys(Path("keys"))
    submit = ["submit", "--slurm", "name=x", "security.keys=keys", "--rollout-jobs", "2"]
    assert main(submit) == 0
    submitted = [call for call in calls(slurm) if call.startswith("sbatch")]
    roles = [call.rpartition("/")[2] for call in submitted]
    assert roles == ["buffer.sh", "trainer.sh", "rollout.sh", "rollout.sh"]
    assert all("--dependency=after:101" in call for call in submitted[1:])
    config = load_config(["--config", "runs/x/config.yaml"])
    assert (config.resume, config.buffer.discovery, config.daemon.exit_code_on_drain) == (
        "auto",
        "run_dir",
        75,
    )
    assert config.security.keys == str(Path("keys").resolve())
    assert Path("runs/x").stat().st_mode & 0o077 == 0
    secrets = [file.read_text().strip() for file in Path("keys").glob("*.token")]
    for file in Path("runs/x/slurm").iterdir():
        assert not any(secret in file.read_text() for secret in secrets)

    assert main(submit) == 2
    assert "has jobs already (101, 102, 103, 104)" in capsys.readouterr().err
    assert main(["submit", "--slurm", "--join", "x"]) == 0
    assert main(["scale", "x", "4"]) == 0
    capsys.readouterr()
    assert main(["scale", "x", "4"]) == 0
    assert "has 4 rollout jobs" in capsys.readouterr().out
    assert main(["scale", "x", "1"]) == 0
    cancelled = [call for call in calls(slurm) if call.startswith("scancel")]
    assert cancelled == [
        "scancel --quiet 106",
        "scancel --quiet 105",
        "scancel --quiet --signal=TERM --batch 104",
    ]
    assert main(["scale", "x", "0"]) == 2
    (slurm / "queue.json").write_text("[]")
    capsys.readouterr()
    assert main(["scale", "x", "3"]) == 2
    assert "has no jobs in the queue" in capsys.readouterr().err


def test_score_servers_and_routers_have_jobs(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ["scorer.path=rm", "scorer.num_servers=2", "sessions.num_routers=1"]
    assert main(["submit", "--slurm", "name=x", "security.insecure=true", "--rollout-jobs", "1", *sides]) == 0
    assert "scorer: job 103, 104\nrouter: job 105\nrollout: job 106\n" in capsys.readouterr().out
    config = load_config(["--config", "runs/x/config.yaml"])
    paths = RunPaths.of(config)
    end_others(config, paths, SIDE_ROLES, own=101)
    ended = [int(call.rpartition(" ")[2]) for call in calls(slurm) if call.startswith("scancel")]
    assert ended == [103, 104, 105]


@pytest.mark.parametrize("state", ["OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED", "TIMEOUT"])
def test_jobs_that_have_ended_are_not_in_the_queue(slurm: Path, state: str) -> None:
    """squeue shows them for some minutes, in which the run could neither be continued nor scaled."""
    submit = ["submit", "--slurm", "name=x", "security.insecure=true", "--rollout-jobs", "2"]
    assert main(submit) == 0
    queue = json.loads((slurm / "queue.json").read_text())
    (slurm / "queue.json").write_text(json.dumps([job | {"state": state} for job in queue]))
    assert main(submit) == 0
    assert len(json.loads((slurm / "queue.json").read_text())) == 8


def test_a_refused_job_takes_the_others_back(
    slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SLURM_MOST", "3")
    monkeypatch.setenv("FAKE_SLURM_KILL_WAIT", "10")
    assert main(["submit", "--slurm", "name=x", "security.insecure=true", "--rollout-jobs", "3"]) == 2
    error = capsys.readouterr().err
    assert "QOSMaxSubmitJobPerUserLimit" in error and "KillWait is 10 s" in error
    assert calls(slurm)[-1] == "scancel --quiet 101 102 103"


def test_ctrl_c_takes_submitted_jobs_back(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(script: Path, *options: str) -> int:
        if script.name == "rollout.sh":
            raise KeyboardInterrupt
        return submit(script, *options)

    monkeypatch.setattr(jobs, "submit", interrupted)
    assert main(["submit", "--slurm", "name=x", "security.insecure=true"]) == 130
    assert calls(slurm)[-1] == "scancel --quiet 101 102"


def test_a_run_that_has_begun_keeps_its_options(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit = ["submit", "--slurm", "name=x", "security.insecure=true", "trainer.world_size=4"]
    submit.append("objective={name: tis}")
    given = ["--trainer-nodes", "2", "--partition", "p", "--sbatch-args=--qos=high", "--rollout-jobs", "2"]
    assert main([*submit, *given]) == 0
    kept = Path("runs/x/slurm/options.json")
    stored = json.loads(kept.read_text())
    assert (stored["trainer_nodes"], stored["sbatch_args"], stored["time"]) == (2, "--qos=high", "")

    def again(*words: str) -> str:
        (slurm / "queue.json").write_text("[]")
        capsys.readouterr()
        assert main(["submit", "--slurm", "name=x", *words]) == 0
        return capsys.readouterr().out

    (Path("runs/x/ledger")).mkdir()
    (Path("runs/x/ledger/ledger.sqlite3")).touch()  # the run has begun
    out = again("--partition", "other", "sampling.max_new_tokens=2048")
    config = load_config(["--config", "runs/x/config.yaml"])
    assert (config.sampling.max_new_tokens, config.objective) == (2048, {"name": "tis"}), "as it began"
    assert "--rollout-jobs=2 --trainer-nodes=2 --sbatch-args=--qos=high\n" in out, out
    trainer = Path("runs/x/slurm/trainer.sh").read_text()
    for line in ("--nodes=2", "--partition=other", "--qos=high"):
        assert f"#SBATCH {line}\n" in trainer
    assert (
        out.count("rollout: job ") == 1 and len(out.partition("rollout: job ")[2].split("\n")[0].split()) == 2
    )
    out = again("--partition", "", "rollout.num_servers=1", "--dry-run")
    assert "--partition" not in out and "jobs: 1 buffer, 1 trainer, 1 rollout;" in out
    assert json.loads(kept.read_text())["partition"] == "other", "a dry run changes nothing"
    kept.write_text('{"trainer_nodes": "2"}')
    assert main(["submit", "--slurm", "name=x"]) == 2
    assert "trainer_nodes: want int, got '2'" in capsys.readouterr().err


def test_a_run_of_the_same_name_elsewhere_is_another_one(slurm: Path) -> None:
    for runs_dir in ("a", "b"):
        settings = ["name=x", f"runs_dir={runs_dir}", "security.insecure=true"]
        assert main(["submit", "--slurm", *settings]) == 0
    assert len([call for call in calls(slurm) if call.startswith("sbatch")]) == 6


class PlayedJob:
    """job.sh around a daemon that this test plays: a script in the place of the interpreter."""

    def __init__(self, slurm: Path, daemon: str, *, role: str = "trainer", restarts: int = 0) -> None:
        self.run = slurm / "run"
        (self.run / "slurm").mkdir(parents=True, exist_ok=True)
        python = slurm / "python"
        python.write_text(
            f'#!/bin/bash\necho "$@" >> {slurm}/python.txt\n[ "$3" != end ] || exit 0\n{daemon}\n'
        )
        python.chmod(0o755)
        head = [
            *(f"ROLE={role}", f"RUN={self.run}", f"PYTHON={python}", f"WORKDIR={slurm}"),
            *("MAX_FAILURES=2", "EARLY_S=600"),
        ]
        (slurm / "job.sh").write_text("\n".join([*head, BODY.read_text()]))
        environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
        self.process = subprocess.Popen(
            ["bash", str(slurm / "job.sh")],
            env=os.environ | environment | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._slurm = slurm

    def end(self) -> tuple[int, str]:
        """(exit code, output)"""
        out, _ = self.process.communicate()
        return self.process.returncode, out

    @property
    def is_requeued(self) -> bool:
        return "scontrol requeue 7" in calls(self._slurm)

    @property
    def finishes_the_run(self) -> bool:
        return f"-m launch.slurm.node finish {self.run}" in (self._slurm / "python.txt").read_text()

    @property
    def ends_the_run(self) -> bool:
        return f"-m launch.slurm.node end {self.run}" in (self._slurm / "python.txt").read_text()


DRAINS = "trap 'exit 75' TERM\ntouch ready\nwhile :; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("code", "role", "is_requeued", "ends_the_run", "exit_code"),
    [
        (0, "trainer", False, False, 0),
        (75, "rollout", False, False, 0),
        (1, "trainer", True, False, 0),
        (137, "rollout", True, False, 0),
        (2, "trainer", False, True, 2),
        (2, "rollout", False, False, 2),
        (0, "buffer", False, False, 0),
        (75, "buffer", False, False, 0),
        (2, "scorer", False, True, 2),
    ],
)
def test_the_exit_code_decides_what_becomes_of_a_job(
    slurm: Path, code: int, role: str, is_requeued: bool, ends_the_run: bool, exit_code: int
) -> None:
    job = PlayedJob(slurm, f"exit {code}", role=role)
    assert job.end()[0] == exit_code
    assert (job.is_requeued, job.ends_the_run) == (is_requeued, ends_the_run)
    assert job.finishes_the_run == ((code, role) == (0, "buffer")), "who else ends score servers?"


@pytest.mark.parametrize(("number", "is_requeued"), [(signal.SIGTERM, False), (signal.SIGUSR2, True)])
def test_a_signal_drains_and_only_the_time_limit_requeues(
    slurm: Path, number: signal.Signals, is_requeued: bool
) -> None:
    job = PlayedJob(slurm, DRAINS)
    while not (slurm / "ready").exists():
        time.sleep(0.02)
    job.process.send_signal(number)
    assert job.end()[0] == 0 and job.is_requeued is is_requeued


def test_failures_in_a_row_end_the_run(slurm: Path) -> None:
    for attempt in range(2):
        job = PlayedJob(slurm, "exit 1")
        assert f"(failure {attempt + 1} of 2)" in job.end()[1]
        assert not job.ends_the_run
    job = PlayedJob(slurm, "exit 1")
    assert job.end()[0] == 1 and job.ends_the_run


def test_a_job_that_was_replaced_does_not_touch_its_successor(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script on a lost node ends after Slurm has started the job elsewhere."""
    monkeypatch.setenv("FAKE_SLURM_RESTARTS", "1")
    job = PlayedJob(slurm, "exit 1")
    assert "ended or restarted this job already" in job.end()[1]
    assert not job.is_requeued and not job.ends_the_run
    job = PlayedJob(slurm, "exit 2")
    assert job.end()[0] == 2 and not job.ends_the_run
    job = PlayedJob(slurm, "exit 1", restarts=1)
    job.end()
    assert job.is_requeued, "this one is the successor"


def test_a_run_of_a_launcher_is_not_submitted_beside_it(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.run_directory.rundir import is_over, lock

    config = dataclasses.replace(Config(), name="x", runs_dir="runs")
    held = lock(RunPaths.of(config))
    submit = ["submit", "--slurm", "name=x", "security.insecure=true"]
    assert main(submit) == 2
    assert "is in use" in capsys.readouterr().err
    os.close(held)
    assert main(submit) == 0
    assert not is_over(RunPaths.of(config))
