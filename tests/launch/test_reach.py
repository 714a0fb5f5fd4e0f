"""Commands for a job whose roles were started by hand: by its directory, and by its buffer's address."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import Config, to_mapping
from areal_like.config.default_objective import default_objective
from areal_like.runtime.command_line import keep_config, load_config
from areal_like.security.redaction import HIDDEN, PUBLIC, has_secret_name, without_secrets
from launch.cli import main
from launch.observation.observer import merged_peers, merged_status
from launch.observation.polled_steps import PolledSteps
from launch.observation.reach import RunningJob, peer_view
from launch.settings_help import all_keys
from tests.support.buffer_harness import BufferProcess, job
from tests.support.certificates import make_certificate
from tests.support.keys import make_keys
from tests.support.launching import launcher, wait_until

ELSEWHERE = "elsewhere"
"""Directory from which a test cannot see `runs/`."""


def by_hand(directory: Path, **overrides: Any) -> BufferProcess:
    """A buffer whose settings are in a file outside the run's directory."""
    return BufferProcess(job(directory, **overrides), settings_file=directory / "job.yaml")


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BufferProcess]:
    process = by_hand(tmp_path_factory.mktemp("job"))
    try:
        process.produce("rollout-0")
        process.produce("rollout-1")
        process.wait_status(lambda status: len(status["peers"]) == 2)
        yield process
    finally:
        process.close()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def test_the_buffer_keeps_the_settings_of_roles_by_hand(buffer: BufferProcess) -> None:
    kept = load_config(["--config", str(buffer.paths.config)])
    assert kept == buffer.config.with_resolved_objective() and kept.objective == default_objective()
    buffer.paths.config.write_text(buffer.paths.config.read_text() + "# mine\n")
    keep_config(dataclasses.replace(buffer.config, seed=9), buffer.paths.config)
    assert buffer.paths.config.read_text().endswith("# mine\n"), "it is never overwritten"


def test_a_kept_configuration_names_no_ones_key(tmp_path: Path) -> None:
    security = dataclasses.replace(Config().security, keys="/keys", identity="buffer-a")
    keep_config(dataclasses.replace(Config(), security=security), tmp_path / "config.yaml")
    kept = load_config(["--config", str(tmp_path / "config.yaml")])
    assert (kept.security.keys, kept.security.identity) == ("/keys", "")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.usefixtures("elsewhere")
