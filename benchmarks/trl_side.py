"""TRL's half of benchmarks/trl.py: runs in its own environment, which has TRL but not this project.

    python trl_side.py SPEC.json

SPEC: model (directory), prompts and reference answers in order, settings, trl (further arguments of
GRPOConfig), out (a file), weights (a directory for the final ones), stop_at (a reward), stop_after_s, window,
num_threads, and optionally checkpoints (a directory) with save_steps: a call continues from the newest
checkpoint there. One line of JSON is appended to `out` for every batch, after its last update.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

started_s = time.time()
spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
os.environ["OMP_NUM_THREADS"] = str(spec["num_threads"])

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

torch.set_num_threads(spec["num_threads"])
settings = spec["settings"]
tokenizer = AutoTokenizer.from_pretrained(spec["model"])
model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
answer_of = dict(zip(spec["prompts"], spec["answers"], strict=True))
# Before the clock starts: tokenizing 128 prompts again in every step is not part of TRL's work.
num_tokens_of = {prompt: len(tokenizer(prompt).input_ids) for prompt in answer_of}
batches: list[dict[str, Any]] = []


def reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
) -> list[float]:
    """1.0 for exactly the reference answer."""
    rewards = [
        float((text.strip() if spec.get("strips") else text) == answer_of[prompt])
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    batches.append(
        {
            "reward": sum(rewards) / len(rewards),
            "samples": len(rewards),
            "sampled_tokens": sum(map(len, completion_ids)),
            "prompt_tokens": sum(num_tokens_of[prompt] for prompt in prompts),
            "first_prompt": prompts[0],
        }
    )
    return rewards


def share_of_rate(step: int) -> float:
    """Fraction of the learning rate after `step` steps, as in this project's optimizer.

    transformers' own warm-up has the rate 0 in its first step: a step that trains nothing.
    """
    num_warm, num_steps = settings["warmup_steps"], settings["num_steps"]
    warm = min(1.0, (step + 1) / max(num_warm, 1))
    if settings["lr_schedule"] == "constant":
        return warm
    return min(warm, (num_steps - step) / max(num_steps - num_warm, 1))


class Record(TrainerCallback):
    """Writes a line for each batch, and stops when the mean reward over a window is reached or time is up."""

    @staticmethod
    def write(row: dict[str, Any]) -> None:
        with Path(spec["out"]).open("a") as out:
            out.write(json.dumps(row) + "\n")

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.began_s = time.time()
        if state.global_step:  # continued: the steps after the checkpoint are made again
            lines = Path(spec["out"]).read_text().splitlines()
            first, *rows = [json.loads(line) for line in lines if line.endswith("}")]
            kept = [row for row in rows if row["step"] <= state.global_step]
            Path(spec["out"]).write_text("".join(json.dumps(row) + "\n" for row in [first, *kept]))
            self.began_s -= kept[-1]["seconds"]
            return
        Path(spec["out"]).unlink(missing_ok=True)
        versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
        start_s = self.began_s - started_s
        self.write({"start_s": start_s, "versions": versions, "arguments": arguments})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % num_updates:
            return
        seconds = time.time() - self.began_s
        row = batches[-1] | {
            "step": state.global_step,
            "seconds": seconds,
            "next_lr": optimizer.param_groups[0]["lr"],
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        self.write(row)
        last = [b["reward"] for b in batches[-spec["window"] :]]
        is_reached = len(last) == spec["window"] and sum(last) / len(last) >= spec["stop_at"]
        if is_reached or seconds >= spec["stop_after_s"]:
            control.should_training_stop = True


def is_complete(checkpoint: Path) -> bool:
    """True unless it was being written when the program was killed: the state is its last file."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError):
        return False


def step_of(checkpoint: Path) -> int:
    """Its number of steps."""
    return int(checkpoint.name.rpartition("-")[2])


arguments: dict[str, Any] = {
    "output_dir": spec["out"] + ".trl",
    "seed": spec["seed"],
    "data_seed": spec["seed"],
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "max_steps": settings["num_steps"],
    "per_device_train_batch_size": settings["samples"],
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "num_generations": settings["group_size"],
    "max_completion_length": settings["max_new_tokens"],
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "beta": 0.0,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "max_grad_norm": settings["max_grad_norm"],
    "gradient_checkpointing": False,
    "disable_dropout": True,
    "shuffle_dataset": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
checkpoints: list[Path] = []
if folder := spec.get("checkpoints"):
    arguments |= {"output_dir": folder, "save_strategy": "steps", "save_steps": spec["save_steps"]}
    arguments["save_total_limit"] = 1
    checkpoints = sorted(filter(is_complete, Path(folder).glob("checkpoint-*")), key=step_of)
arguments |= spec["trl"]
num_updates = arguments["num_iterations"]
config = GRPOConfig(**arguments)
optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=settings["lr"],
    betas=settings["betas"],
    weight_decay=settings["weight_decay"],
    fused=True,
)
trainer = GRPOTrainer(
    model=model,
    args=config,
    reward_funcs=reward,
    train_dataset=Dataset.from_dict({"prompt": spec["prompts"]}),
    processing_class=tokenizer,
    callbacks=[Record()],
    optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)),
)
trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
trainer.save_model(spec["weights"])
tokenizer.save_pretrained(spec["weights"])
