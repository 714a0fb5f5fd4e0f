"""`areal-like doctor --gpu`: its stages on a CPU, stages that fail, hang or die, two peers, and its file."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_like.gpus import GPUS, kind_of
from launch.cli import main
from launch.doctor.gpu import attention, engine, running, speed, step
from launch.doctor.gpu.attention import check_attention
from launch.doctor.gpu.devices import check_devices, judged_rates
from launch.doctor.gpu.engine import check_embedded
from launch.doctor.gpu.models import write_model
from launch.doctor.gpu.process import set_variables
from launch.doctor.gpu.report import Cleaner, StageResult, report_of
from launch.doctor.gpu.running import run_stages
from launch.doctor.gpu.speed import Predicted, judged
from launch.doctor.gpu.stages import (
    OK,
    STAGES,
    TOTAL_S,
    Notes,
    Outcome,
    Request,
    Stage,
    failed,
    skipped,
    within,
)
from launch.doctor.gpu.step import relative_error
from rollout_server.policy.engines.sglang.process import launch_options
from tests.support import warm_start
from tests.support.launching import ROOT
from tests.support.ports import free_port
from trainer.planning.lengths import lengths_of
from trainer.planning.shapes import with_local_model

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (made := tmp_path / "scratch").mkdir()
    return made


def fork_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that this one starts are forked from one that has imported torch."""
    warm_start.nursery()  # started by the real Popen
    monkeypatch.setattr(subprocess, "Popen", warm_start.Popen)


def test_the_limits_of_all_stages_add_up_to_ten_minutes() -> None:
    assert sum(stage.limit_s for stage in STAGES.values()) <= TOTAL_S == 600


@pytest.mark.long
def test_every_stage_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command as a user gives it, with ranks, an engine and a push; processes are forked."""
    out, secret = tmp_path / "report.json", "planted-in-the-environment"
    unhurried = {name: replace(stage, limit_s=TOTAL_S) for name, stage in STAGES.items()}
    monkeypatch.setattr("launch.commands.doctor.STAGES", unhurried)
    fork_children(monkeypatch)
    for name, value in (("MY_API_KEY", secret), ("OMP_NUM_THREADS", "1"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--gpu", "--device", "cpu", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert list(stages) == list(STAGES) and report["verdict"] == "ok"
    without = {name: stage["reason"] for name, stage in stages.items() if stage["verdict"] != "ok"}
    assert without == {"peer": "no --peer HOST:PORT was given", "sglang": "no --sglang PYTHON was given"}
    measured = {name: stage["measured"] for name, stage in stages.items()}
    assert measured["devices"]["torch"] == torch.__version__ and measured["versions"]["transformers"]
    assert measured["bandwidth"]["host_to_device_gb_per_s"] > 0
    assert 0 < measured["attention"]["error_of_rectangles"] < 1e-5
    errors = [measured["step"][f"error_of_2_ranks_{dtype}"] for dtype in ("float32", "bfloat16")]
    assert 0 < errors[0] < 1e-5 < errors[1] < 0.08
    found = measured["engine"]
    assert max(found["mismatch_largest_before"], found["mismatch_largest_after"]) < 1e-4
    assert found["push_moves_logprobs_by"] > 0.1 and found["push_backend"] == "gloo"
    assert measured["speed"]["tokens_per_s"] > 0 and measured["speed"]["planned_peak_gb"] > 0
    assert out.stat().st_mode & 0o777 == 0o600
    for private in (secret, str(tmp_path), str(Path.home()) + "/", str(ROOT), "MY_API_KEY"):
        assert private not in out.read_text()
    assert "skipped" in shown and "ok: attach" in shown


def test_a_machine_without_a_gpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fork_children(monkeypatch)
    assert main(["doctor", "--gpu", "--json", "--out", str(tmp_path / "x.json")]) == 1
    report = json.loads(capsys.readouterr().out)
    first, *others = report["stages"]
    assert re.search("built for CPUs|finds no GPU", first["reason"]) and first["remedy"]
    assert {(stage["verdict"], stage["reason"]) for stage in others} == {("skipped", "needs devices")}
    assert json.loads((tmp_path / "x.json").read_text()) == report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device is an option of --gpu"),
        (["--gpu", "8xh100_8b"], "takes no configuration"),
        (["--gpu", "--role", "trainer"], "takes no configuration"),
        (["--gpu", "--peer", "10.0.0.1"], "give an address and a port"),
        (["--gpu", "--peer", "0.0.0.0:29400"], "give an address and a port"),
        (["--gpu", "--peer", "192.0.2.1:29400"], "start the command there first"),
        (["--gpu", "--out", "/no/such/directory/x"], "name another file"),
        (["--gpu", "--stage", "speeed"], "invalid choice"),
    ],
)
def test_a_mistake_gets_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AREAL_LIKE_PEER_TOKEN", raising=False)
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_short_token_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AREAL_LIKE_PEER_TOKEN", "guess")
    assert main(["doctor", "--gpu", "--peer", "127.0.0.1:29400"]) == 2
    shown = capsys.readouterr().err
    assert "fewer than 16 characters" in shown and "guess" not in shown


class Script(subprocess.Popen[Any]):
    """A stage's process that runs a program of the test with the same arguments."""

    program = ""

    def __init__(self, command: list[str], **options: Any) -> None:
        super().__init__([sys.executable, "-c", self.program, *command[3:]], **options)


