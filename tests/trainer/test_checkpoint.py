"""Checkpoints: readable by transformers, bitwise resumable, at any world size, complete or absent."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_like.errors import ConfigError, DiskFullError
from tests.support.full_state import copy_shards, gather_full_state
from tests.support.launching import wait_until
from tests.support.small_disk import small_disk
from tests.support.trainer_helpers import random_groups, run_ranks, write_model
from tests.support.trainer_ranks import make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import gather


def test_resumed_training_is_bitwise_equal(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    unbroken = make_runner(path, ranks, dtype=torch.float32)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, tokenizer_path=path)
    for step in range(4):
        unbroken.run(random_groups(4, seed=step), step=step)
        if step == 1:
            saved = checkpoints.save(2, unbroken.policy, unbroken.optimizer, ranks, extra={"cursor": [7, 9]})
            at_save = dict(gather_full_state(unbroken.policy))
    checkpoints.wait()  # the checkpoint was written while training continued
    resumed = make_runner(path, ranks, dtype=torch.float32)
    assert checkpoints.load(2, resumed.policy, resumed.optimizer, ranks) == {"cursor": [7, 9]}
    for step in (2, 3):
        resumed.run(random_groups(4, seed=step), step=step)
    for (name, a), (_, b) in zip(
        gather_full_state(unbroken.policy), gather_full_state(resumed.policy), strict=True
    ):
        assert torch.equal(a, b), name

    model = AutoModelForCausalLM.from_pretrained(saved)
    assert {n: p.detach() for n, p in model.named_parameters()}.keys() == at_save.keys()
    assert all(torch.equal(p, at_save[name]) for name, p in model.named_parameters())
    assert (
        AutoTokenizer.from_pretrained(saved).decode(AutoTokenizer.from_pretrained(saved).encode("42=24"))
        == "42=24"
    )


def test_a_temperature_without_do_sample_is_saved(tmp_path: Path, ranks: Ranks) -> None:
    """transformers warns of such a generation_config.json when it reads it, and refuses to save it."""
    path = write_model(tmp_path / "model")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=1, tokenizer_path=path)
    saved = checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={})
    checkpoints.wait()
    assert settings.items() <= json.loads((saved / "generation_config.json").read_text()).items()


def test_a_checkpoint_of_one_rank_resumes_on_two(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", "qwen2")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, tokenizer_path=path)
    for step in range(2):
        runner.run(random_groups(4, seed=step), step=step)
    checkpoints.save(2, runner.policy, runner.optimizer, ranks, extra={"cursor": 5})
    checkpoints.wait()
    run_ranks("resume", str(tmp_path), path, world_size=2)
    runner.run(random_groups(4, seed=2), step=2)

    other = make_runner(path, ranks)
    assert checkpoints.load(3, other.policy, other.optimizer, ranks) == {"cursor": 5, "ranks": 2}
    assert other.optimizer.num_updates == 3
    for (name, a), (_, b) in zip(
        gather_full_state(runner.policy), gather_full_state(other.policy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_old_checkpoints_are_pruned_and_partial_ones_ignored(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=2, tokenizer_path=path)
    oldest_kept: list[int] = []
    for step in (1, 2, 30, 4_000_000):
        checkpoints.save(
            step, runner.policy, runner.optimizer, ranks, extra={"at": step}, on_saved=oldest_kept.append
        )
    checkpoints.wait()
    assert checkpoints.steps() == [30, 4_000_000] and oldest_kept == [1, 1, 2, 30]
    (tmp_path / "c" / ".step_000031.partial").mkdir()
    assert checkpoints.steps() == [30, 4_000_000]
    checkpoints.save(4_000_000, runner.policy, runner.optimizer, ranks, extra={"at": "again"})
    checkpoints.wait()
    assert not list((tmp_path / "c").glob(".*")), "the next save must remove a partial checkpoint"
    assert checkpoints.load(4_000_000, runner.policy, runner.optimizer, ranks) == {"at": "again"}
    assert runner.optimizer.num_updates == 0


def test_a_checkpoint_that_is_half_deleted_has_no_name(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash may end the deletion of an old one, or of one that is saved again."""
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=1, tokenizer_path=path)

    def save(step: int) -> None:
        checkpoints.save(step, runner.policy, runner.optimizer, ranks, extra={})
        checkpoints.wait()

    def crash(directory: Path, **_: Any) -> None:
        (directory / "trainer_state.json").unlink(missing_ok=True)
        raise OSError("killed")

    for kept in (1, 2):
        save(kept)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
            patch.setattr("shutil.rmtree", crash)
            save(2)
        assert checkpoints.steps() == [2]
        assert checkpoints.load(2, runner.policy, runner.optimizer, ranks) == {}
    save(2)
    assert [each.name for each in (tmp_path / "c").iterdir()] == ["step_000002"]


def test_a_save_copies_only_after_the_last_one_is_written(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=2, tokenizer_path=path)
    committed = threading.Event()

    def hold(oldest_kept_step: int) -> None:
        committed.wait()

    checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={}, on_saved=hold)
    saving = threading.Thread(
        target=lambda: checkpoints.save(2, runner.policy, runner.optimizer, ranks, extra={})
    )
    saving.start()
    saving.join(timeout=0.5)
    with torch.no_grad():
        for param in runner.policy.parameters():
            param.zero_()
    committed.set()
    saving.join()
    checkpoints.close()
    saved = load_file(checkpoints.path(2) / "model.safetensors")
    assert not any(bool(tensor.any()) for tensor in saved.values()), (
        "step 2 was copied while the copies of step 1 still existed"
    )


