"""`areal-like doctor`: each check on made-up facts, and the command on this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import tomllib
from pathlib import Path

import pytest

from areal_like.config import from_mapping
from launch.cli import main
from launch.doctor import gathering
from launch.doctor.checks import CHECKS, TORCH, TRANSFORMERS, Level, findings
from launch.doctor.facts import (
    BoundAddress,
    Disk,
    Facts,
    Gpu,
    GpuFacts,
    Name,
    ProcessLimits,
    RemoteClock,
    SecretFile,
    Versions,
)
from launch.doctor.gathering import gather, gpus_from
from tests.support.buffer_harness import ROOT, running_buffer
from tests.support.keys import make_keys

TRAINER = Versions(of="trainer", torch="2.14.1", cuda="13.0", transformers="5.19.0", nccl="2.30.7")
ENGINE = Versions(of="engine", torch="2.14.1", cuda="13.0", sglang="0.5.23", nccl="2.30.7")
H100 = Gpu(index=0, name="H100", total_mb=81559, used_mb=4)


def limits(
    *,
    max_files: int = 1 << 20,
    max_locked_bytes: int | None = None,
    shm_bytes: int = 1 << 33,
    rdma: tuple[str, ...] = (),
    named: dict[str, str] | None = None,
) -> ProcessLimits:
    return ProcessLimits(
        max_files=max_files,
        max_locked_bytes=max_locked_bytes,
        shm_bytes=shm_bytes,
        rdma=rdma,
        rdma_down=("mlx5_1/1",),
        interfaces=("lo", "eth0"),
        named_interfaces=named or {},
    )


def disk(
    free_gb: float, needed_gb: float, *, error: str = "", is_network: bool = False, reserved_gb: float = 0
) -> Facts:
    one = Disk(
        setting="runs_dir",
        path="/r",
        free_bytes=int(free_gb * 1e9),
        needed_bytes=int(needed_gb * 1e9),
        file_system="nfs4",
        error=error,
        is_network=is_network,
        is_ledger=True,
        reserved_bytes=int(reserved_gb * 1e9),
    )
    return Facts(disks=(one,), limits=limits())


def gpu_job(*, gpus: GpuFacts | None = None, versions: tuple[Versions, ...] = (), hosts: int = 1) -> Facts:
    wanted = gpus or GpuFacts(wanted={0: "the trainer"}, found=(H100,), driver="580.65.06")
    return Facts(uses_gpus=True, gpus=wanted, versions=versions, num_hosts=hosts, limits=limits())


def bound(error: str = "", *, needs_keys: bool = False) -> Facts:
    one = BoundAddress(setting="buffer.host", address="h:1", error=error, needs_keys=needs_keys)
    return Facts(bound=(one,), limits=limits())


def named(*addresses: str, is_loopback: bool = False, spans: bool = True) -> Facts:
    one = Name(setting="weights.host", host="h", addresses=addresses, is_loopback=is_loopback)
    return Facts(names=(one,), spans_machines=spans, limits=limits())


def clock(ahead_s: float | None) -> Facts:
    return Facts(clocks=(RemoteClock(of="a:1", ahead_s=ahead_s, uncertain_s=1.5),), limits=limits())


def secret(mode: int | None, *, is_needed: bool = True, is_mine: bool = True) -> Facts:
    file = SecretFile(path="/k/x.secret", mode=mode, is_needed=is_needed, is_mine=is_mine)
    return Facts(secrets=(file,), limits=limits())


def cpu(**versions: str) -> Facts:
    one = Versions(**({"of": "trainer", "torch": "2.13.0+cpu", "transformers": "5.19.0"} | versions))
    return Facts(versions=(one,), limits=limits())


@pytest.mark.parametrize(
    ("facts", "level", "text"),
    [
        (bound(), Level.OK, "free"),
        (bound("Address already in use"), Level.ERROR, "Address already in use"),
        (bound(needs_keys=True), Level.ERROR, "the job has no keys"),
        (named("10.0.0.1"), Level.OK, "10.0.0.1"),
        (named(), Level.ERROR, "does not resolve"),
        (named("127.0.0.1", is_loopback=True), Level.WARNING, "is loopback"),
        (named("127.0.0.1", is_loopback=True, spans=False), Level.OK, "127.0.0.1"),
        (clock(1.9), Level.OK, "agrees within 1.9 s"),
        (clock(-7.0), Level.WARNING, "7.0 s behind"),
        (clock(4000.0), Level.ERROR, "4000.0 s ahead"),
        (clock(None), Level.WARNING, "no response"),
        (disk(100, 10), Level.OK, "100.0 GB free, about 10.0 GB needed"),
        (disk(15, 10), Level.WARNING, "15.0 GB free"),
        (disk(5, 10), Level.ERROR, "5.0 GB free, about 10.0 GB needed"),
        (disk(5, 0), Level.OK, "5.0 GB free"),
        (disk(0.2, 0, reserved_gb=0.27), Level.ERROR, "buffer.min_free_bytes keeps 0.3 GB free"),
        (disk(5, 0, error="cannot write"), Level.ERROR, "cannot write"),
        (disk(100, 1, is_network=True), Level.WARNING, "nfs4: SQLite's WAL is unsafe"),
        (Facts(model_error="no config.json there", limits=limits()), Level.ERROR, "no config.json there"),
        (cpu(), Level.OK, "2.13.0+cpu"),
        (cpu(torch="2.10.1"), Level.ERROR, "2.10.1"),
        (cpu(torch="2.15.0"), Level.ERROR, "2.15.0"),
        (cpu(torch=""), Level.ERROR, "not installed"),
        (cpu(transformers="6.0.1"), Level.ERROR, "6.0.1"),
        (cpu(error="/x does not run"), Level.ERROR, "does not run"),
        (gpu_job(versions=(TRAINER, ENGINE)), Level.OK, "2.30.7 in both"),
        (
            gpu_job(versions=(TRAINER, Versions(of="engine", sglang="0.5", cuda="12.8", nccl="2.27.3"))),
            Level.ERROR,
            "2.30.7 in the trainer, 2.27.3 in SGLang",
        ),
        (gpu_job(versions=(Versions(of="engine", cuda="13.0"),)), Level.ERROR, "not installed"),
        (gpu_job(versions=(Versions(of="engine", sglang="1", torch="2.1"),)), Level.ERROR, "built for CPUs"),
        (
            gpu_job(
                versions=(TRAINER,),
                gpus=GpuFacts(wanted={0: "x"}, found=(H100,), driver="570.86.10"),
            ),
            Level.ERROR,
            "13.0 needs driver 580 or newer, this is 570.86.10",
        ),
        (gpu_job(), Level.OK, "81555 MB free"),
        (gpu_job(gpus=GpuFacts(wanted={0: "x"}, error="nvidia-smi is not installed")), Level.ERROR, "nvidia"),
        (
            gpu_job(gpus=GpuFacts(wanted={0: "x", 1: "y"}, found=(H100,), visible="0")),
            Level.ERROR,
            "1 GPUs are visible (CUDA_VISIBLE_DEVICES=0)",
        ),
        (
            gpu_job(
                gpus=GpuFacts(wanted={0: "x"}, found=(Gpu(index=0, name="A", total_mb=9999, used_mb=5000),))
            ),
            Level.WARNING,
            "5000 of 9999 MB in use",
        ),
        (gpu_job(hosts=2), Level.WARNING, "no active port (mlx5_1/1 down)"),
        (
            Facts(uses_gpus=True, num_hosts=2, limits=limits(rdma=("mlx5_0/1",), max_locked_bytes=8 << 20)),
            Level.WARNING,
            "limited to 8 MB",
        ),
        (Facts(limits=limits(named={"NCCL_SOCKET_IFNAME": "ib0"})), Level.ERROR, "no interface ib0"),
        (Facts(limits=limits(named={"NCCL_SOCKET_IFNAME": "=eth"})), Level.OK, "exists"),
        (Facts(limits=limits(max_files=1024)), Level.WARNING, "at most 1024"),
        (Facts(uses_gpus=True, limits=limits(shm_bytes=64 << 20)), Level.WARNING, "67 MB"),
        (secret(0o600), Level.OK, "mode 600"),
        (secret(0o640), Level.ERROR, "mode 640: other users can read it"),
        (secret(None), Level.ERROR, "no such file"),
        (secret(0o600, is_mine=False), Level.ERROR, "another user"),
    ],
)
def test_each_check(facts: Facts, level: Level, text: str) -> None:
    matching = [each for each in findings(facts) if text in each.found]
    assert [each.level for each in matching] == [level], findings(facts)
    assert bool(matching[0].remedy) is (level is not Level.OK)


def test_a_machine_without_wishes_has_no_trouble() -> None:
    found = findings(Facts())
    assert {each.level for each in found} == {Level.OK} and len(CHECKS) == 10
    assert not [each for each in findings(secret(None, is_needed=False)) if each.level is not Level.OK]


def test_versions_are_those_of_the_package() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, (first, last) in (("torch", TORCH), ("transformers", TRANSFORMERS)):
        text = next(each for each in wanted if each.startswith(f"{package}>="))
        numbers = re.findall(r"\d+(?:\.\d+)?", text)
        assert numbers == [f"{first[0]}.{first[1]}", f"{last[0]}.{last[1]}" if last[1] else f"{last[0]}"]


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
        facts = gather(config, gathering.ROLES)
    by_setting = {each.setting: each for each in facts.bound}
    assert "in use" in by_setting["buffer.host"].error and not by_setting["daemon.http_host"].error
    assert {each.host for each in facts.names if not each.addresses} == {"no-such-host.invalid"}
    assert facts.spans_machines and "no config.json" in facts.model_error
    assert facts.gpus.wanted == {0: "the trainer", 1: "the trainer"} and facts.gpus.found[0].name == "H100"
    modes = {Path(each.path).name: each.mode for each in facts.secrets}
    assert modes["rollout.secret"] == 0o644 and modes["trainer.secret"] is None
    (trainer,) = facts.versions
    assert trainer.torch and trainer.transformers and not trainer.error
    assert all(each.free_bytes > 0 and not each.error for each in facts.disks)
    assert max(each.reserved_bytes for each in facts.disks) == config.buffer.min_free_bytes
    assert not (tmp_path / "runs").exists(), "looking has left something behind"


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