def results_of(
    program: str, scratch: Path, monkeypatch: pytest.MonkeyPatch, *, limit_s: float = 600.0, **options: Any
) -> Iterator[StageResult]:
    """The results of three stages whose processes run `program`, of which the first is needed."""
    monkeypatch.setattr(Script, "program", program)
    monkeypatch.setattr(running.subprocess, "Popen", Script)
    stages = [
        Stage(name=name, function="", proves="", limit_s=limit_s, is_needed=name == "a") for name in "abc"
    ]
    return run_stages(stages, Request(scratch=str(scratch)), **options)


NOTES = "import json, os, signal, sys, time\nfile = open(f'{sys.argv[2]}/{sys.argv[1]}.jsonl', 'a', 1)\n"
GOOD = """file.write(json.dumps({"verdict": {"outcome": "ok", "reason": "", "remedy": ""}}) + chr(10))\n"""


def test_a_stage_that_raises_or_dies_fails_alone(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        NOTES
        + "file.write(json.dumps({'measured': {'x': 2.5}}) + chr(10))\n"
        + "file.write(json.dumps({'at': 'work'}) + chr(10))\n"
        + "if sys.argv[1] == 'b': raise ValueError('wrong weights in /home/alice/models')\n"
        + "if sys.argv[1] == 'c': file.write('{half a line'); os.kill(os.getpid(), signal.SIGSEGV)\n"
        + GOOD
    )
    first, raised, died = results_of(program, scratch, monkeypatch)
    assert first.verdict == OK and first.measured == raised.measured == died.measured == {"x": 2.5}
    assert raised.verdict.reason == "ValueError: wrong weights in /home/alice/models (at: work)"
    assert died.verdict.reason == "exit code -11 (at: work)"
    assert raised.verdict.outcome is died.verdict.outcome is Outcome.FAILED


def test_a_stage_that_hangs_is_killed_with_its_children(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its child ignores SIGTERM and holds a pipe that ends with it."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    program = (
        NOTES
        + "if sys.argv[1] == 'b':\n"
        + " file.write(json.dumps({'at': 'forming a group'}) + chr(10))\n"
        + " if os.fork() == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + " time.sleep(3600)\n"
        + GOOD
    )
    opened: list[float] = []

    def limited(stage: Stage) -> None:
        opened.append(stage.limit_s)

    class Inheriting(Script):
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__(command, pass_fds=(writing,), **options)

        def wait(self, timeout: float | None = None) -> int:
            """Without its time, if this is the stage that hangs and it has come that far."""
            hangs = timeout not in (None, running._KILL_S) and self.args[3] == "b"
            while hangs and not (scratch / "b.jsonl").exists():
                os.sched_yield()
            while hangs and "forming" not in (scratch / "b.jsonl").read_text():
                os.sched_yield()
            return super().wait(0.0 if hangs else timeout)

    iterator = results_of(program, scratch, monkeypatch, on_start=limited)
    monkeypatch.setattr(running.subprocess, "Popen", Inheriting)
    _, hung, after = iterator
    os.close(writing)
    assert os.read(reading, 1) == b"", "no process of the stage is left"
    os.close(reading)
    assert hung.verdict.outcome is Outcome.FAILED
    assert hung.verdict.reason == "did not end within 600 s, at: forming a group"
    assert after.verdict == OK and len(opened) == 3


