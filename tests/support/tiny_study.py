"""The real model's study with a tiny model, a few rows and a few steps: a whole one takes a minute.

python -m tests.support.tiny_study FOLDER NAME      runs a cell
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.real_model import run_cell
from benchmarks.real_model_cells import Study, cells_of
from benchmarks.real_model_data import CALCULATOR, DATA, demonstration
from trainer.models.tiny import untrained_model
from trainer.models.tiny_chat import chat_tokenizer

NUM_EVAL, NUM_MORE, NUM_STEPS = 4, 6, 4
NAMES = [data.name for data in DATA]
SETTINGS: dict[str, Any] = {
    "model.dtype": "float32",
    "sampling.max_new_tokens": 4,
    "sampling.group_size": 4,
    "trainer.groups_per_step": 2,
    "trainer.checkpoint_interval": 1,
    "trainer.lr": 1e-2,
    "trainer.warmup_steps": 0,
    "sft.batch_rows": 6,
    "rollout.max_context": 512,
    "eval.interval": 2,
}


def tiny_study(folder: Path) -> Study:
    """The study in a folder; writes its model and its rows if they are not there."""
    if not (folder / "model" / "config.json").exists():
        tokenizer = chat_tokenizer()
        untrained_model(tokenizer, seed=0, hidden_size=32, num_layers=1).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    cells = cells_of(num_steps=NUM_STEPS, tool_steps=2, distill_steps=NUM_STEPS, seeds=(0,), tool_seeds=(0,))
    for name, cell in cells.items():
        sets = [CALCULATOR] if "tools" in name else NAMES
        few = {f"eval.sets.{one}.num_prompts": NUM_EVAL for one in sets}
        cells[name] = replace(cell, settings={**cell.settings, **few})
    study = Study(
        work=folder / "work",
        results=folder / "results",
        cells=cells,
        model=str(folder / "model"),
        settings=SETTINGS,
        num_samples=8,
    )
    study.rows.mkdir(parents=True, exist_ok=True)
    warm = []
    for name in [*NAMES, CALCULATOR]:
        rows = [
            {"question": f"{name} {number}", "answer": str(number % 2), "label": name}
            for number in range(36 + NUM_MORE)
        ]
        write(study.rows / f"{name}.eval.jsonl", rows[:NUM_EVAL])
        write(study.rows / f"{name}.train.jsonl", rows[NUM_EVAL:20])
        if name == CALCULATOR:
            shown = [demonstration(row, uses_calculator=False) for row in rows[20:36]]
            write(study.rows / f"{name}.sft.jsonl", shown)
        else:
            write(study.rows / f"{name}.more.jsonl", rows[36:])
            warm += rows[20:36]
    write(study.rows / "sft.jsonl", warm)
    return study


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    run_cell(tiny_study(Path(sys.argv[1])), sys.argv[2])
