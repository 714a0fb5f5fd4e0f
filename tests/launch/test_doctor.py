"""`areal-like doctor`: each check by itself, and the command on this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from areal_like.config import from_mapping
from launch.cli import main
from launch.doctor import gathering
from launch.doctor.checks import (
    TORCH,
    TRANSFORMERS,
    Finding,
    Gpu,
    GpuFacts,
    Level,
    Versions,
    check_clock,
    check_gpus,
    check_interfaces,
    check_linear_attention,
    check_name,
    check_open_files,
    check_port,
    check_rdma,
    check_secret,
    check_shared_memory,
    check_space,
    check_versions,
)
from launch.doctor.gathering import findings, gpus_from
from tests.support.buffer_harness import ROOT, running_buffer
from tests.support.keys import make_keys

TRAINER = Versions(of="trainer", torch="2.14.1", cuda="13.0", transformers="5.19.0", nccl="2.30.7")
WITH_KERNELS = Versions(of="trainer", flash_linear_attention="0.5.1", causal_conv1d="1.6.2")
ENGINE = Versions(of="engine", torch="2.14.1", cuda="13.0", sglang="0.5.23", nccl="2.30.7")
H100 = Gpu(index=0, name="H100", total_mb=81559, used_mb=4)


GPUS = GpuFacts(wanted={0: "the trainer"}, found=(H100,), driver="580.65.06")


def port(problem: str = "", *, needs_keys: bool = False) -> Finding:
    return check_port("buffer.host", "h:1", problem=problem, needs_keys=needs_keys)


def name(*addresses: str, spans: bool = True) -> Finding:
    return check_name("weights.host", "h", addresses, spans_machines=spans)


def clock(ahead_s: float | None) -> Finding:
    return check_clock("a:1", ahead_s, uncertain_s=1.5)


def space(free_gb: float, needed_gb: float, *, reserved_gb: float = 0) -> Finding:
    free, needed, reserved = (int(gb * 1e9) for gb in (free_gb, needed_gb, reserved_gb))
    return check_space("runs_dir", "/r", free, needed, reserved_bytes=reserved)


def versions(*found: Versions, gpus: GpuFacts = GPUS) -> Iterable[Finding]:
    return check_versions(found, gpus)


def linear(trainer: Versions, *, attention: str = "auto") -> Iterable[Finding]:
    return check_linear_attention(trainer, attention=attention)


def cpu(**changed: str) -> Iterable[Finding]:
    one = Versions(**({"of": "trainer", "torch": "2.13.0+cpu", "transformers": "5.19.0"} | changed))
    return check_versions([one], GpuFacts())


@pytest.mark.parametrize(
    ("found", "level", "text"),
    [
        (port(), Level.OK, "free"),
        (port("Address already in use"), Level.ERROR, "Address already in use"),
        (port(needs_keys=True), Level.ERROR, "the job has no keys"),
        (name("10.0.0.1"), Level.OK, "10.0.0.1"),
        (name(), Level.ERROR, "does not resolve"),
        (name("127.0.0.1"), Level.WARNING, "is loopback"),
        (name("127.0.0.1", spans=False), Level.OK, "127.0.0.1"),
        (clock(1.9), Level.OK, "agrees within 1.9 s"),
        (clock(-7.0), Level.WARNING, "7.0 s behind"),
        (clock(4000.0), Level.ERROR, "4000.0 s ahead"),
        (clock(None), Level.WARNING, "no response"),
        (space(100, 10), Level.OK, "100.0 GB free, about 10.0 GB needed"),
        (space(15, 10), Level.WARNING, "15.0 GB free"),
        (space(5, 10), Level.ERROR, "5.0 GB free, about 10.0 GB needed"),
        (space(5, 0), Level.OK, "5.0 GB free"),
        (space(0.2, 0, reserved_gb=0.27), Level.ERROR, "buffer.min_free_bytes keeps 0.3 GB free"),
        (cpu(), Level.OK, "2.13.0+cpu"),
        (cpu(torch="2.10.1"), Level.ERROR, "2.10.1"),
        (cpu(torch="2.15.0"), Level.ERROR, "2.15.0"),
        (cpu(torch=""), Level.ERROR, "not installed"),
        (cpu(transformers="6.0.1"), Level.ERROR, "6.0.1"),
        (cpu(error="/x does not run"), Level.ERROR, "does not run"),
        (versions(TRAINER, ENGINE), Level.OK, "2.30.7 in both"),
        (
            versions(TRAINER, Versions(of="engine", sglang="0.5", cuda="12.8", nccl="2.27.3")),
            Level.ERROR,
            "2.30.7 in the trainer, 2.27.3 in SGLang",
        ),
        (versions(Versions(of="engine", cuda="13.0")), Level.ERROR, "not installed"),
        (versions(Versions(of="engine", sglang="1", torch="2.1")), Level.ERROR, "built for CPUs"),
        (
            versions(TRAINER, gpus=GpuFacts(wanted={0: "x"}, found=(H100,), driver="570.86.10")),
            Level.ERROR,
            "13.0 needs driver 580 or newer, this is 570.86.10",
        ),
        (linear(TRAINER), Level.ERROR, "the model has linear attention"),
        (linear(TRAINER), Level.WARNING, "linear attention pads"),
        (linear(TRAINER, attention="varlen"), Level.ERROR, "trainer.attention=varlen needs it"),
        (linear(WITH_KERNELS), Level.OK, "0.5.1"),
        (linear(WITH_KERNELS, attention="varlen"), Level.OK, "1.6.2"),
        (check_gpus(GPUS), Level.OK, "81555 MB free"),
        (check_gpus(GpuFacts(wanted={0: "x"}, error="nvidia-smi is not installed")), Level.ERROR, "nvidia"),
        (
            check_gpus(GpuFacts(wanted={0: "x", 1: "y"}, found=(H100,), visible="0")),
            Level.ERROR,
            "1 GPUs are visible (CUDA_VISIBLE_DEVICES=0)",
        ),
        (
            check_gpus(
                GpuFacts(wanted={0: "x"}, found=(Gpu(index=0, name="A", total_mb=9999, used_mb=5000),))
            ),
            Level.WARNING,
            "5000 of 9999 MB in use",
        ),
        (
            check_rdma((), ("mlx5_1/1",), max_locked_bytes=None),
            Level.WARNING,
            "no active port (mlx5_1/1 down)",
        ),
        (check_rdma(("mlx5_0/1",), (), max_locked_bytes=8 << 20), Level.WARNING, "limited to 8 MB"),
        (
            check_interfaces({"NCCL_SOCKET_IFNAME": "ib0"}, ("lo", "eth0")),
            Level.ERROR,
            "no interface ib0",
        ),
        (check_interfaces({"NCCL_SOCKET_IFNAME": "=eth"}, ("lo", "eth0")), Level.OK, "exists"),
        (check_open_files(1024), Level.WARNING, "at most 1024"),
        (check_shared_memory(64 << 20), Level.WARNING, "67 MB"),
        (check_secret("/k", 0o600), Level.OK, "mode 600"),
        (check_secret("/k", 0o640), Level.ERROR, "mode 640: other users can read it"),
        (check_secret("/k", None), Level.ERROR, "no such file"),
        (check_secret("/k", 0o600, is_mine=False), Level.ERROR, "another user"),
    ],
)
def test_each_check(found: Finding | Iterable[Finding], level: Level, text: str) -> None:
    all_found = [found] if isinstance(found, Finding) else list(found)
    matching = [each for each in all_found if text in each.found]
    assert [each.level for each in matching] == [level], all_found
    assert bool(matching[0].remedy) is (level is not Level.OK)


def test_versions_are_those_of_the_package() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, (first, last) in (("torch", TORCH), ("transformers", TRANSFORMERS)):
        text = next(each for each in wanted if each.startswith(f"{package}>="))
        numbers = re.findall(r"\d+(?:\.\d+)?", text)
        assert numbers == [f"{first[0]}.{first[1]}", f"{last[0]}.{last[1]}" if last[1] else f"{last[0]}"]


def test_models_with_linear_attention_are_known_by_their_config(tmp_path: Path) -> None:
    for name in ("qwen3-8b", "qwen3.5-9b", "qwen3-next-80b-a3b-instruct"):
        directory = ROOT / "configs" / "scale" / "models" / name
        assert gathering._has_linear_attention(str(directory)) == (name != "qwen3-8b")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"linear_num_value_heads": 32}}))
    assert gathering._has_linear_attention(str(tmp_path))


def test_configs_in_the_cache_of_the_hub_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert not gathering._has_linear_attention("owner/hybrid"), "not on this machine"
    snapshot = tmp_path / "models--owner--hybrid" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"linear_num_value_heads": 32}))
    (tmp_path / "models--owner--hybrid" / "refs").mkdir()
    (tmp_path / "models--owner--hybrid" / "refs" / "main").write_text("a" * 40)
    assert gathering._has_linear_attention("owner/hybrid")
    assert not gathering._has_linear_attention("no/such/name")
    assert not gathering._has_linear_attention("some/hub-name")


def test_gpus_have_the_numbers_that_processes_see() -> None:
    table = "0, H100, 81559, 4, 580.1\n1, H100, 81559, 70000, 580.1\n2, H200, 143771, 0, 580.1\n"
    facts = gpus_from(table, wanted={0: "x"}, visible="2,1", may_share=False)
    assert [(gpu.index, gpu.name, gpu.used_mb) for gpu in facts.found] == [(0, "H200", 0), (1, "H100", 70000)]
    assert len(gpus_from(table, wanted={}, visible=None, may_share=False).found) == 3
    assert gpus_from(table, wanted={}, visible="", may_share=False).found == ()
    assert gpus_from("No devices were found\n", wanted={}, visible=None, may_share=False).error


def test_what_a_machine_has_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(tmp_path / "keys")
    (tmp_path / "keys" / "rollout.secret").chmod(0o644)
    (tmp_path / "keys" / "trainer.secret").unlink()
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '0, H100, 81559, 4, 580.65'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = from_mapping(
            {
                "runs_dir": str(tmp_path / "runs"),
                "buffer": {"port": port, "host": "0.0.0.0"},
                "weights": {"host": "no-such-host.invalid"},
                "trainer": {"device": "cuda", "world_size": 2},
                "security": {"keys": str(tmp_path / "keys")},
                "model": {"path": "/nowhere/model"},
            }
        )
        found = {each.what: each for each in findings(config, gathering.ROLES)}
    assert "in use" in found[f"buffer.host 0.0.0.0:{port}"].found
    assert found["daemon.http_host 127.0.0.1 (any port)"].level is Level.OK
    assert "does not resolve" in found["weights.host no-such-host.invalid"].found
    assert "no config.json" in found["model.path"].found
    assert found["GPU 0 for the trainer"].found == "H100, 81555 MB free"
    assert "1 GPUs are visible" in found["GPU 1 for the trainer"].found
    assert "mode 644" in found[str(tmp_path / "keys" / "rollout.secret")].found
    assert "no such file" in found[str(tmp_path / "keys" / "trainer.secret")].found
    assert found["torch"].level is found["transformers"].level is Level.OK
    assert any("buffer.min_free_bytes keeps" in each.found for each in found.values())
    assert not (tmp_path / "runs").exists(), "looking has left something behind"


def test_directories_that_cannot_hold_a_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = from_mapping({"runs_dir": "/proc/no"})
    (found,) = (each for each in findings(config, ["buffer"]) if each.what.startswith("runs_dir"))
    assert found.level is Level.ERROR and "cannot write or lock a file in /proc" in found.found
    monkeypatch.setattr(gathering, "file_system_of", lambda path: "nfs4")
    config = from_mapping({"runs_dir": str(tmp_path)})
    levels = {each.level for each in findings(config, ["buffer"]) if "nfs4: SQLite's WAL" in each.found}
    assert levels == {Level.WARNING}


def test_the_command_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"runs_dir={tmp_path}/runs"
    assert main(["doctor", where, "--all"]) == 0
    shown = capsys.readouterr().out
    assert "0 errors" in shown and "torch" in shown and "buffer.host" in shown
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["doctor", where, f"buffer.port={port}", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (error,) = (each for each in found if each["level"] == "error")
    assert error["what"] == f"buffer.host 127.0.0.1:{port}" and "in use" in error["found"]
    assert main(["doctor", where, "--role", "rollout", "--json"]) == 0
    assert "trainer" not in capsys.readouterr().out
    assert main(["doctor", "nothing"]) == 2
    assert "give a configuration file" in capsys.readouterr().err


def test_clocks_are_compared_with_a_running_buffer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_buffer(tmp_path) as buffer:
        words = ["doctor", f"runs_dir={tmp_path}/runs", "--buffer", buffer.http, "--all"]
        monkeypatch.setenv("COLUMNS", "200")
        assert main(words) == 0
        assert "agrees within" in capsys.readouterr().out
        now = time.time
        monkeypatch.setattr("launch.doctor.gathering.time.time", lambda: now() - 1000)
        assert main(words) == 1
        shown = capsys.readouterr().out
        assert "ahead" in shown and "chrony" in shown
