"""Records the losses of TRL's SFTTrainer into trl.json: `python -m tests.trainer.sft.record_trl`.

Needs trl (1.16.0 was used, with transformers 5.19.0 and accelerate 1.15.0), which the tests do not. The rows
come in the order of our plan, so that both train on the same batches.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_like.config import SftConfig
from tests.support.sft_model import UNMARKED_TEMPLATE, addition_rows, write_sft_model
from trainer.models.tiny_chat import CHAT_TEMPLATE
from trainer.offline.plan import StepPlan

FILE = Path(__file__).with_name("trl.json")
NUM_ROWS, NUM_EVAL_ROWS, BATCH_ROWS = 20, 6, 8
TEMPLATES = {"messages": CHAT_TEMPLATE, "text": None, "chat": UNMARKED_TEMPLATE}
LR = 3e-3


def record(kind: str, folder: Path) -> dict[str, Any]:
    """Three steps of TRL's trainer on rows of one kind."""
    from datasets import Dataset
    from trl import SFTConfig as TrlConfig
    from trl import SFTTrainer

    rows = addition_rows(kind, NUM_ROWS, seed=1)
    eval_rows = addition_rows(kind, NUM_EVAL_ROWS, seed=2)
    plan = StepPlan.of(SftConfig(batch_rows=BATCH_ROWS), np.ones(NUM_ROWS, dtype=np.int64), seed=3, rows="")
    order = [plan.rows(step) for step in range(plan.num_steps)]
    model = write_sft_model(folder / "model", template=TEMPLATES[kind])
    settings = TrlConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=BATCH_ROWS // 2,
        per_device_eval_batch_size=NUM_EVAL_ROWS,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        assistant_only_loss=kind == "messages",
        max_length=512,
        packing=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list([rows[index] for step in order for index in step]),
        eval_dataset=Dataset.from_list(eval_rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    history = trainer.state.log_history
    return {
        "rows": rows,
        "eval_rows": eval_rows,
        "order": order,
        "eval_loss_before": before,
        "loss": [row["loss"] for row in history if "loss" in row],
        "grad_norm": [float(row["grad_norm"]) for row in history if "grad_norm" in row],
        "eval_loss": [row["eval_loss"] for row in history if "eval_loss" in row][-len(order) :],
    }


def main() -> None:
    """Writes the file."""
    packages = {name: version(name) for name in ("trl", "transformers", "accelerate", "torch")}
    cases = {}
    for kind in TEMPLATES:
        with tempfile.TemporaryDirectory() as folder:
            cases[kind] = record(kind, Path(folder))
    FILE.write_text(json.dumps({"packages": packages, "lr": LR, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
