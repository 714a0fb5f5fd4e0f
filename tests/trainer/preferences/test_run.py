"""Runs of preference optimization: a step against plain autograd, resumed runs, ranks, and learning."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.chat.token_row import TokenRow
from areal_like.config import Config, LoraConfig, from_mapping
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from tests.support.offline import StopAfter, files_of, metrics_of
from tests.support.preference_rows import rows_of, sum_pairs
from tests.support.quick import only_in_chaos, others_in_chaos
from tests.support.sft_model import write_rows, write_sft_model
from trainer.distributed.ranks import Ranks
from trainer.offline.plan import StepPlan
from trainer.offline.run import OfflineRun
from trainer.preferences.losses import mismatched_kl
from trainer.preferences.methods import Completions, Kto, build_method
from trainer.preferences.step import KtoLoss
from trainer.preferences.training import PreferenceTraining

METHODS = ("dpo", "ipo", "kto", "simpo", "orpo")
RANKING = {"prompt": "20+30=", "responses": ["50", "5", "500", "51"], "scores": [3, 1, 1, 2]}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, another one as the reference, rows, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_sft_model(tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    draw = np.random.RandomState(1)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(torch.from_numpy(draw.standard_normal(tuple(param.shape)).astype(np.float32)) * 0.02)
    other.save_pretrained(tmp_path / "reference")
    write_rows(tmp_path / "train.jsonl", [*sum_pairs(13, seed=1), RANKING])
    labels = [*sum_pairs(11, seed=1, kind="label"), *sum_pairs(2, seed=3), RANKING]
    write_rows(tmp_path / "labels.jsonl", labels)
    write_rows(tmp_path / "eval.jsonl", sum_pairs(6, seed=2))
    yield tmp_path


def config_of(root: Path, name: str, *, lr: float = 3e-3, **settings: Any) -> Config:
    rows = "labels" if settings.get("method") == "kto" else "train"
    return from_mapping(
        {
            "name": name,
            "runs_dir": str(root / "runs"),
            "model": {"path": str(root / "model")},
            "preferences": {
                "train": str(root / f"{rows}.jsonl"),
                "eval": str(root / "eval.jsonl"),
                "batch_rows": 4,
                "num_epochs": 2,
                "eval_interval": 3,
                **settings,
            },
            "trainer": {
                "lr": lr,
                "warmup_steps": 0,
                "checkpoint_interval": 3,
                "keep_checkpoints": 9,
                "tokens_per_microbatch": 80,
            },
        }
    )


def run(config: Config, *, resume: str = "", num_steps: int = 1000) -> RunPaths:
    object.__setattr__(config, "resume", resume)
    ranks = Ranks.alone()
    try:
        stopping = StopAfter(num_steps)
        OfflineRun(PreferenceTraining(), config, ranks, stopping=stopping, started_s=0.0).run()
    finally:
        dist.destroy_process_group()
    return RunPaths.of(config)


def logp_of(model: Any, row: TokenRow) -> Tensor:
    """Log-prob of a row's learned tokens, by transformers, without padding or packing."""
    logp = torch.log_softmax(model(torch.tensor([row.tokens])).logits[0, :-1], -1)
    by_token = logp.gather(1, torch.tensor(row.tokens[1:])[:, None])[:, 0]
    return (by_token * torch.tensor(row.loss_mask[1:])).sum()


@pytest.mark.parametrize("name", others_in_chaos(METHODS, quick=["dpo", "kto", "orpo"]))
def test_a_step_is_that_of_plain_autograd(name: str, root: Path) -> None:
    """Loss, gradient norm, rewards and KL, in several micro-batches, with another model as reference."""
    reference = {} if name in ("simpo", "orpo") else {"reference": str(root / "reference")}
    config = config_of(root, name, method=name, num_steps=1, batch_rows=14, **reference)
    (found,) = metrics_of(run(config))
    assert found["num_microbatches"] > 1

    method = build_method(config.preferences)
    policy, ref = (AutoModelForCausalLM.from_pretrained(root / each) for each in ("model", "reference"))
    source = [json.loads(line) for line in Path(str(config.preferences.train)).read_text().splitlines()]
    rows = rows_of(root, source, of_pairs=not isinstance(method, Kto))
    dist.destroy_process_group()
    plan = StepPlan.of(config.preferences, rows.num_tokens_N, seed=config.seed, rows=rows.fingerprint)
    indices = plan.rows(0)
    completions = [(row, level, index) for index in indices for row, level in rows._used(index)]
    given = Completions(
        logp_N=torch.stack([logp_of(policy, row) for row, _, _ in completions]).double(),
        ref_logp_N=torch.stack([logp_of(ref, row) for row, _, _ in completions]).double().detach(),
        num_tokens_N=torch.tensor([row.num_learned for row, _, _ in completions]).double(),
    )
    if isinstance(method, Kto):
        pairs = [(indices[at], indices[at - 1]) for at in range(len(indices))]
        mismatched = [row for pair in pairs for row in rows.mismatched(*pair) if row is not None]
        with torch.no_grad():
            ratios = [logp_of(policy, row) - logp_of(ref, row) for row in mismatched]
        kl = mismatched_kl(torch.stack(ratios).double())
        assert found["kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-5)
        labels = torch.tensor([level > 0 for _, level, _ in completions])
        loss = method.losses(given, labels, kl).mean()
        assert found["num_completions"] == len(completions)
    else:
        better = [
            (i, j)
            for i, (_, left, row) in enumerate(completions)
            for j, (_, right, other) in enumerate(completions)
            if row == other and left > right
        ]
        first, second = torch.tensor(better).T
        score_N = method.scores(given)
        loss = method.losses(score_N[first] - score_N[second]).mean()
        best = sorted({i for i, _ in better} - {j for _, j in better})
        if method.sft_weight:
            loss = loss - given.logp_N[best].sum() / given.num_tokens_N[best].sum()
        reward_N = method.rewards(given).detach()
        margin = (reward_N[first] - reward_N[second]).mean()
        assert found["margin"] == pytest.approx(float(margin), rel=1e-4, abs=1e-5)
        assert found["num_pairs"] == len(better) == len(indices) - 1 + 5
    loss.backward()
    norm = torch.stack([param.grad.norm() for param in policy.parameters() if param.grad is not None]).norm()
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("name", [*only_in_chaos("dpo"), "kto"])
def test_a_resumed_run_is_the_run_itself(name: str, root: Path) -> None:
    """To the last bit, also with log-probs of the reference that were lost and are computed again."""
    whole = run(config_of(root, "whole", method=name))
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 5, 6]
    if name == "dpo":
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5), "the reference is the initial model"

    run(config_of(root, "stopped", method=name), num_steps=4)
    for file in (root / "cache" / "areal_like" / "reference_logps").iterdir():
        file.unlink()
    resumed = run(config_of(root, "stopped", method=name), resume="step:3")
    assert metrics_of(resumed) == rows
    last = "step_000007"
    assert files_of(resumed.checkpoints / last) == files_of(whole.checkpoints / last)
    summaries = [json.loads(paths.summary.read_text()) for paths in (whole, resumed)]
    for each in summaries:
        del each["wall_seconds"], each["resumed_from_step"], each["model"]
    assert summaries[0] == summaries[1] and summaries[0]["finished"]
    assert summaries[0]["eval_accuracy_after"] == rows[-1]["eval_accuracy"]


