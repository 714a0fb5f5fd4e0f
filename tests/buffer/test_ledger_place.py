"""Where the ledger is: on the disk that `buffer.ledger_dir` names, found by readers, never begun twice."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from areal_like import ledger_place as place
from areal_like.config import Config
from areal_like.config.buffer import BufferConfig
from areal_like.errors import ConfigError, UserError
from areal_like.ledger_place import file_system_of, is_network, network_warning
from areal_like.paths import RunPaths
from areal_like.shards import WHOLE, Shard
from buffer.ledger.recovery import recover
from buffer.settings import LedgerSettings
from buffer.storage.durable import open_place, open_store
from launch.run_directory.rundir import is_over, lock, remove_ledgers, remove_unbegun
from tests.support.store_load import raising

MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /home rw - nfs4 nas:/home rw,vers=4.2
31 30 8:2 / /home/me/nvme rw - xfs /dev/nvme0n1 rw
32 22 0:41 / /data\\040set rw master:1 - lustre mgs:/fs rw
33 22 0:42 / /twice rw - ext4 /dev/sdb rw
34 33 0:43 / /twice rw shared:7 - fuse.sshfs host:/ rw
a line that is damaged
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/var/runs/x", "ext4", False),
        ("/home/me/runs/x/ledger", "nfs4", True),
        ("/homes/x", "ext4", False),
        ("/home/me/nvme/x", "xfs", False),
        ("/data set/x", "lustre", True),
        ("/twice/x", "fuse.sshfs", True),
    ],
)
def test_file_systems_of_the_network_are_known(path: str, kind: str, network: bool) -> None:
    assert file_system_of(Path(path), mounts=MOUNTS) == kind
    assert is_network(kind) is network


def test_this_machines_file_system_has_a_type(tmp_path: Path) -> None:
    kind = file_system_of(tmp_path)
    assert kind and file_system_of(tmp_path / "not" / "there") == kind


def job_of(tmp_path: Path, *, ledger_dir: str = "", name: str = "x", num_shards: int = 1) -> Config:
    buffer = BufferConfig(ledger_dir=ledger_dir, num_shards=num_shards)
    return Config(name=name, runs_dir=str(tmp_path / "runs"), buffer=buffer)


def opened(config: Config, shard: Shard = WHOLE) -> Path:
    """Opens the store once, as a buffer does; returns the ledger's real directory."""

    async def body() -> None:
        store = open_store(config, on_error=raising, shard=shard)
        store.recover()
        store.close()

    asyncio.run(body())
    return RunPaths.of(config).ledger_of(shard).resolve()