def test_a_failed_verdict_has_the_error_of_a_rank(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        NOTES
        + "print('torch.distributed.DistBackendError: NCCL error: no route', 'and more', sep=chr(10))\n"
        + GOOD.replace('"ok"', '"failed"').replace('"reason": ""', '"reason": "2 ranks ended"')
    )
    first, *_ = results_of(program, scratch, monkeypatch)
    assert first.verdict.reason == (
        "2 ranks ended; its log has: torch.distributed.DistBackendError: NCCL error: no route"
    )


def test_stages_after_the_total_time_are_skipped(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = list(results_of(NOTES + GOOD, scratch, monkeypatch, total_s=0.0))
    assert [each.verdict.outcome for each in results] == [Outcome.SKIPPED] * 3
    assert "0 s of all stages are over" in results[0].verdict.reason


# --- what makes a stage fail ---


def test_errors_above_their_limits_fail() -> None:
    limits = {"a": 1.0, "b": 1.0}
    assert within({"a": 1.0, "b": 0.5}, limits, remedy="") == OK
    for wrong in (1.1, float("nan"), float("inf")):
        verdict = within({"a": 0.0, "b": wrong}, limits, remedy="do this")
        assert verdict.outcome is Outcome.FAILED and "b" in verdict.reason and verdict.remedy == "do this"


def test_gradients_differ_relative_to_their_norm() -> None:
    want = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert relative_error(want, want) == 0.0
    assert relative_error({"a": torch.tensor([3.5]), "b": torch.tensor([4.0])}, want) == pytest.approx(0.1)
    assert relative_error({"a": torch.tensor([3.0])}, want) == float("inf")


def test_a_wrong_kernel_fails_the_attention_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that attends to one key too many, and one whose gradients are wrong."""
    right = attention.rectangle_attention

    def too_wide(*args: Any, window: int | None, **settings: Any) -> Any:
        return right(*args, window=None if window is None else window + 1, **settings)

    def half_gradient(query: Any, *args: Any, **settings: Any) -> Any:
        return right(query.detach() / 2 + query / 2, *args, **settings)

    for wrong in (too_wide, half_gradient):
        monkeypatch.setattr(attention, "rectangle_attention", wrong)
        verdict = check_attention(Request(device="cpu", scratch=""), Notes(io.StringIO()))
        assert verdict.outcome is Outcome.FAILED and "rectangles" in verdict.reason, wrong


def test_a_wrong_push_fails_the_engine_stage(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's weights are others than those that were pushed."""
    right = engine._push

    async def wrong(comparison: Any, *args: Any) -> float:
        stall_s = await right(comparison, *args)
        comparison.change_weights()
        return stall_s

    monkeypatch.setattr(engine, "_push", wrong)
    fork_children(monkeypatch)
    try:
        verdict = check_embedded(Request(device="cpu", scratch=str(scratch)), Notes(io.StringIO()))
    finally:
        dist.destroy_process_group()
    assert verdict.outcome is Outcome.FAILED and "sd" in verdict.reason and "push" in verdict.remedy


H100 = GPUS["h100"]


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ({"host_to_device": 50e9, "device_to_host": 50e9, "device": 1.2e12, "gpu_to_gpu": 1.0}, ""),
        ({"host_to_device": 3e9, "device_to_host": 50e9, "device": 1.2e12}, "host to device 3.0 GB/s"),
        ({"host_to_device": 50e9, "device_to_host": 50e9, "device": 0.2e12}, "device 200.0 GB/s"),
    ],
)
def test_rates_are_compared_with_the_published_ones(rates: dict[str, float], reason: str) -> None:
    verdict = judged_rates(rates, H100)
    assert reason in verdict.reason and (verdict == OK) == (not reason)