def test_status_as_an_object(buffer: BufferProcess, capsys: pytest.CaptureFixture[str]) -> None:
    buffer.wait_status(lambda status: status["rates"]["samples_per_s"] is not None)

    def status_of(*where: str) -> dict[str, Any]:
        assert main(["status", *where, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    def age_s(status: dict[str, Any]) -> float:
        ages = {one["name"]: one.get("weights_age_s") for one in status["daemons"]}
        return ages.get("rollout-1") or 0.0

    wait_until(lambda: age_s(status_of("--buffer", buffer.http)) > 0, what="weights of some age")
    for where in ([str(buffer.paths.root)], ["--buffer", buffer.http]):
        shown = status_of(*where)
        assert (shown["run"], shown["answers"], shown["step"], shown["num_steps"]) == ("job", True, 0, 6)
        assert set(shown["rates"]) == {
            "window_s",
            "samples_per_s",
            "tokens_generated_per_s",
            "tokens_trained_per_s",
            "steps_per_min",
            "drops_per_min",
        }
        by_name = {each["name"]: each for each in shown["daemons"]}
        server = by_name["rollout-1"]
        assert (server["role"], server["state"], server["versions_behind"]) == ("rollout", "serving", 0)
        assert server["leases"] >= 0 and server["weights_age_s"] > 0 and server["weights_version"] == 0
        assert shown["tickets"]["issued"] >= 0 and by_name["buffer"]["http"] == buffer.http


def test_status_again_and_again(buffer: BufferProcess, tmp_path: Path) -> None:
    words = ("status", "--buffer", buffer.http, "--json", "--watch", "0.1")
    with launcher(*words[1:], verb=words[0], cwd=tmp_path) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert lines[0]["time_unix_s"] < lines[2]["time_unix_s"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.usefixtures("elsewhere")
def test_the_view_from_another_machine(buffer: BufferProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--buffer", buffer.http, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "step 0/6" in shown and "rollout-1" in shown and "tickets" in shown


def test_the_curve_is_built_from_polled_steps() -> None:
    def answer(step: int, reward: float, lags: dict[str, int]) -> dict[str, Any]:
        stats = {"row_step": float(step), "reward_mean": reward, "lag_max": 2.0}
        rank0 = {"name": "trainer-0", "role": "trainer", "stats": stats, "silent_s": 0.1}
        return {"peers": [rank0], "lag_histogram": lags, "max_staleness": 4}

    polled = PolledSteps()
    assert polled.see([], unix_s=0.0).recent == ()
    polled.see([answer(3, 0.25, {"0": 8})], unix_s=1.0)
    polled.see([answer(3, 0.25, {"0": 8})], unix_s=2.0)
    progress = polled.see([answer(5, 0.75, {"0": 10, "1": 6})], unix_s=3.0)
    assert [row["step"] for row in progress.recent] == [3, 5]
    assert progress.recent[-1]["lag_histogram"] == {"0": 2, "1": 6}
    assert progress.rewards == (0.25, 0.75) and progress.lag_max == 2.0
    resumed = polled.see([answer(2, 0.5, {"0": 1})], unix_s=4.0)
    assert [row["step"] for row in resumed.recent] == [2], "a resumed run begins a new curve"


@pytest.mark.usefixtures("elsewhere")
def test_verbs_by_directory_and_by_address(buffer: BufferProcess, capsys: pytest.CaptureFixture[str]) -> None:
    root, address = str(buffer.paths.root), ["--buffer", buffer.http]
    for where in ([root], address, [f"--buffer={buffer.http}"]):
        assert main(["status", *where]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in ("buffer", "rollout-0", "rollout-1", "serving")), shown
        assert main(["drop", *where, "999999"]) == 2
        assert "999999" in capsys.readouterr().err
        assert main(["unfence", *where, "rollout-7"]) == 2
        assert "no process of this run has had the name rollout-7" in capsys.readouterr().err
        assert main(["drain", *where, "rollout-7"]) == 2
        assert "no rollout server 'rollout-7'" in capsys.readouterr().err
    for role, message in (
        ("trainer", "reached only where its endpoint file is"),
        ("buffer", "has no trainer now, and draining would end the run"),
        ("rollout-7", "no rollout server 'rollout-7'"),
    ):
        assert main(["restart", *address, role]) == 2
        assert message in capsys.readouterr().err
    assert main(["restart", *address, "trainer", "trainer.lr=1"]) == 2
    assert "job has no launcher: give trainer.lr=1 to the command" in capsys.readouterr().err
    assert main(["unfence", *address, "rollout-1"]) == 0
    assert "its process is refused" in capsys.readouterr().out
    buffer.produce("rollout-2")
    buffer.wait_status(lambda status: any(peer["name"] == "rollout-2" for peer in status["peers"]))
    assert main(["restart", *address, "rollout-2"]) == 0
    assert "rollout-2 has left; its supervisor has to start it again" in capsys.readouterr().out
    assert main(["drain", *address, "rollout-0"]) == 0
    assert capsys.readouterr().out == "rollout-0 has left\n"


@pytest.mark.usefixtures("elsewhere")
def test_mistakes_are_one_message(buffer: BufferProcess, capsys: pytest.CaptureFixture[str]) -> None:
    silent = socket.socket()  # it keeps its port from others, and does not listen
    silent.bind(("127.0.0.1", 0))
    nobody = f"127.0.0.1:{silent.getsockname()[1]}"
    stream = buffer.address.removeprefix("tcp://")
    for words, message in (
        (["status", "--buffer", "here"], "give HOST:PORT of the buffer's HTTP server"),
        (["status", "--buffer", "here:0"], "give HOST:PORT of the buffer's HTTP server"),
        (["status", "--buffer", nobody], f"no buffer responds at {nobody}"),
        (["status", "--buffer", stream], "not that of its stream"),
        (["status", "x", "--buffer", buffer.http], "unrecognized arguments: x"),
        (["status", "--keys", "/keys", str(buffer.paths.root)], "are for --buffer"),
        (["status", "--buffer", buffer.http, "--keys", "/nowhere"], "neither operator.token nor monitor"),
        (["status", "--buffer", buffer.http, "--tls-certificate", "/nowhere"], "No such file"),
        (["drop", "--buffer", buffer.http, "--buffer", buffer.http, "1"], "the job has 1 buffers, and 2"),
    ):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1, captured
    silent.close()


@pytest.mark.usefixtures("elsewhere")
def test_keys_and_tls_of_a_job_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_keys(tmp_path / "keys")
    certificate, private_key = make_certificate(tmp_path, "job")
    security = {"keys": str(tmp_path / "keys"), "tls_certificate": str(certificate)}
    config = job(tmp_path, security=security | {"tls_private_key": str(private_key)})
    process = BufferProcess(config, settings_file=tmp_path / "job.yaml")
    try:
        monitor, operator = tmp_path / "m", tmp_path / "o"
        for folder, name in ((monitor, "monitor.token"), (operator, "operator.token")):
            folder.mkdir(mode=0o700)
            (tmp_path / "keys" / name).rename(folder / name)
        where = ["--buffer", process.http, "--tls-certificate", str(certificate)]
        assert main(["status", *where, "--keys", str(monitor)]) == 0
        assert "buffer" in capsys.readouterr().out
        assert (
            RunningJob.at([process.http], keys=str(operator), tls_certificate=str(certificate)).config
            == config.with_resolved_objective()
        )
        for words, message in (
            (["status", *where], "this needs a valid token"),
            (["unfence", *where, "--keys", str(monitor), "a"], "may read only"),
            (["unfence", *where, "--keys", str(operator), "a"], "no process of this run"),
            (["status", *where[:2], "--keys", str(operator)], "with TLS also --tls-certificate"),
        ):
            assert main(words) == 2
            assert message in capsys.readouterr().err, message
        (operator / "operator.token").chmod(0o644)
        assert main(["status", *where, "--keys", str(operator)]) == 2
        assert "chmod 600" in capsys.readouterr().err
    finally:
        process.close()


def test_the_served_configuration_has_no_secrets(tmp_path: Path) -> None:
    secrets = {
        "task": {"name": "sort", "reward": {"url": "https://me:hidden-1@judge/v1", "api_key": "hidden-2"}},
        "trackers": [{"name": "wandb", "api_key": "hidden-3", "WANDB_API_KEY": "hidden-4"}],
        "objective": {"name": "tis", "cap": float("inf"), "password": 4711, "max_tokens": 5},
        "rollout": {
            "engine": "sglang",
            "sglang": {
                "env": {"HF_TOKEN": "hidden-5", "AWS_SECRET_ACCESS_KEY": "hidden-6", "NCCL_DEBUG": "INFO"},
            },
        },
    }
    shown = json.dumps(without_secrets(secrets), allow_nan=False)
    assert "hidden" not in shown and "4711" not in shown
    assert shown.count(HIDDEN) == 8 and '"max_tokens": 5' in shown and '"cap": "inf"' in shown
    command = without_secrets({"args": "--mem 0.8 --admin-api-key hidden-1 --api-key='hid den-2' --x"})
    assert command == {"args": f"--mem 0.8 --admin-api-key {HIDDEN} --api-key={HIDDEN} --x"}
    more = {
        "openai_key": "s1", "keys": ["s2"], "passphrase": "s3", "secret": {"v": "s4"}, "credential": 5,
        "accessToken": "s6", "args": ["--api-key", "s7", "--mem", "0.8"], "url": "http://h/?api_key=s8&n=1",
        "bearer": "s9", "note": "Authorization: Bearer s10-s10-s10", "auth": ["s11", "s12"],
    }  # fmt: skip
    shown = json.dumps(without_secrets({"task": more, "stop_tokens": [1, 2], "api_key_file": "k"}))
    assert not re.findall(r"s\d", shown) and "0.8" in shown and '[1, 2], "api_key_file": "k"' in shown
    process = by_hand(tmp_path, trackers=[{"name": "wandb", "api_key": "hidden-7"}])
    try:
        served = json.loads(process.get("/config"))
        assert served == without_secrets(to_mapping(process.config.with_resolved_objective()))
        assert served["trackers"] == [{"name": "wandb", "api_key": HIDDEN}]
        assert "hidden-7" in process.paths.config.read_text(), "the run's own file has what it needs"
        assert process.paths.config.stat().st_mode & 0o077 == 0
    finally:
        process.close()


def test_settings_of_the_project_hold_no_secrets() -> None:
    texts = [setting.key for setting in all_keys() if "str" in setting.type]
    named = {key for key in texts if has_secret_name(key.rpartition(".")[2], "a text")}
    assert named == PUBLIC, "a setting with the name of a secret has to be hidden, or to name a file"


def test_peers_are_seen_as_the_buffers_have_heard_them() -> None:
    old = {"name": "rollout-0", "role": "rollout", "state": "serving", "silent_s": 3.0, "stats": {"queue": 1}}
    new = old | {"silent_s": 0.1, "stats": {"queue": 7}, "waits": {"push": 2.5}, "http": "127.0.0.1:1"}
    (merged,) = merged_peers([{"peers": [old]}, {"peers": [new]}, {"peers": None}])
    assert merged == new
    view = peer_view(merged)
    assert view.status is not None and view.not_ready == "" and view.role == "rollout"
    assert (view.status["queue"], view.status["waiting_on"]) == (7, {"push": 2.5})
    assert peer_view(old, is_heard=False).not_ready == "no response"
    quarantined = peer_view(new | {"quarantine": {"reason": "5 failures", "rest_s": 3}})
    assert quarantined.not_ready == "quarantine: 5 failures"


def test_tables_of_shards_are_merged() -> None:
    first = {"step": 3, "tickets": {"ready": 1}, "drops": {"stale": 1}, "peers": []}
    rates = {"window_s": 60.0, "samples_per_s": 2.0, "tokens_generated_per_s": 7.0, "steps_per_min": None}
    second = first | {"rates": rates | {"steps_per_min": 6.0}}
    merged = merged_status([first | {"rates": rates}, second])
    assert merged["tickets"] == {"ready": 2} and merged["drops"] == {"stale": 2}
    assert merged["rates"] == rates | {"samples_per_s": 4.0, "steps_per_min": 6.0}


@pytest.mark.usefixtures("elsewhere")
def test_daemons_are_shown_without_their_files(buffer: BufferProcess) -> None:
    running = RunningJob.at([buffer.http])
    wait_until(lambda: running.daemons()["buffer"].status, what="the buffer's answer")
    assert running.paths is None and running.name == buffer.config.name
    assert set(running.daemons()) >= {"buffer"}
