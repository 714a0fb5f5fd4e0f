"""Reward models of many families: one step, saved, and loaded by transformers with the same scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification

from areal_like.chat.token_row import TokenRow
from areal_like.errors import ConfigError
from tests.support.families import stored
from tests.support.model_matrix import write
from tests.support.trainer_helpers import VOCAB
from trainer.batching.packing import collate
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.models.reward_model import RewardModel
from trainer.offline.rows import training_sample
from trainer.optimizer import ShardedAdamW
from trainer.reward_model.loss import BradleyTerryLoss

QUICK = ("gpt2", "qwen3", "qwen3_moe")
OTHERS = ("llama", "qwen2", "mixtral", "deepseek_v3", "qwen3_next")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield Ranks.alone()
    dist.destroy_process_group()


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_scores_are_those_of_transformers(family: str, ranks: Ranks, tmp_path: Path) -> None:
    path = write(family, tmp_path / "model")
    model = RewardModel.load(path, ranks)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, VOCAB, (num,), generator=draw).tolist() for num in (7, 4, 11, 3)]
    rows = [TokenRow(tokens=text, loss_mask=[0] * (len(text) - 1) + [1]) for text in texts]
    batch = collate(
        [training_sample(row, value=-float(at % 2), group=at // 2) for at, row in enumerate(rows)],
        shares_prefixes=model.shares_prefixes,
    )
    optimizer = ShardedAdamW(model, ranks, lr=0.1)
    for _ in range(2):
        BradleyTerryLoss(model)(batch)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step(divisor=2, lr=0.1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, tokenizer_path=path)
    saved = checkpoints.save(1, model, optimizer, ranks, extra={})
    checkpoints.wait()
    checkpoints.close()
    with torch.no_grad():
        ours_N = model(batch)
        theirs = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1, dtype=torch.float32)
        theirs_N = torch.cat([theirs(input_ids=torch.tensor([text])).logits[0] for text in texts])
    assert ours_N.std() > 1e-3 and torch.allclose(ours_N, theirs_N, atol=1e-5, rtol=1e-5)
    names = stored(saved).keys()
    assert "score.weight" in names and not any("lm_head" in name for name in names)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "glm4_moe"])
def test_models_without_a_classifier_are_refused(family: str, tmp_path: Path) -> None:
    path = write(family, tmp_path / "model")
    with pytest.raises(ConfigError, match="transformers has no sequence classifier of type"):
        RewardModel.build(path)
