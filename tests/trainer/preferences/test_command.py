"""`areal-like preferences`, as a user runs it: on two ranks, with wrong settings.

`tests/chaos/test_offline_kills.py` kills it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from areal_like.paths import RunPaths
from tests.support.launching import TEST_LIMIT_S, areal_like
from tests.support.offline import metrics_of
from tests.support.preference_rows import sum_pairs
from tests.support.sft_model import write_rows, write_sft_model


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    write_sft_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", [*sum_pairs(150, seed=1), *sum_pairs(50, seed=3, kind="chat")])
    write_rows(tmp_path / "eval.jsonl", sum_pairs(20, seed=2))
    return (
        f"model.path={tmp_path}/model",
        f"preferences={{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}",
        "preferences.num_steps=6",
        "preferences.num_epochs=99",
        "trainer={lr: 0.001, warmup_steps: 2, checkpoint_interval: 6}",
    )


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_two_ranks_learn_what_one_does(
    method: str, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a cache of its own, so that two ranks also compute the reference."""
    models, numbers, accuracies = [], [], []
    for world_size in (1, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{world_size}"))
        name = f"ranks-{world_size}"
        words = (f"name={name}", f"trainer.world_size={world_size}", f"preferences.method={method}")
        done = areal_like("preferences", *settings, *words, "reward_model.batch_rows=3", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "reward_model.batch_rows=3 has no effect" in done.stdout
        assert "accuracy of the rewards, after" in done.stdout
        paths = RunPaths(tmp_path / "runs" / name)
        last = paths.checkpoints / "step_000006"
        assert done.stdout.splitlines()[-1] == f"model.path={last}"
        models.append(load_file(last / "model.safetensors"))
        rows = metrics_of(paths)
        numbers.append([row[name] for row in rows for name in ("loss", "margin", "grad_norm")])
        accuracies.append([row["accuracy"] for row in rows])
        numbers[-1] += [rows[-1]["eval_loss"], rows[-1]["eval_margin"]]
        numbers[-1] += [row["kl"] for row in rows if method == "kto"]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5, rel=1e-4)
    # Of about a thousand pairs, a few have nearly equal rewards, whose order is rounding.
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.005)
    for name, tensor in models[0].items():
        assert tensor.allclose(models[1][name], atol=5e-6), name


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_wrong_settings_and_rows_end_with_one_message(settings: tuple[str, ...], tmp_path: Path) -> None:
    source = write_rows(tmp_path / "labels.jsonl", sum_pairs(3, seed=1, kind="label"))
    words = (*settings, f"preferences.train={source}")
    labels = areal_like("preferences", *words, "trainer.world_size=2", cwd=tmp_path)
    assert labels.returncode == 2, labels.stdout + labels.stderr
    assert "labels.jsonl:1: it has one completion with a label" in labels.stdout + labels.stderr
    gamma = areal_like("preferences", *words, "preferences.gamma=2", cwd=tmp_path)
    assert gamma.returncode == 2 and "it belongs to simpo" in gamma.stderr
