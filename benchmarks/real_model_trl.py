"""The cell of the study that TRL trains: the same prompts in the same order, rewards and optimizer.

TRL runs in its own environment (`make trl`), by benchmarks/trl_side.py. The chat template is applied here, so
that TRL continues exactly the text that this project's engine continues. A step's completions do not fit into
16 GB in one backward: TRL generates them at once and accumulates gradients over micro-batches of two groups.
Every SAVE_STEPS steps it writes a checkpoint, from which a repeated call continues.

Differences that stay: TRL trains on completions of its current weights, divides by the deviation of the
sample, uses its loss `dapo` and its clips.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_like.automatic_settings import compute_dtype
from areal_like.config import from_mapping
from benchmarks.real_model_cells import Cell, Study
from benchmarks.report import ROOT
from benchmarks.trl import PYTHON, examples_of, shared_settings
from rollout_server.tasks.base import make_task

SAVE_STEPS = 25
GROUPS_AT_ONCE = 2
"""Groups of one micro-batch."""
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
"""glibc keeps the memory of freed tensors, as in this project's trainer."""


def missing_trl() -> str:
    """What to do if TRL is not installed; empty if it is."""
    return "" if PYTHON.exists() else f"no TRL at {PYTHON}: run `make trl`"


def trl_command(study: Study, cell: Cell, config: Mapping[str, Any]) -> list[str]:
    """Writes the specification of the training and returns the command that continues it."""
    folder = study.run(cell)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(trl_spec(folder, config)))
    keeps = [f"{name}={value}" for name, value in KEEPS_MEMORY.items()]
    return ["env", *keeps, str(PYTHON), "-P", str(ROOT / "benchmarks/trl_side.py"), str(folder / "spec.json")]


def trl_spec(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What benchmarks/trl_side.py reads. `settings`: those of the cell, with `model.path` of its start."""
    from transformers import AutoTokenizer

    config = from_mapping(dict(settings))
    task = make_task(config.task, seed=config.seed)
    num_groups = config.trainer.groups_per_step
    examples = examples_of(task, config.trainer.num_steps * num_groups, seed=config.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False)
    prompts = [
        tokenizer.apply_chat_template(example.prompt, tokenize=False, add_generation_prompt=True)
        for example in examples
    ]
    num_micro = max(1, num_groups // GROUPS_AT_ONCE)
    return {
        "model": config.model.path,
        "prompts": prompts,
        "answers": [str(example.answer).strip() for example in examples],
        "strips": True,
        "out": str(folder / "rows.jsonl"),
        "weights": str(folder / "weights"),
        "checkpoints": str(folder / "checkpoints"),
        "save_steps": SAVE_STEPS,
        "seed": config.seed,
        "num_threads": os.cpu_count() or 1,
        "stop_at": 2.0,
        "stop_after_s": float("1e12"),
        "window": 5,
        "settings": shared_settings(config),
        "trl": {
            "per_device_train_batch_size": num_groups * config.sampling.group_size // num_micro,
            "gradient_accumulation_steps": num_micro,
            "steps_per_generation": num_micro,
            "bf16": compute_dtype(config) == "bfloat16",
        },
    }
