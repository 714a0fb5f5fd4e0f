"""A reward model learns the sorting task's reward from the answers of the default job's initial model.

    python -m benchmarks.reward_model [--seeds 0 1 2] [--steps 150]

The warm-started model answers each prompt eight times; the task's own reward labels the answers, and a prompt
with right and wrong ones gives a pair. The reward model starts from the same model and is trained with
`areal-like reward-model`. The held-out pairs are of multisets of digits that neither training has seen. The
result, benchmarks/results/reward_model.json, has accuracy and calibration before and after; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_like.runtime.command_line import load_config
from benchmarks.made_answers import made_pairs
from benchmarks.report import table, write
from rollout_server.tasks.base import Split
from rollout_server.tasks.sort import SortTask
from trainer.prepare_model import prepare_model

NUM_TRAIN, NUM_HELD_OUT, NUM_ANSWERS, BATCH = 4000, 500, 8, 250
MAX_NEW_TOKENS = 10
KEPT = ("accuracy", "ece", "margin", "loss")


@torch.no_grad()
def pairs(model_dir: str, split: Split, num_pairs: int, *, seed: int) -> Iterator[dict[str, str]]:
    """Rows with a right and a wrong answer of the model to the same prompt."""
    torch.manual_seed(seed)
    draw, task = random.Random(seed), SortTask(seed=seed)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    index = found = 0
    while found < num_pairs:
        examples = [task.example(split, index + at) for at in range(BATCH)]
        index += BATCH
        inputs = tokenizer([example.prompt for example in examples], return_tensors="pt", padding=True)
        tokens = model.generate(
            **inputs, do_sample=True, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=NUM_ANSWERS
        )
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for at, example in enumerate(examples):
            answers = sorted({text for text in texts[at * NUM_ANSWERS :][:NUM_ANSWERS] if text})
            right = [text for text in answers if task.reward(example, text) == 1.0]
            wrong = [text for text in answers if task.reward(example, text) == 0.0]
            if right and wrong and found < num_pairs:
                found += 1
                yield {"prompt": str(example.prompt), "chosen": right[0], "rejected": draw.choice(wrong)}


def measured(
    seed: int, *, num_steps: int, folder: Path, name: str = "rm", num_made: int = 0
) -> dict[str, Any]:
    """One training, of the run `name`; returns its result.

    `num_made`: number of pairs with a made wrong answer (`benchmarks.made_answers`), beside those of the
    model's answers. Pairs that are in `folder` are used again.
    """
    built = prepare_model(load_config([f"seed={seed}"]), out_dir=folder / "model")
    sizes: tuple[tuple[Split, int], ...] = (("train", NUM_TRAIN), ("eval", NUM_HELD_OUT))
    for split, num in sizes:
        if not (file := folder / f"{split}.jsonl").exists():
            file.write_text("".join(json.dumps(row) + "\n" for row in pairs(built, split, num, seed=seed)))
    sources = [f"{folder}/train.jsonl"]
    if num_made:
        sources.append(f"{folder}/made.jsonl")
        rows = made_pairs("train", num_made, seed=seed)
        Path(sources[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"model.path={built}",
        f"runs_dir={folder}/runs",
        f"seed={seed}",
        f"reward_model={{train: [{', '.join(sources)}], eval: {folder}/eval.jsonl}}",
        f"reward_model.num_steps={num_steps}",
        "reward_model.batch_rows=64",
        "reward_model.num_epochs=99",
        "trainer={lr: 0.001, warmup_steps: 10, checkpoint_interval: 1000}",
    ]
    subprocess.run([sys.executable, "-m", "launch", "reward-model", f"name={name}", *settings], check=True)
    summary = json.loads((folder / "runs" / name / "summary.json").read_text())
    kept = {f"{key}_{when}": summary[f"eval_{key}_{when}"] for key in KEPT for when in ("before", "after")}
    counts = {"num_steps": num_steps, "num_pairs": NUM_TRAIN, "num_held_out": NUM_HELD_OUT}
    return {"seed": seed, **counts, **kept, "reliability": summary["eval_reliability"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(seed, num_steps=args.steps, folder=Path(folder)))
    write("reward_model", {"rows": rows})
    columns = ("seed", *(f"{name}_after" for name in KEPT))
    print(table(columns, [[row[name] for name in columns] for row in rows]))


if __name__ == "__main__":
    main()
