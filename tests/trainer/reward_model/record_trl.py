"""Records the losses of TRL's RewardTrainer into trl.json: `python -m tests.trainer.reward_model.record_trl`.

Needs `pip install trl accelerate`; the tests only read the file. The order of the rows is the only
randomness: it is the plan's, and TRL gets the rows in that order.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from areal_like.config import RewardModelConfig
from tests.support.preferences import sorting_pairs
from tests.support.sft_model import write_sft_model
from trainer.models.tiny_chat import CHAT_TEMPLATE
from trainer.offline.plan import StepPlan

FILE = Path(__file__).with_name("trl.json")
NUM_ROWS, NUM_EVAL_ROWS, BATCH_ROWS = 24, 6, 8
CENTER_COEFS = {"text": 0.01, "messages": 0.0}
"""Kind of rows -> coefficient."""
LR = 3e-3


def preference_rows(kind: str, num_rows: int, *, seed: int) -> list[dict[str, Any]]:
    """`text`: pairs with margins; `messages`: pairs of whole conversations, without a prompt of their own."""
    rows: list[dict[str, Any]] = []
    for at, row in enumerate(sorting_pairs(num_rows, seed=seed)):
        if kind == "text":
            rows.append({**row, "margin": 0.1 * (at % 4)})
            continue
        user = {"role": "user", "content": row["prompt"]}
        answers = ("chosen", "rejected")
        rows.append({key: [user, {"role": "assistant", "content": row[key]}] for key in answers})
    return rows


def write_reward_model(out_dir: Path, *, kind: str) -> str:
    """A tiny reward model whose weights are the same with every version of torch."""
    template = CHAT_TEMPLATE if kind == "messages" else None
    path = write_sft_model(out_dir, template=template)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    draw = np.random.RandomState(1).standard_normal(tuple(model.score.weight.shape))
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(draw.astype(np.float32)) * 0.1)
    (out_dir / "generation_config.json").unlink(missing_ok=True)
    model.save_pretrained(out_dir)
    return path


def record(kind: str, folder: Path) -> dict[str, Any]:
    """Three steps of TRL's trainer on rows of one kind."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = preference_rows(kind, NUM_ROWS, seed=1)
    eval_rows = preference_rows(kind, NUM_EVAL_ROWS, seed=2)
    settings = RewardModelConfig(batch_rows=BATCH_ROWS)
    plan = StepPlan.of(settings, np.ones(NUM_ROWS, dtype=np.int64), seed=3, rows="")
    order = [plan.rows(step) for step in range(plan.num_steps)]
    model = write_reward_model(folder / "model", kind=kind)
    arguments = RewardConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH_ROWS // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=NUM_EVAL_ROWS,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        center_rewards_coefficient=CENTER_COEFS[kind] or None,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([rows[index] for step in order for index in step]),
        eval_dataset=Dataset.from_list(eval_rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    history = trainer.state.log_history
    found = {"rows": rows, "eval_rows": eval_rows, "order": order, "eval_loss_before": before}
    for name in ("loss", "grad_norm", "accuracy", "margin", "eval_loss"):
        values = [float(row[name]) for row in history if name in row]
        found[name] = values[-len(order) :]
    return found


def main() -> None:
    """Writes the file."""
    packages = {name: version(name) for name in ("trl", "transformers", "accelerate", "torch")}
    cases = {}
    for kind in CENTER_COEFS:
        with tempfile.TemporaryDirectory() as folder:
            cases[kind] = record(kind, Path(folder))
    FILE.write_text(json.dumps({"packages": packages, "lr": LR, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