PLAN = Predicted(peak_bytes=40e9, tokens_per_s=10_000, mfu=0.3)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({}, ""),
        ({"peak_gb": 45.0}, "has used 45.0 GB, planned are 40.0 GB"),
        ({"tokens_per_s": 4000}, "tokens_per_s is 4e+03, planned is 1e+04"),
        ({"mfu": 0.1}, "mfu is 0.1, planned is 0.3"),
        ({"tokens_per_s": 0}, "no token"),
    ],
)
def test_a_step_is_compared_with_the_plan(found: dict[str, float], reason: str) -> None:
    verdict = judged({"peak_gb": 39.0, "tokens_per_s": 9000, "mfu": 0.25} | found, PLAN, is_measured=True)
    assert reason in verdict.reason and (verdict == OK) == (not reason)


def test_the_figures_of_a_gpu_by_its_name() -> None:
    assert kind_of("NVIDIA H100 80GB HBM3") is H100
    assert kind_of("NVIDIA H100 PCIe") is None, "the table has figures of the SXM form only"
    assert kind_of("NVIDIA GeForce RTX 3090") is None and kind_of("NVIDIA H200 MIG 1g.18gb") is None


# --- what can be seen of a GPU's stages on a CPU ---


@pytest.mark.parametrize("num_gpus", [1, 2])
@pytest.mark.parametrize("name", ["embedded", "sglang"])
def test_the_settings_of_engines_on_gpus(name: str, num_gpus: int, scratch: Path) -> None:
    request = Request(scratch=str(scratch), sglang="/opt/sglang/bin/python")
    config = engine.settings_of(request, engine=name, num_gpus=num_gpus)
    assert config.trainer.device == "cuda:0" and config.model.dtype == "bfloat16"
    assert config.rollout.engine_device == f"cuda:{num_gpus - 1}"
    words = " ".join(launch_options(config, model="m", port=1, version=0, index=0, context_length=512))
    assert f"--base-gpu-id {num_gpus - 1}" in words
    assert ("--mem-fraction-static" in words) == (name == "sglang")


def test_the_settings_of_steps_on_gpus(scratch: Path) -> None:
    for dtype, world_size in (("float32", 1), ("bfloat16", 2)):
        path = write_model(scratch / dtype, is_small=True, dtype=torch.float32)
        config = step.settings_of(
            path, scratch, device="cuda", world_size=world_size, dtype=dtype, is_small=False
        )
        assert config.model.dtype == dtype and config.trainer.gradient_checkpointing is True


