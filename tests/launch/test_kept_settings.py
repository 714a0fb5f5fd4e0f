"""The settings of a run that is resumed: what it may change, and when `config.yaml` has them."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from areal_like.built_model import is_built
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.local_job.job import LocalJob
from launch.run_directory.kept_settings import read_changes
from launch.run_directory.open_run import OpenRun, open_run
from launch.view.plain import PlainView
from trainer.prepare_model import prepare_model

Open = Callable[..., OpenRun]


@pytest.fixture
def resume(tmp_path: Path) -> Open:
    """Resumes the run `x`, which has checkpoints of steps 10 and 20, with these settings."""
    base = [f"runs_dir={tmp_path}", "name=x"]
    run = open_run([*base, "trainer.num_steps=40", "trainer.lr=1e-5"])
    run.close()
    for step in (10, 20):
        (run.paths.checkpoints / f"step_{step:06d}").mkdir(parents=True)
    return lambda *settings, resume="latest": open_run([*base, f"resume={resume}", *settings])


def rate_in_file(run: OpenRun) -> float:
    return load_config(["--config", str(run.paths.config)]).trainer.lr


def test_a_refused_resume_changes_nothing(resume: Open) -> None:
    for settings in (["trainer.lr=3e-5"], ["trainer.device=cuda:9"]):
        run = resume(*settings)
        assert run.config_file == run.paths.next_config and run.config_file.exists()
        assert rate_in_file(run) == 1e-5
        run.close()
        assert not run.config_file.exists()
    run = resume()
    assert (run.config.trainer.lr, run.config.trainer.device) == (1e-5, "cpu"), "the tries do not add up"
    run.close()
    assert read_changes(run.paths) == []


def test_settings_that_worked_are_kept_with_a_history(resume: Open) -> None:
    for settings, at in ((["trainer.lr=3e-5"], "latest"), ([], "latest"), (["task.api_key=abc"], "step:10")):
        run = resume(*settings, resume=at)
        run.keep_settings()
        run.close()
    assert rate_in_file(run) == 3e-5
    first, second = read_changes(run.paths)
    assert (first.step, first.by, first.text) == (20, "resume", "trainer.lr: 1e-05 -> 3e-05")
    assert (second.step, second.text) == (10, "task.api_key: (none) -> ***")
    with run.paths.config_changes.open("a") as file:
        file.write("{\n[]\n" + '{"unix_s": 1}\n')
        file.write('{"unix_s": 1e400, "step": 1, "by": "resume", "changed": {"seed": ["1", "2"]}}\n')
    assert read_changes(run.paths) == [first, second]


def test_a_full_disk_does_not_end_a_job_that_is_ready(resume: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    run = resume("trainer.lr=3e-5")
    job = LocalJob(run, view=PlainView(run.config, Console()), num_stops=lambda: 0)
    with monkeypatch.context() as full:
        full.setattr("launch.run_directory.open_run.keep", raising)
        job._keep_settings()
    assert rate_in_file(run) == 1e-5
    job._keep_due_s = 0.0
    job._keep_settings()
    assert rate_in_file(run) == 3e-5
    run.close()


def raising(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_start_that_was_killed_is_left_out_and_named(resume: Open) -> None:
    killed = resume("trainer.lr=3e-5")
    text = killed.config_file.read_text()
    killed.close()
    killed.config_file.write_text(text)  # its launcher had no time to remove it
    run = resume()
    assert "never ready, are left out: trainer.lr: 1e-05 -> 3e-05" in run.announcement[-1]
    assert run.config.trainer.lr == 1e-5
    run.close()


def test_the_number_of_shards_cannot_change(resume: Open) -> None:
    with pytest.raises(ConfigError, match=r"continue with buffer.num_shards=1, or start a new run"):
        resume("buffer.num_shards=2")
    run = resume()
    run.close()
    paths = RunPaths(run.paths.root)
    # An earlier release has begun the ledgers of a resume that it refused then, and kept its settings.
    paths.config.write_text(paths.config.read_text().replace("num_shards: 1", "num_shards: 2"))
    for name, tickets in (("ledger", "(2)"), ("ledger-0", ""), ("ledger-1", "")):
        (paths.root / name).mkdir()
        with closing(sqlite3.connect(paths.root / name / "ledger.sqlite3")) as ledger, ledger:
            ledger.execute("CREATE TABLE marks (name TEXT, value INTEGER)")
            ledger.execute("CREATE TABLE tickets (ticket_id INTEGER)")
            if tickets:
                ledger.execute(f"INSERT INTO tickets VALUES {tickets}")
    with pytest.raises(ConfigError, match=r"continue with buffer.num_shards=1,"):
        resume()
    resume("buffer.num_shards=1").close()


@pytest.mark.chaos
def test_a_model_of_other_settings_is_prepared_again(
    resume: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def has_model(*settings: str) -> bool:
        run = resume(*settings)
        run.close()
        return is_built(run.config)

    def prepare(*settings: str) -> None:
        run = resume(*settings)
        prepare_model(load_config(["--config", str(run.config_file)]))
        run.close()

    random_weights = "model.warm_start_steps=0"
    prepare(random_weights)  # a resume whose daemons were never ready: config.yaml does not have this setting
    assert not has_model()
    assert has_model(random_weights) and has_model(random_weights, "trainer.lr=3e-5")
    for other in ("seed=1", "model.renderer=jinja", "task.api_key=abc"):
        assert not has_model(random_weights, other)
    prepare(random_weights, "seed=1")
    assert has_model(random_weights, "seed=1") and not has_model(random_weights)


def test_the_model_of_a_run_cannot_change(resume: Open, tmp_path: Path) -> None:
    for settings in (["model.path=smollm2"], [f"model.path={tmp_path}"], ["model.path=owner/name"]):
        with pytest.raises(ConfigError, match=r"its model cannot change \(tiny\): leave model.path out"):
            resume(*settings)
    run = resume("model.path=tiny")
    run.close()
    # A directory that was moved, under its new name; and the same one by another path.
    old = tmp_path / "old"
    run.paths.config.write_text(run.paths.config.read_text().replace("path: tiny", f"path: {old}", 1))
    resume(f"model.path={tmp_path}").close()
    old.mkdir()
    resume(f"model.path={old}/../old").close()
    with pytest.raises(ConfigError, match="cannot change"):
        resume(f"model.path={tmp_path}")


def test_a_run_keeps_its_dtype(resume: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine, or with a release, that would choose another one; also with the job's own file."""
    monkeypatch.setattr("areal_like.automatic_settings.cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr("areal_like.automatic_settings.LEAST_PARAMETERS", 1)
    job = tmp_path / "job.yaml"
    job.write_text("trainer: {num_steps: 40}\n")
    for settings in ([], ["--config", str(job)], ["model=tiny"]):
        run = resume(*settings)
        run.close()
        assert (run.config.model.dtype, run.config.model.fp32_head) == ("float32", False), settings
    run = resume("model.dtype=auto")
    run.close()
    assert run.config.model.dtype == "bfloat16", "chosen again"


def test_the_adapter_of_a_run_cannot_change(resume: Open) -> None:
    with pytest.raises(ConfigError, match=r"model.lora=rank 8.*cannot change \(off\): leave model.lora out"):
        resume("model.lora.rank=8")