def test_later_checkpoints_are_set_aside_after_a_rollback(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=1, tokenizer_path=path)
    checkpoints.save(300, runner.policy, runner.optimizer, ranks, extra={})
    # Another run in the same directory.
    checkpoints.save(100, runner.policy, runner.optimizer, ranks, extra={})
    checkpoints.wait()
    assert checkpoints.steps() == [100]
    assert (tmp_path / "c" / "step_000300.rolled_back").is_dir()
    many = Checkpoints(tmp_path / "c", keep=3, tokenizer_path=path)
    many.save(200, runner.policy, runner.optimizer, ranks, extra={})
    many.wait()
    many.load(100, runner.policy, runner.optimizer, ranks)
    assert many.steps() == [100, 200], "load alone must not rename: the buffer may still refuse the trainer"
    many.set_aside_after(100)
    assert many.steps() == [100], "resume=latest would resume from the abandoned step 200"


def test_checkpoints_of_undone_steps_are_pruned(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400, 500):
        (tmp_path / f"step_{step:06d}" / "rows").mkdir(parents=True)
    (tmp_path / "step_000999.rolled_back").mkdir()  # of an earlier release, which kept all
    os.utime(tmp_path / "step_000999.rolled_back", (1e9, 1e9))
    checkpoints = Checkpoints(tmp_path, keep=9, keep_rolled_back=2, tokenizer_path="")
    checkpoints.set_aside_after(400)
    names = [f"step_{step:06d}" for step in (100, 200, 300, 400)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *names,
        "step_000500.rolled_back",
        "step_000999.rolled_back",
    ]
    checkpoints.set_aside_after(100)
    kept = ["step_000100", "step_000300.rolled_back", "step_000400.rolled_back"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept, "the last rollback is the newest"
    checkpoints.set_aside_after(100)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    none = Checkpoints(tmp_path, keep=9, keep_rolled_back=0, tokenizer_path="")
    none.set_aside_after(100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000100"], (
        "a complete one is not touched"
    )


def test_copied_shards_do_not_change_with_training(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    before, copied = gather_full_state(runner.policy), copy_shards(runner.policy)
    runner.run(random_groups(4), step=0)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(before, gather(copied), strict=True))
    after = gather_full_state(runner.policy)
    assert [name for name, _ in after] == [name for name, _ in before]
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    assert {name for name, _ in before} == set(load_file(Path(path) / "model.safetensors")), (
        "tied weights must appear once"
    )


def test_error_messages_for_checkpoints_that_cannot_be_loaded(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=2, tokenizer_path=path)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7 .*there: none"):
        checkpoints.load(7, runner.policy, runner.optimizer, ranks)
    saved = checkpoints.save(7, runner.policy, runner.optimizer, ranks, extra={})
    checkpoints.wait()
    other = make_runner(write_model(tmp_path / "other", "qwen3"), ranks)
    with pytest.raises(ConfigError, match="resume with the model that the run started with"):
        checkpoints.load(7, other.policy, other.optimizer, ranks)
    (saved / "rows" / "policy-00000-of-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoints.load(7, runner.policy, runner.optimizer, ranks)


def test_an_error_in_the_thread_is_raised_by_the_next_call(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=2, tokenizer_path=path)
    (tmp_path / "c").write_text("a file where the directory should be")
    checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={})
    with pytest.raises(OSError):
        checkpoints.save(2, runner.policy, runner.optimizer, ranks, extra={})
    (tmp_path / "c").unlink()

    def cannot_commit(oldest_kept_step: int) -> None:
        raise ConnectionError("the buffer is gone")

    checkpoints.save(3, runner.policy, runner.optimizer, ranks, extra={}, on_saved=cannot_commit)
    with pytest.raises(ConnectionError, match="gone"):
        checkpoints.close()
    assert checkpoints.steps() == [3], "the checkpoint itself must be complete"


def test_a_full_disk_costs_one_checkpoint_and_no_space(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    committed: list[int] = []

    def save(step: int) -> None:
        checkpoints.save(step, runner.policy, runner.optimizer, ranks, extra={}, on_saved=committed.append)

    with small_disk(tmp_path / "disk", num_mib=16) as disk:
        checkpoints = Checkpoints(disk / "c", keep=2, tokenizer_path=path)
        save(1)
        checkpoints.wait()
        model_bytes = (checkpoints.path(1) / "model.safetensors").stat().st_size
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - model_bytes - 8192))
        free = shutil.disk_usage(disk).free
        save(2)
        wait_until(
            lambda: "step_000002 was not written" in caplog.text,
            what="an error as soon as the disk is full",
        )
        assert "free space there" in caplog.text
        assert not list((disk / "c").glob(".*")) and shutil.disk_usage(disk).free == free, (
            "the space must be free at once: the ledger may wait for it"
        )
        save(3)
        with pytest.raises(DiskFullError, match="step_000003 was not written"):
            checkpoints.wait()
        assert checkpoints.steps() == committed == [1]
        filler.unlink()
        save(4)
        checkpoints.close()
        assert checkpoints.steps() == [1, 4] and committed == [1, 1]


def test_files_of_a_failed_checkpoint_are_removed(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(tmp_path / "c", keep=2, tokenizer_path=str(tmp_path / "nowhere"))
    checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={})
    with pytest.raises((OSError, ValueError), match="nowhere"):
        checkpoints.wait()
    assert not list((tmp_path / "c").iterdir())