@pytest.mark.chaos
def test_the_plan_of_the_step_on_an_h100(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is traced as on the machine with the GPU, and fits there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config, shape = with_local_model(speed.settings_of("qwen3-0.6b", Request(scratch=str(scratch))))
    lengths = lengths_of(config, max_positions=shape.max_positions)
    predicted = speed.predict(config, shape, lengths, torch.device("cuda", 0))
    assert 5e9 < predicted.peak_bytes < 60e9
    assert predicted.tokens_per_s is not None and predicted.tokens_per_s > 1000
    assert predicted.mfu is not None and 0.05 < predicted.mfu < 0.5
    budget = config.trainer.tokens_per_microbatch
    assert budget - lengths.mean < budget // round(lengths.mean) * round(lengths.mean) <= budget


def test_variables_are_those_of_a_jobs_ranks(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine inherits those of NCCL only, and a scheduler's ranks are not ours."""
    for name in ("speed", "engine", "sglang"):
        monkeypatch.setattr(os, "environ", {"RANK": "3", "WORLD_SIZE": "8", "PATH": "/bin"})
        set_variables(name, Request(scratch=str(scratch)))
        assert "RANK" not in os.environ and os.environ["PATH"] == "/bin"
        assert ("PYTORCH_ALLOC_CONF" in os.environ) == (name == "speed")
        assert ("NCCL_CUMEM_ENABLE" in os.environ) == (name == "sglang")


def test_gpus_are_reported(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (70_000_000_000, 80_000_000_000),
        "nccl": SimpleNamespace(version=lambda: (2, 30, 7)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    file = io.StringIO()
    assert check_devices(Request(scratch=str(scratch)), Notes(file)) == OK
    (scratch / "x").write_text(file.getvalue())
    measured, place, _ = running.read_notes(scratch / "x")
    assert measured["gpu_1"] == properties.name and measured["gpu_1_capability"] == "9.0"
    assert measured["nccl"] == "2.30.7" and measured["gpu_0_free_gb"] == 70.0
    assert place == "initializing CUDA"


# --- the file ---


def test_nothing_private_gets_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets in the texts of errors, in names and in values, as libraries would print them."""
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr("launch.doctor.gpu.report.socket.gethostname", lambda: "gpu-node-7")
    environment = {"SOME_VARIABLE": "value-of-a-variable", "HF_TOKEN": "hf_abcdefgh", "TORCH": "2.14.1+cu130"}
    secrets = [
        TOKEN, "value-of-a-variable", "hf_abcdefgh", "alice", "gpu-node-7", "/home", "/opt/venv", "10.1.2.3",
        "fe80::1:2:3:4", "fe80::1", "fd00::12", "trainer0.corp", "hunter2hunter2", "s3cr3t-value",
    ]  # fmt: skip
    text = (
        f"OSError: /home/alice/.cache/model.safetensors: [{TOKEN}] value-of-a-variable hf_abcdefgh\n at "
        "gpu-node-7 (/opt/venv/lib/python3.11/site.py:7, ~/x/y), tcp://10.1.2.3:29400 fe80::1:2:3:4 fe80::1 "
        "[fd00::12]:29400 trainer0.corp c10::Error "
        "https://u:hunter2hunter2@h/x --api-key s3cr3t-value Authorization: Bearer s3cr3t-value"
    )
    stage = STAGES["devices"]
    numbers = {"gpu_0": "NVIDIA H100", "torch": "2.14.1+cu130", "n": 2.5}
    results = [
        StageResult(stage=stage, verdict=failed(text, text), seconds=1.0, measured={"gpu_0": text, text: 1}),
        StageResult(stage=stage, verdict=skipped(text), seconds=0.0, measured=numbers),
    ]
    cleaner = Cleaner(secrets=[TOKEN], hosts=["trainer0.corp"], environment=environment)
    report = report_of(results, device="cuda", version="1.2", date="2026-01-01", cleaner=cleaner)
    written = json.dumps(report)
    assert not [each for each in secrets if each in written], written
    assert "OSError: model.safetensors:" in written and "site.py" in written and "c10::Error" in written, (
        "what helps is kept"
    )
    assert report["stages"][1]["measured"] == numbers
    assert report["verdict"] == "failed"


def test_a_request_does_not_show_its_token() -> None:
    request = Request(scratch="/s", token=TOKEN)
    assert TOKEN not in repr(request) and Request.from_json(request.to_json()) == request


# --- two machines ---


def peers(scratch: Path, tokens: tuple[str, str]) -> list[tuple[Outcome, str, dict[str, Any]]]:
    """Verdicts and numbers of two processes of this machine that run the stage `peer`."""
    request = Request(device="cpu", scratch="", peer=f"127.0.0.1:{free_port()}")
    processes = []
    for side, token in enumerate(tokens):
        (folder := scratch / str(side)).mkdir()
        text = replace(request, scratch=str(folder), token=token).to_json()
        (folder / "request.json").write_text(text)
        command = [sys.executable, "-m", "launch.doctor.gpu.process", "peer", str(folder)]
        processes.append(warm_start.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL))
    for process in processes:
        assert process.wait() == 0
    found = []
    for side in range(2):
        measured, _, verdict = running.read_notes(scratch / str(side) / "peer.jsonl")
        assert verdict is not None
        found.append((verdict.outcome, verdict.reason, dict(measured)))
    return found


def test_two_processes_meet_and_measure(scratch: Path) -> None:
    found = peers(scratch, (TOKEN, TOKEN))
    assert [outcome for outcome, _, _ in found] == [Outcome.OK] * 2, found
    assert {measured["peer_role"] for *_, measured in found} == {"listener", "second machine"}
    assert all(measured["peer_gloo_gb_per_s"] > 0 for *_, measured in found)
    assert all(measured["peer_torch"] == torch.__version__ for *_, measured in found)


def test_a_process_without_the_token_takes_no_part(scratch: Path) -> None:
    found = peers(scratch, (TOKEN, TOKEN[::-1]))
    assert any("changed its rendezvous" in reason for _, reason, _ in found)
    for outcome, reason, measured in found:
        assert outcome is Outcome.FAILED and "have not met" in reason
        assert measured.keys() == {"peer_role"}, "nothing was read from the other side"