@pytest.mark.parametrize("name", others_in_chaos(METHODS, quick=["dpo", "kto"]))
def test_rewards_move_apart(name: str, root: Path) -> None:
    """Every method raises the margin of its rewards on the rows that it learns from."""
    config = config_of(root, name, method=name, num_epochs=6, lr=3e-3)
    rows = metrics_of(run(config))
    first, last = rows[0], rows[-1]
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"] + 0.01
    assert last["accuracy"] > 0.7


def test_weights_of_labels_are_recommended(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = [{"prompt": "1=", "completion": str(i), "label": i < 6} for i in range(8)]
    write_rows(root / "labels.jsonl", labels)
    run(config_of(root, "uneven", method="kto", num_steps=1))
    found = "6 good completions weigh 3 times what 2 bad ones do, .* between 0.333 and 0.444"
    assert re.search(found, caplog.text)
    caplog.clear()
    run(config_of(root, "even", method="kto", num_steps=1, desirable_weight=0.4))
    assert "weigh" not in caplog.text


def test_a_row_alone_has_no_mismatched_completion(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a loss prepares is a part of the step's time."""
    write_rows(
        root / "labels.jsonl", [{"prompt": "1=", "completion": str(i), "label": i < 2} for i in range(3)]
    )
    write_rows(root / "eval.jsonl", [{"prompt": "1=", "completion": "1", "label": True}])
    moved_s = [0.0]
    real, own = time.perf_counter, KtoLoss.begin

    def begin(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        moved_s[0] += 1000

    monkeypatch.setattr(KtoLoss, "begin", begin)
    monkeypatch.setattr("trainer.metrics.speed.time.perf_counter", lambda: real() + moved_s[0])
    settings = {"method": "kto", "batch_rows": 2, "num_epochs": 1, "reference": str(root / "reference")}
    paths = run(config_of(root, "alone", **settings))
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [row["num_rows"] for row in rows] == [2, 1] and rows[1]["kl"] == 0
    assert "1 of 2 steps have one row" in caplog.text
    for row in rows:
        assert 1000 < row["compute_s"] < row["step_s"] < 2000


def test_an_adapter_has_its_base_as_reference(root: Path) -> None:
    config = config_of(root, "lora", num_epochs=1)
    config = replace(config, model=replace(config.model, lora=LoraConfig(rank=4, alpha=8.0)))
    paths = run(config)
    rows = metrics_of(paths)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and rows[-1]["loss"] < rows[0]["loss"]
    (adapter,) = (paths.checkpoints / "step_000004").glob("adapter_model.safetensors")
    assert all(name.startswith("base_model.") for name in load_file(adapter))


def test_a_reference_that_does_not_fit_is_refused(root: Path) -> None:
    shutil.copytree(root / "reference", root / "pickled")
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"^preferences\.reference=.*pickled: .*its weights are pickles"):
        run(config_of(root, "pickled", reference=str(root / "pickled")))
    for file in (root / "model").glob("*token*"):
        swapped = (
            file.read_text().replace('"1": ', '"@": ').replace('"2": ', '"1": ').replace('"@": ', '"2": ')
        )
        (root / "reference" / file.name).write_text(swapped)
    with pytest.raises(ConfigError, match=r"preferences\.reference=.*: its tokenizer is not the policy's"):
        run(config_of(root, "other", reference=str(root / "reference")))
    facts = json.loads((root / "reference" / "config.json").read_text())
    (root / "reference" / "config.json").write_text(json.dumps({**facts, "vocab_size": 5}))
    for name, message in (("reference", "its vocabulary has 5 tokens and"), ("absent", "cannot be found")):
        config = config_of(root, name, reference=str(root / name))
        with pytest.raises(ConfigError, match=f"preferences.reference={root / name}: .*{message}"):
            run(config)
