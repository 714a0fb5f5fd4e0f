"""DPO, KTO and ORPO on the same pairs raise the sorting task's own reward of the default job's initial model.

    python -m benchmarks.preferences [--seeds 0 1 2] [--steps 60]

The warm-started model answers each prompt eight times, the task's reward labels the answers, and a prompt
with right and wrong ones gives a pair (`benchmarks.reward_model`). `areal-like preferences` trains the same
model on these pairs by each method. The measure is the task's reward of greedy answers to held-out prompts,
whose multisets of digits no training has seen. The result is benchmarks/results/preferences.json; nothing is
timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_like.runtime.command_line import load_config
from benchmarks.report import table, write
from benchmarks.reward_model import BATCH, MAX_NEW_TOKENS, pairs
from rollout_server.tasks.sort import SortTask
from trainer.prepare_model import prepare_model

METHODS = ("dpo", "kto", "orpo")
NUM_TRAIN, NUM_HELD_OUT, NUM_PROMPTS, BATCH_ROWS = 1500, 200, 1000, 32
LR = 3e-4


@torch.no_grad()
def held_out_reward(model_dir: str, *, seed: int, do_sample: bool = False) -> float:
    """Mean reward of answers to held-out prompts, greedy or sampled at temperature 1."""
    torch.manual_seed(seed)
    task = SortTask(seed=seed)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    total = 0.0
    for begin in range(0, NUM_PROMPTS, BATCH):
        examples = [task.example("eval", begin + at) for at in range(BATCH)]
        inputs = tokenizer([example.prompt for example in examples], return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, do_sample=do_sample, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        total += sum(task.reward(example, text) for example, text in zip(examples, texts, strict=True))
    return total / NUM_PROMPTS


def measured(seed: int, *, num_steps: int, folder: Path) -> list[dict[str, Any]]:
    """One training by each method; returns their results."""
    built = prepare_model(load_config([f"seed={seed}"]), out_dir=folder / "model")
    for name, split, num in (("train", "train", NUM_TRAIN), ("eval", "eval", NUM_HELD_OUT)):
        rows = pairs(built, split, num, seed=seed)  # type: ignore[arg-type]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = held_out_reward(built, seed=seed)
    results = []
    for method in METHODS:
        settings = [
            f"model.path={built}",
            f"runs_dir={folder}/runs",
            f"seed={seed}",
            f"preferences={{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, method: {method}}}",
            f"preferences.num_steps={num_steps}",
            f"preferences.batch_rows={BATCH_ROWS}",
            "preferences.num_epochs=99",
            f"trainer={{lr: {LR}, warmup_steps: 5, checkpoint_interval: 1000}}",
        ]
        command = [sys.executable, "-m", "launch", "preferences", f"name={method}", *settings]
        subprocess.run(command, check=True)
        summary = json.loads((folder / "runs" / method / "summary.json").read_text())
        results.append(
            {
                "seed": seed,
                "method": method,
                "num_steps": num_steps,
                "num_pairs": NUM_TRAIN,
                "reward_before": before,
                "reward_after": held_out_reward(summary["model"], seed=seed),
                "accuracy_after": summary["eval_accuracy_after"],
                "margin_after": summary["eval_margin_after"],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(seed, num_steps=args.steps, folder=Path(folder))
    write("preferences", {"lr": LR, "batch_rows": BATCH_ROWS, "num_prompts": NUM_PROMPTS, "rows": rows})
    columns = ("seed", "method", "reward_before", "reward_after", "accuracy_after", "margin_after")
    print(table(columns, [[row[name] for name in columns] for row in rows]))


if __name__ == "__main__":
    main()