def test_the_ledger_is_on_the_other_disk_and_is_found(tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    config = job_of(tmp_path, ledger_dir=str(nvme), num_shards=2)
    paths = RunPaths.of(config)
    for _ in range(2):  # the second buffer continues the ledger of the first one
        for index in range(2):
            assert opened(config, Shard(index, 2)) == nvme / "x" / f"ledger-{index}"
    assert [path.name for path in paths.ledgers] == ["ledger-0", "ledger-1"]
    # Without the setting too: the link says where it is.
    assert opened(job_of(tmp_path, num_shards=2), Shard(1, 2)) == nvme / "x" / "ledger-1"
    (paths.root / "ledger-0.old").mkdir()
    shutil.copy(nvme / "x" / "ledger-0" / "ledger.sqlite3", paths.root / "ledger-0.old")
    assert len(paths.ledgers) == 2, "a ledger that was moved away is none of the run"
    remove_ledgers(paths)
    assert not list((nvme / "x").iterdir()) and [path.name for path in paths.root.iterdir()] == [
        "ledger-0.old"
    ]


def test_a_ledger_on_another_machine_is_not_begun_again(tmp_path: Path) -> None:
    config = job_of(tmp_path, ledger_dir=str(tmp_path / "nvme"))
    opened(config)
    (tmp_path / "nvme").rename(tmp_path / "of-another-machine")
    for again in (config, job_of(tmp_path)):
        with pytest.raises(ConfigError, match="this machine does not have: start the buffer on"):
            open_place(again)
    with pytest.raises(ConfigError, match="run the command where the buffer runs"):
        _ = RunPaths.of(config).ledgers
    assert not (tmp_path / "nvme").exists()
    RunPaths.of(config).ledger.unlink()  # what the message says
    opened(config)


def test_another_number_of_shards_begins_no_ledger(tmp_path: Path) -> None:
    directory = opened(job_of(tmp_path))
    two = job_of(tmp_path, num_shards=2)
    opened(two, Shard(0, 2))  # no ticket was issued yet
    with closing(sqlite3.connect(directory / "ledger.sqlite3")) as ledger, ledger:
        columns = (
            "ticket_id, purpose, prompt_index, num_samples, parent, num_reissues, eval_id, max_staleness"
        )
        values = "1, 'train', 0, 1, 0, 0, -1, 1, 'queued', 0"
        ledger.execute(f"INSERT INTO tickets ({columns}, state, num_greedy) VALUES ({values})")
    with pytest.raises(ConfigError, match=r"set buffer\.num_shards=1"):
        opened(two, Shard(1, 2))
    assert not RunPaths.of(two).ledger_of(Shard(1, 2)).exists()
    opened(job_of(tmp_path))


def test_a_ledger_on_disk_says_which_steps_it_lacks(tmp_path: Path) -> None:
    config = job_of(tmp_path)
    directory = opened(config)
    memory = dataclasses.replace(config, buffer=dataclasses.replace(config.buffer, durability="none"))
    for store in (open_store(memory, on_error=raising), open_store(memory, on_error=raising)):
        ledger = recover(LedgerSettings.from_config(memory), store, now_s=0.0)
        ledger.trainer.start_training(
            incarnation=1, step=0, stream={}, settings={"trainer.lr": "0.1"}, unix_s=5.0
        )
    with closing(sqlite3.connect(directory / "ledger.sqlite3")) as connection:
        rows = connection.execute("SELECT step, value FROM settings WHERE key = 'buffer.durability'")
        assert rows.fetchall() == [(0, "none"), (0, "none")]
        others = connection.execute("SELECT count(*) FROM settings WHERE key = 'trainer.lr'")
        assert others.fetchone() == (0,)
    (directory / "ledger.sqlite3").write_bytes(b"damaged" * 100)
    ledger = recover(LedgerSettings.from_config(memory), open_store(memory, on_error=raising), now_s=0.0)
    ledger.trainer.start_training(incarnation=1, step=0, stream={})


def test_a_ledger_is_not_left_behind_or_mixed_up(tmp_path: Path) -> None:
    opened(job_of(tmp_path))
    with pytest.raises(ConfigError, match=r"is in .*/runs/x/ledger: give the same buffer\.ledger_dir"):
        open_place(job_of(tmp_path, ledger_dir=str(tmp_path / "nvme")))
    opened(job_of(tmp_path, ledger_dir=str(tmp_path / "nvme"), name="y"))
    with pytest.raises(ConfigError, match="give the same"):
        open_place(job_of(tmp_path, ledger_dir=str(tmp_path / "other"), name="y"))
    # Another run of the same name, below another runs_dir.
    stranger = job_of(tmp_path / "more", ledger_dir=str(tmp_path / "nvme"), name="y")
    with pytest.raises(ConfigError, match="holds the ledger of another run"):
        open_place(stranger)
    assert not RunPaths.of(stranger).root.exists()
    # A directory that cannot be made.
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"choose another buffer\.ledger_dir"):
        open_place(job_of(tmp_path, ledger_dir=str(tmp_path / "file"), name="z"))


def test_runs_dir_itself_is_no_other_place(tmp_path: Path) -> None:
    config = job_of(tmp_path, ledger_dir=str(tmp_path / "runs"))
    assert opened(config) == tmp_path / "runs" / "x" / "ledger"
    assert not RunPaths.of(config).ledger.is_symlink()


def test_a_refused_job_leaves_no_ledger(tmp_path: Path) -> None:
    config = job_of(tmp_path, ledger_dir=str(tmp_path / "nvme"))
    target = opened(config)
    remove_unbegun(RunPaths.of(config))
    assert not RunPaths.of(config).root.exists() and not target.exists()


def test_a_damaged_ledger_of_a_stopped_job_is_one_line(tmp_path: Path) -> None:
    ledger = opened(job_of(tmp_path)) / "ledger.sqlite3"
    ledger.write_bytes(b"damaged" * 1000)
    job = ("name=x", f"runs_dir={tmp_path / 'runs'}")
    run = subprocess.run(
        [sys.executable, "-m", "buffer", "--drop", "1", *job], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and run.stderr.startswith("buffer: ") and run.stderr.count("\n") == 1
    assert "cannot be opened as a ledger" in run.stderr


def test_a_network_file_system_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {tmp_path / "runs" / "x" / "ledger": "nfs4", tmp_path / "nvme" / "x" / "ledger": "xfs"}
    monkeypatch.setattr(place, "file_system_of", kinds.__getitem__)
    opened(job_of(tmp_path))
    (message,) = caplog.messages
    assert "type nfs4" in message and "Set buffer.ledger_dir to a directory on a local disk" in message
    assert network_warning(job_of(tmp_path, ledger_dir=str(tmp_path / "nvme"))) == ""
    memory = BufferConfig(durability="none")
    assert network_warning(Config(name="x", runs_dir=str(tmp_path / "runs"), buffer=memory)) == ""


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    config = job_of(tmp_path)
    with pytest.raises(UserError, match=r"has no locks .*set buffer\.ledger_dir"):
        opened(config)
    with pytest.raises(ConfigError, match=r"has no locks .*choose a runs_dir"):
        lock(RunPaths.of(config))
    assert not is_over(RunPaths.of(config))


def test_a_place_for_a_ledger_in_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"buffer\.ledger_dir=/nvme: with buffer\.durability=none"):
        BufferConfig(ledger_dir="/nvme", durability="none")
