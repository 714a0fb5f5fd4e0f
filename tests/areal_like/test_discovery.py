"""How a daemon's HTTP server is found: a fixed port, an address for others, and Prometheus' file."""

import asyncio
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import Config, from_mapping
from areal_like.errors import ConfigError
from areal_like.http.discovery import DiscoveryFile, http_port
from areal_like.runtime.daemon import Runtime
from launch.local_job.specs import JobSpecs
from tests.support.ports import held_port


def config(directory: Path, **sections: Any) -> Config:
    return from_mapping({"name": "x", "runs_dir": str(directory / "runs"), **sections})


def test_a_server_and_its_engine_are_targets(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "targets"
    job = config(tmp_path, metrics={"sd_path": str(folder)}, daemon={"advertise_host": "node-7"})
    file = folder / "x.rollout-0.json"

    async def run() -> list[dict[str, Any]]:
        async with Runtime(job, role="rollout", name="rollout-0") as runtime:
            endpoint = json.loads((runtime.paths.endpoints / "rollout-0.json").read_text())
            assert endpoint["http"] == runtime.http_address == f"node-7:{runtime.http_port}"
            assert stat.S_IMODE(file.stat().st_mode) == 0o644 and stat.S_IMODE(folder.stat().st_mode) == 0o755
            page = runtime.metrics.exposition().decode()
            assert "_created" not in page and "areal_ready 0.0" in page
            runtime.ready()
            assert "areal_ready 1.0" in runtime.metrics.exposition().decode()
            assert "areal_build_info{" in page and "areal_disk_free_bytes " in page
            found = json.loads(file.read_text())
            assert [target["targets"] for target in found] == [[runtime.http_address]] * 2
            return [target["labels"] for target in found]

    labels = asyncio.run(run())
    common = {"run": "x", "name": "rollout-0"}
    assert labels == [
        common | {"role": "rollout"},
        common | {"role": "engine", "__metrics_path__": "/metrics/engine"},
    ]
    assert not list(folder.iterdir())


def test_a_link_in_the_directory_is_not_followed(tmp_path: Path) -> None:
    """Others may write into it, and know the names of files and processes."""
    folder, victim = tmp_path / "targets", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("mine")
    job = config(tmp_path, metrics={"sd_path": str(folder)})
    for name in ("x.buffer.json", f".x.buffer.json.{os.getpid()}"):
        (folder / name).symlink_to(victim)
    DiscoveryFile(job, role="buffer", name="buffer").write("h:1")
    assert victim.read_text() == "mine"
    assert json.loads((folder / "x.buffer.json").read_text())[0]["targets"] == ["h:1"]


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    job = config(tmp_path, metrics={"sd_path": str(tmp_path / "targets")})
    with pytest.raises(ConfigError, match="No space left"):
        DiscoveryFile(job, role="buffer", name="buffer").write("h:1")
    assert list((tmp_path / "targets").iterdir()) == []


def test_a_fixed_port_is_bound_or_named(tmp_path: Path) -> None:
    async def run(port: int) -> None:
        job = config(tmp_path, daemon={"http_port": port})
        async with Runtime(job, role="rollout", name="rollout-0") as runtime:
            assert runtime.http_port == port
            with pytest.raises(ConfigError, match=f"port {port} is taken, which daemon.http_port={port}"):
                async with Runtime(job, role="rollout", name="rollout-1"):
                    pass

    with held_port() as port:
        asyncio.run(run(port))


def test_daemons_of_one_machine_have_different_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = config(tmp_path, daemon={"http_port": 9100}, buffer={"num_shards": 2}, rollout={"num_servers": 2})
    specs = JobSpecs(job, config_path=tmp_path / "config.yaml")
    assert [http_port(job, role="buffer", name=f"buffer-{shard}") for shard in (0, 1)] == [9100, 9101]
    servers = [specs.server(f"rollout-{index}") for index in (0, 1)]
    commands = [server.command for server in servers] + [specs.trainer().command]
    for command, port in zip(commands, (9102, 9103, 9104), strict=True):
        assert f"daemon.http_port={port}" in command
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert http_port(job, role="trainer", name="trainer-11") == 9103


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = config(tmp_path, metrics={"sd_path": str(tmp_path / "file" / "targets")})

    async def run() -> None:
        async with Runtime(job, role="rollout", name="rollout-0"):
            pass

    with pytest.raises(ConfigError, match=r"metrics\.sd_path=.*name a directory"):
        asyncio.run(run())
